"""What a fitted form says, with 95 % intervals: a bootstrap over runs, all draws at once.

Residuals, enlarged by what the fit took from them, are drawn with replacement and added to the
curve; every draw is fitted anew. Intervals are bootstrap-t: each draw's deviation counts in its own
standard errors, for with few scales plain percentiles are far too narrow (docs/fits.md).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from scaling.experiments.fits.power_law import Data, Form, fit, minimise, weigh

LEVEL = 0.95
"""Of all intervals."""
BOUNDLESS = 1e9
"""Standard errors; an interval of so many has no end."""


class Spread(NamedTuple):
    """How uncertain a fit is."""

    covariance: Float[ndarray, "b p p"]
    """Of the parameters."""
    noise: Float[ndarray, " b"]
    """Variance of a measurement's logarithm."""


class Estimate:
    """A form fitted to data, and to draws of what the data might have been."""

    def __init__(self, form: Form, data: Data, draws: int, random: np.random.Generator) -> None:
        self.form, self.data, self._random = form, data, random
        self.theta, self.bound = fit(form, data)
        self.residuals = data.log_y - form.predict(self.theta, data.z)[0]
        self._spread, leverage = self._spread_of(data.log_y[None], self.theta[None])
        enlarged = self.residuals / np.sqrt(np.maximum(1 - leverage[0], 0.05))
        self._pool = np.concatenate([enlarged, -enlarged])  # as many ups as downs
        drawn = data.log_y - self.residuals + random.choice(self._pool, (draws, len(data.y)))
        begin = np.broadcast_to(self.theta, (draws, len(self.theta)))
        self.drawn, _ = minimise(form, data.z, drawn, begin, self.bound)
        self._drawn_spread, _ = self._spread_of(drawn, self.drawn)

    def _spread_of(
        self, log_y: Float[ndarray, "b n"], theta: Float[ndarray, "b p"]
    ) -> tuple[Spread, Float[ndarray, "b n"]]:
        """Of the fit to each set of measurements, and their leverages."""
        logs, jacobian = self.form.predict(theta, self.data.z)
        r = log_y - logs
        n, p = jacobian.shape[-2:]
        inverse = np.linalg.pinv(jacobian.swapaxes(-1, -2) @ jacobian, hermitian=True)
        share = np.maximum((np.abs(r) <= self.bound).mean(-1), 0.1)
        noise = ((weigh(r, self.bound) * r) ** 2).sum(-1) / ((n - p) * share**2)
        leverage = (jacobian @ inverse * jacobian).sum(-1)
        return Spread(noise[:, None, None] * inverse, noise), leverage

    def parameters(self) -> dict[str, dict[str, float]]:
        """Name -> value, low and high, in the units of the measurements."""
        form, data = self.form, self.data
        exponents = len(form.exponents)
        linear = np.eye(len(self.theta))
        # A coefficient is of the variables, and not of them relative to their means.
        linear[exponents:-1, :exponents] = -np.einsum("v,tvk->tk", data.centre, form.signs)
        linear[-1, -1] = np.exp(data.level)
        shift = np.r_[np.zeros(exponents), np.full(len(form.coefficients), data.level), 0]
        numbers = [each + shift for each in self._intervals(
            self.theta @ linear.T, self.drawn @ linear.T, linear[None], linear[None]
        )]  # fmt: skip
        for each in numbers:
            each[exponents:-1] = _exp(each[exponents:-1])
        return {
            name: dict(zip(("value", "low", "high"), map(float, column), strict=True))
            for name, *column in zip(form.parameters, *numbers, strict=True)
        }

    def predictions(
        self, x: Float[ndarray, "m v"], repeats: int | None = None
    ) -> tuple[Float[ndarray, " m"], Float[ndarray, " m"], Float[ndarray, " m"]]:
        """Values, lows and highs of the curve or, with `repeats`, of their mean when measured."""
        z = np.log(x) - self.data.centre
        logs, jacobian = self.form.predict(self.theta, z)
        drawn, jacobians = self.form.predict(self.drawn, z)
        noise = 0.0
        if repeats:
            size = (len(drawn), len(x), repeats)
            drawn = drawn - self._random.choice(self._pool, size).mean(-1)
            noise = 1 / repeats
        numbers = self._intervals(logs, drawn, jacobian[None], jacobians, noise)
        value, low, high = (_exp(each + self.data.level) for each in numbers)
        return value, low, high

    def _intervals(
        self,
        value: Float[ndarray, " q"],
        drawn: Float[ndarray, "b q"],
        gradient: Float[ndarray, "1 q p"],
        gradients: Float[ndarray, "#b q p"],
        noise: float = 0.0,
    ) -> tuple[ndarray, ndarray, ndarray]:
        """Value, low and high of quantities whose derivatives by the parameters are given.

        Args:
            noise: of a measurement, as a share of that of a single one.
        """

        def errors(gradient: ndarray, spread: Spread) -> ndarray:
            own = (gradient @ spread.covariance * gradient).sum(-1)
            return np.sqrt(np.maximum(own + noise * spread.noise[:, None], 0))

        error, among = errors(gradient, self._spread)[0], errors(gradients, self._drawn_spread)
        deviations = (drawn - value) / np.maximum(among, 1e-15)
        deviations = np.nan_to_num(deviations, nan=-BOUNDLESS)  # a curve below zero
        upper, lower = np.quantile(deviations, [(1 + LEVEL) / 2, (1 - LEVEL) / 2], axis=0)
        return value, value - upper * error, value - lower * error


def _exp(x: ndarray) -> ndarray:
    with np.errstate(over="ignore"):
        return np.exp(x)
