"""The cells of a sweep: all combinations of lengths, ranks and the values of further keys."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import product
from typing import Any

from data_pipeline.errors import OptionError
from scaling.experiments.experiment import Point
from scaling.experiments.options import SweepOptions

BUDGETS = ("budget.tokens", "budget.flops")
"""Keys of runs: so many steps as train on that many tokens, or take that much counted work."""


def cells(options: SweepOptions) -> Iterator[Point]:
    """Each repeat of each cell, all cells once before any is repeated."""
    grid = axes(options.grid)
    lengths = sorted(set(options.lengths or [0]))
    sizes = list(product(lengths, sorted(set(options.sp)), sorted(set(options.dp))))
    for repeat in range(options.repeats):
        for values in product(*grid.values()):
            for length, sp, dp in sizes:
                whole = length * sp if options.weak else length
                chosen = dict(zip(grid, values, strict=True))
                yield Point(length=whole, ranks=sp * dp, dp=dp, repeat=repeat, values=chosen)


def axes(grid: Mapping[str, Any], above: str = "") -> dict[str, Sequence[Any]]:
    """Keys as they are written on a command line, with their values.

    Raises:
        OptionError: a key has no list of values.
    """
    found: dict[str, Sequence[Any]] = {}
    for name, values in grid.items():
        key = f"{above}.{name}".removeprefix(".")
        if isinstance(values, Mapping):
            found |= axes(values, key)
        elif isinstance(values, list) and values:
            found[key] = list(dict.fromkeys(values))
        else:
            raise OptionError(key, values, "must be a list of values, such as [1,2]", "grid")
    return found


def with_values(options: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a cell. `model.name` takes the place of the whole model.

    Raises:
        OptionError: a key is none of `options`.
    """
    made = deepcopy(dict(options))
    if "model.name" in values:
        made["model"] = {}
    for key, value in values.items():
        *above, name = key.split(".")
        section = made
        for step in above:
            section = section.get(step, {}) if isinstance(section, dict) else {}
        if name not in section and above[:1] != ["model"]:
            known = ", ".join(key for key in options if key not in SweepOptions.of_cells)
            raise OptionError(key, value, f"is no key of a step; there are {known}", "grid")
        section[name] = value
    return made
