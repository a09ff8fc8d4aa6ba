"""Whether to trust a fit: residuals, the largest scale held out, each scale dropped, isoFLOP."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.stats import f as f_distribution

from scaling.experiments.fits.intervals import Estimate
from scaling.experiments.fits.power_law import Data, Form, minimise, weigh

PATTERN = 0.01
"""Residuals that chance would order so less often are remarked upon."""
SIMULATED = 2000
"""Draws of noise that a pattern is compared with."""
EXACT = 1e-18
"""Sums of squares below it are rounding."""
SAME_BUDGET = 0.05
"""Amounts of compute that differ by less, relative, are one budget."""


def scatter_chance(estimate: Estimate) -> float | None:
    """How often chance alone sets scales so far off the curve, by what their repeats scatter;
    None without repeats."""
    r, w = estimate.residuals, weigh(estimate.residuals, estimate.bound)
    cells, place = np.unique(estimate.data.x, axis=0, return_inverse=True)
    if len(cells) == len(r):
        return None
    mean = np.bincount(place.ravel(), w * r) / np.bincount(place.ravel(), w)
    within = float((w * (r - mean[place.ravel()]) ** 2).sum())
    between = float((w * r**2).sum()) - within
    return _chance(between, len(cells) - len(estimate.theta), within, len(r) - len(cells))


def pattern_chance(estimate: Estimate, random: np.random.Generator) -> float:
    """How often noise alone leaves neighbours so alike: residuals ordered by a variable, the mean
    square of their steps, against noise of which the fit took as much (Durbin and Watson's test,
    simulated)."""
    r, z = estimate.residuals, estimate.data.z
    if (r**2).sum() < EXACT:
        return 1.0
    basis, _ = np.linalg.qr(estimate.form.predict(estimate.theta, z)[1])
    noise = random.standard_normal((SIMULATED, len(r)))
    both = np.concatenate([[weigh(r, estimate.bound) * r], noise - noise @ basis @ basis.T])
    chances = []
    for variable in range(z.shape[1]):
        order = np.lexsort((z[:, variable], *np.delete(z, variable, 1).T))
        steps = (np.diff(both[:, order]) ** 2).sum(-1) / (both**2).sum(-1)
        chances.append((steps <= steps[0]).mean())
    return min(1.0, len(chances) * float(min(chances)))


def _chance(explained: float, count: int, rest: float, others: int) -> float:
    """Of the F test; residuals of exact data, all rounding, have no pattern."""
    if explained + rest < EXACT or count < 1:
        return 1.0
    return float(f_distribution.sf(explained / count / max(rest / others, 1e-300), count, others))


def remark(scatter: float | None, pattern: float) -> str | None:
    """What the residuals say against the form, if anything."""
    said = []
    if scatter is not None and scatter < PATTERN:
        said.append(f"scales lie off the law by more than their repeats scatter (p {_p(scatter)})")
    if pattern < PATTERN:
        said.append(f"neighbouring scales lie off it alike (p {_p(pattern)})")
    return f"{', and '.join(said)}: another form may fit better" if said else None


def _p(chance: float) -> str:
    return f"= {chance:.1g}" if chance >= 1e-9 else "< 1e-9"


def hold_out(
    estimate: Estimate, draws: int, random: np.random.Generator
) -> tuple[dict[str, Any], Float[ndarray, " v"]] | None:
    """What the other scales say of the largest of the first variable, and where; None where they
    are too few to say anything."""
    x, y = estimate.data.x, estimate.data.y
    largest = x[:, 0] == x[:, 0].max()
    if (~largest).sum() <= len(estimate.theta):
        return None
    at = np.unique(x[largest], axis=0)[-1]
    values = np.log(y[(x == at).all(1)])
    others = Estimate(estimate.form, Data(x[~largest], y[~largest]), draws, random)
    predicted, low, high = (float(each[0]) for each in others.predictions(at[None], len(values)))
    measured = float(np.exp(values.mean()))
    return {
        "measured": measured,
        "predicted": predicted,
        "low": low,
        "high": high,
        "error": predicted / measured - 1,
        "covered": low <= measured <= high,
        "beyond": float(x[largest][0, 0] / x[~largest, 0].max()),
    }, at


def without_each_scale(estimate: Estimate) -> list[tuple[int, float, dict[str, float]]]:
    """Number of a variable and its scale that is dropped, and the exponents of the rest."""
    form, data = estimate.form, estimate.data
    scales = [(v, s) for v, column in enumerate(data.x.T) for s in np.unique(column)]
    used: Bool[ndarray, "b n"] = np.stack([data.x[:, v] != scale for v, scale in scales])
    begin, log_y = (np.broadcast_to(each, (len(used), each.size)) for each in
                    (estimate.theta, data.log_y))  # fmt: skip
    theta, _ = minimise(form, data.z, log_y, begin, estimate.bound, used.astype(float))
    return [
        (variable, float(scale), dict(zip(form.exponents, map(float, found), strict=False)))
        for (variable, scale), found in zip(scales, theta, strict=True)
    ]


def isoflop(data: Data, form: Form, theta: Float[ndarray, " p"]) -> dict[str, float] | None:
    """Cross-check of a joint law of size and tokens: the exponent with which the best size grows
    with compute, from parabolas over log size within each budget (size x tokens), beside that
    of the law. The parabolas are biased even without noise. None: fewer than three budgets."""
    size = np.log(data.x[:, 0])
    budgets = near(data.x.prod(1))
    best = []
    for budget in range(budgets.max() + 1):
        some = budgets == budget
        if len(np.unique(size[some])) < 4:
            continue
        curve = np.polynomial.Polynomial.fit(size[some], np.log(data.y[some]), 2)
        (lowest,) = np.real(curve.deriv().roots())
        if curve.deriv(2)(lowest) > 0 and size[some].min() < lowest < size[some].max():
            best.append((np.log(data.x.prod(1)[some]).mean(), lowest))
    if len(best) < 3:
        return None
    compute, sizes = np.array(best).T
    slope = float(np.polyfit(compute, sizes, 1)[0])
    a, b = (float(theta[form.exponents.index(name)]) for name in ("a", "b"))
    return {"exponent": slope, "of_fit": b / (a + b), "budgets": len(best)}


def near(values: Float[ndarray, " n"]) -> ndarray:
    """Numbers the groups of values that differ by less than SAME_BUDGET from the next."""
    order = np.argsort(values, kind="stable")
    gaps = np.diff(np.log(values[order]), prepend=np.log(values[order[0]])) > SAME_BUDGET
    groups = np.empty(len(values), dtype=int)
    groups[order] = np.cumsum(gaps)
    return groups
