"""One law of some measurements as an entry of fits.json, or why there is none."""

from collections.abc import Sequence
from itertools import product
from math import isfinite, nan
from typing import Any

import numpy as np

from scaling.experiments.fits import checks
from scaling.experiments.fits.intervals import LEVEL, Estimate
from scaling.experiments.fits.power_law import GRID, HUBER, STEEPEST, Data, Form

LEAST_SCALES = 5
"""In each variable whose exponent is fitted."""
WIDEST = 1.0
"""An exponent whose interval is wider is not determined."""
SCALES_SCATTER = 0.1
"""Where chance explains the scatter of scales less often, intervals are drawn over scales."""
BEYOND = 4
"""The curve goes on to so many times the largest scale."""
CURVE = 33
"""Points of a curve."""
FURTHEST, STEPS = 1e4, 4000
"""Times the largest scale, to where a level is looked for, in so many equal ratios."""


class Refused(ValueError):
    """The data do not say what a form asks; the text says why."""


def entry(
    form: Form,
    data: Data,
    columns: Sequence[str],
    draws: int,
    seed: int,
    levels: Sequence[float] = (),
) -> dict[str, Any]:
    """What a form says of data; see docs/fits.md for its keys.

    Args:
        columns: names of the form's variables in the rows.
        levels: of a form of one variable; where the law reaches them is asked.

    Raises:
        Refused: too few scales, or an exponent that the data do not determine.
    """
    check_scales(form, data, columns)
    random = np.random.default_rng(seed)
    estimate, unit = Estimate(form, data, draws, random), "runs"
    scatter = checks.scatter_chance(estimate)
    if scatter is not None and scatter < SCALES_SCATTER:
        unit, medians = "scales", medians_of_scales(data)
        check_count(form, medians, "scales that scatter more than their repeats")
        estimate = Estimate(form, medians, draws, random)
    parameters = estimate.parameters()
    for exponent in form.exponents:
        check_determined(exponent, **parameters[exponent])
    held_out = checks.hold_out(estimate, draws, random)
    found = {
        "variables": list(columns),
        "points": len(data.y),
        "scales": [float(x) for x in np.unique(data.x[:, 0])],
        "parameters": parameters,
        "held_out": held_out and {"at": named(columns, held_out[1])} | held_out[0],
        "dropped": [
            {"at": {columns[variable]: scale}} | exponents
            for variable, scale, exponents in checks.without_each_scale(estimate)
        ],
        "residuals": {
            "rms": float(np.sqrt((estimate.residuals**2).mean())),
            "remark": checks.remark(scatter, checks.pattern_chance(estimate, random)),
        },
        "curve": curve(estimate, columns),
        "reaches": [reach(estimate, level) for level in levels],
        "method": {
            "loss": "Huber's of log(measured / predicted)",
            "bound": f"{HUBER:g} standard deviations of the residuals: {estimate.bound:.3g}",
            "starts": f"{len(GRID)} values of each exponent, coefficients by projection",
            "intervals": f"bootstrap-t, {LEVEL:.0%}, {draws} draws of {unit}",
            "seed": str(seed),
        },
    }
    if form.variables == ["N", "D"]:
        found["isoflop"] = checks.isoflop(data, form, estimate.theta)
    return finite(found)


def check_scales(form: Form, data: Data, columns: Sequence[str]) -> None:
    """Raises Refused where a variable takes too few values."""
    for exponent in form.exponents:
        variable = form.variable_of(exponent)
        scales = np.unique(data.x[:, variable])
        if len(scales) < LEAST_SCALES:
            has = ", ".join(f"{x:,g}" for x in scales) or "none"
            raise Refused(f"the exponent {exponent} of {form.variables[variable]} needs "
                          f"{LEAST_SCALES} scales, and {columns[variable]} has {has}")  # fmt: skip
    check_count(form, data, "points")
    if np.linalg.matrix_rank(data.z) < len(columns):
        raise Refused(f"{' and '.join(columns)} change only together: no exponent belongs to one")


def check_count(form: Form, data: Data, what: str) -> None:
    if len(data.y) <= len(form.parameters):
        raise Refused(f"{len(data.y)} {what} are too few for {len(form.parameters)} parameters")


def check_determined(exponent: str, value: float, low: float, high: float) -> None:
    """Raises Refused where an interval says next to nothing."""
    if not high - low <= WIDEST or abs(value) >= STEEPEST:
        fault = f"is wider than {WIDEST:g}"
    elif low <= 0 <= high:
        fault = "holds 0, where the form is a constant"
    else:
        return
    raise Refused(f"the data do not determine the exponent {exponent}: its {LEVEL:.0%} interval, "
                  f"{low:.3g} to {high:.3g} around {value:.3g}, {fault}")  # fmt: skip


def medians_of_scales(data: Data) -> Data:
    """One point a scale, that the repeats together say."""
    cells, place = np.unique(data.x, axis=0, return_inverse=True)
    medians = [np.exp(np.median(np.log(data.y[place.ravel() == n]))) for n in range(len(cells))]
    return Data(cells, np.array(medians))


def curve(estimate: Estimate, columns: Sequence[str]) -> list[dict[str, float]]:
    """Values and intervals of the law, over the first variable, for each value of the others."""
    first, *others = (np.unique(column) for column in estimate.data.x.T)
    steps = np.geomspace(first[0], BEYOND * first[-1], CURVE)
    x = np.array([(n, *rest) for rest in product(*others) for n in steps])
    numbers = zip(*estimate.predictions(x), strict=True)
    return [
        named(columns, at) | dict(zip(("value", "low", "high"), map(float, each), strict=True))
        for at, each in zip(x, numbers, strict=True)
    ]


def reach(estimate: Estimate, level: float) -> dict[str, float]:
    """Where a rising law of one variable reaches a level, with the interval of where it may."""
    x = np.geomspace(estimate.data.x.min(), FURTHEST * estimate.data.x.max(), STEPS)
    found = {"level": level}
    for name, y in zip(("value", "high", "low"), estimate.predictions(x[:, None]), strict=True):
        found[name] = float(x[y <= level][-1]) if (y <= level).any() and y[-1] > level else nan
    return found | {"beyond": found["value"] / estimate.data.x.max()}


def named(columns: Sequence[str], at: np.ndarray) -> dict[str, float]:
    return dict(zip(columns, map(float, at), strict=True))


def finite(value: Any) -> Any:
    """The same, with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
