"""Sums of power laws, such as c + a N^b P^-g, fitted to positive measurements.

What is minimised is Huber's loss of log(measured / predicted): every scale counts alike, and a
stalled run does not bend the curve. Variables and measurements are relative to their geometric
means, which leaves the parameters nearly independent. The offset may become negative: kept above
zero it would bias the exponent beside it.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import inf, sqrt

import numpy as np
from jaxtyping import Float
from numpy import ndarray

HUBER = 2.0
"""Residuals beyond so many standard deviations count linearly: a stalled run must stand out."""
GRID = (-4, -2, -1.5, -1, -0.7, -0.4, -0.2, 0.2, 0.4, 0.7, 1, 1.5, 2, 4)
"""Exponents from which searches start, each with the coefficients that suit it best."""
TOLERANCE = 1e-10
"""Of the loss, relative: a step that gains no more is the last."""
STEEPEST = 8.0
"""No exponent goes beyond it, either way."""


class Form:
    """A sum of an offset and of products of powers, read from text: `E + A N^-a + B D^-b`.

    A parameter vector is (exponents, logarithms of coefficients, offset).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.offset, *terms = text.split(" + ")
        powers = [re.findall(r"(\w+)\^(-?)(\w+)", term) for term in terms]
        self.coefficients = [term.split()[0] for term in terms]
        self.variables = list(dict.fromkeys(name for term in powers for name, _, _ in term))
        self.exponents = list(dict.fromkeys(name for term in powers for *_, name in term))
        self.signs = np.zeros((len(terms), len(self.variables), len(self.exponents)))
        """With which an exponent stands at a variable of a term, or 0."""
        for number, term in enumerate(powers):
            for variable, minus, exponent in term:
                place = self.variables.index(variable), self.exponents.index(exponent)
                self.signs[number, *place] = -1 if minus else 1

    @property
    def parameters(self) -> list[str]:
        return [*self.exponents, *self.coefficients, self.offset]

    def variable_of(self, exponent: str) -> int:
        """The place of the variable that an exponent stands at."""
        signs = self.signs[..., self.exponents.index(exponent)]
        return int(np.abs(signs).max(0).argmax())

    def predict(
        self, theta: Float[ndarray, "*b p"], z: Float[ndarray, "n v"]
    ) -> tuple[Float[ndarray, "*b n"], Float[ndarray, "*b n p"]]:
        """The logarithm at logarithms z of the variables (NaN where the sum is not positive), and
        its derivatives."""
        count = len(self.exponents)
        slopes = np.einsum("nv,tvk->ntk", z, self.signs)
        rows = theta[..., :count] @ slopes.reshape(-1, count).T
        logs = theta[..., None, count:-1] + rows.reshape(*theta.shape[:-1], len(z), -1)
        terms = np.exp(np.minimum(logs, 300))
        value = terms.sum(-1) + theta[..., -1:]
        value = np.where(value > 0, value, np.nan)
        rises = sum(terms[..., [t]] * slopes[:, t] for t in range(len(self.coefficients)))
        derivatives = np.concatenate([rises, terms, np.ones_like(terms[..., :1])], -1)
        return np.log(value), derivatives / value[..., None]


@dataclass(frozen=True)
class Data:
    """Measurements at values of a form's variables, all positive."""

    x: Float[ndarray, "n v"]
    y: Float[ndarray, " n"]

    @cached_property
    def centre(self) -> Float[ndarray, " v"]:
        return np.log(self.x).mean(0)

    @cached_property
    def level(self) -> float:
        return float(np.log(self.y).mean())

    @cached_property
    def z(self) -> Float[ndarray, "n v"]:
        return np.log(self.x) - self.centre

    @cached_property
    def log_y(self) -> Float[ndarray, " n"]:
        return np.log(self.y) - self.level


def fit(form: Form, data: Data) -> tuple[Float[ndarray, " p"], float]:
    """The best parameters of many starts, and the bound of Huber's loss that suits the noise."""
    theta, bound = starts(form, data), inf  # least squares first: residuals say how large noise is
    for narrowed in range(4):
        if narrowed:
            residuals = data.log_y - form.predict(theta[0], data.z)[0]
            bound = HUBER * noise(residuals, theta.shape[-1])
        log_y = np.broadcast_to(data.log_y, (len(theta), len(data.y)))
        theta, loss = minimise(form, data.z, log_y, theta, bound)
        theta = theta[[np.argmin(loss)]]
    return theta[0], bound


def noise(residuals: Float[ndarray, " n"], parameters: int) -> float:
    """Standard deviation that a few outliers do not move; at least 1e-9, for exact data."""
    n = len(residuals)
    spread = 1.4826 * float(np.median(np.abs(residuals))) * sqrt(n / max(n - parameters, 1))
    return max(spread, 1e-9)


def starts(form: Form, data: Data) -> Float[ndarray, "s p"]:
    """For each set of exponents on a grid the coefficients and the offset that suit it best: they
    follow linearly (variable projection), for relative errors, and are kept positive."""
    exponents = np.array(list(product(GRID, repeat=len(form.exponents))))
    slopes = np.einsum("nv,tvk,sk->snt", data.z, form.signs, exponents)
    y = np.exp(data.log_y)
    basis = np.concatenate([np.exp(slopes), np.ones_like(slopes[..., :1])], -1) / y[:, None]
    linear = (np.linalg.pinv(basis) @ np.ones_like(y)[:, None])[..., 0]
    linear = np.maximum(linear, 1e-3)
    return np.concatenate([exponents, np.log(linear[:, :-1]), linear[:, -1:]], -1)


def weigh(residuals: Float[ndarray, "*b n"], bound: float) -> Float[ndarray, "*b n"]:
    """Weights with which squares have the slope of Huber's loss."""
    return np.minimum(1.0, bound / np.maximum(np.abs(residuals), 1e-300))


def minimise(
    form: Form,
    z: Float[ndarray, "n v"],
    log_y: Float[ndarray, "b n"],
    theta: Float[ndarray, "b p"],
    bound: float,
    used: Float[ndarray, "b n"] | None = None,
    steps: int = 60,
) -> tuple[Float[ndarray, "b p"], Float[ndarray, " b"]]:
    """Levenberg-Marquardt for many data sets, or starts, at once: parameters and losses.

    Args:
        used: 0 leaves a measurement of a set out.
    """
    used = np.ones_like(log_y) if used is None else used
    theta, exponents = theta.copy(), len(form.exponents)

    def look(theta: ndarray, among: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Residuals, derivatives and losses."""
        logs, jacobian = form.predict(theta, z)
        r = log_y[among] - logs
        rho = np.where(np.abs(r) <= bound, r**2, bound * (2 * np.abs(r) - bound))
        return r, jacobian, np.nan_to_num((used[among] * rho).sum(-1), nan=np.inf)

    active = np.arange(len(theta))
    r, jacobian, loss = look(theta, active)
    losses, damping = loss.copy(), np.full(len(theta), 1e-3)
    for _ in range(steps):
        weighted = jacobian * (used[active] * weigh(r, bound))[..., None]
        normal = weighted.swapaxes(-1, -2) @ jacobian
        downhill = np.einsum("bnp,bn->bp", weighted, r)
        diagonal = np.einsum("bpp->bp", normal)
        diagonal[:] += damping[active, None] * diagonal + 1e-12
        trial = theta[active] + np.linalg.solve(normal, downhill[..., None])[..., 0]
        trial[:, :exponents] = np.clip(trial[:, :exponents], -STEEPEST, STEEPEST)
        there = look(trial, active)
        better = there[2] <= loss
        goes_on = ~(better & (loss - there[2] <= TOLERANCE * loss)) & (damping[active] < 1e10)
        taken = active[better]
        theta[taken], losses[taken] = trial[better], there[2][better]
        damping[active] *= np.where(better, 0.1, 10)
        for old, new in zip((r, jacobian, loss), there, strict=True):
            old[better] = new[better]
        active, r, jacobian, loss = (each[goes_on] for each in (active, r, jacobian, loss))
        if not active.size:
            break
    return theta, losses
