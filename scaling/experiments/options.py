"""What experiments can be told, without torch: bounds stand at the fields."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen

from data_pipeline.options import check_options
from scaling.execution import Execution
from scaling.runs.identity import NotIdentity

Count = Annotated[int, Ge(1)]
Counts = Annotated[list[Count], MinLen(1)]
Positive = Annotated[float, Gt(0)]
Selection = Annotated[Counts, NotIdentity()]
"""Which points are measured; others may join them later."""


class Checked:
    """A dataclass of options that refuses values out of bounds."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(kw_only=True)
class Running(Checked):
    """How the points of an experiment are run."""

    name: Annotated[str, NotIdentity()]
    """Names the folder of its results."""
    threads: Count = 1
    """Of each rank."""
    timeout_s: Annotated[Positive, NotIdentity()] = 1200.0
    """Longest time of a point, s; then it counts as failed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(kw_only=True)
class StepOptions(Checked):
    """A training step on random input."""

    rows: Count = 1
    """Sequences of a step."""
    vectors: Annotated[int, Ge(0)] = 1
    """Free vector channels of the input, besides the points."""
    scalars: Annotated[int, Ge(0)] = 4
    """Scalar channels of the input."""
    seed: int = 0
    execution: Execution = field(default_factory=Execution)
    """How the model runs."""


@dataclass(kw_only=True)
class SweepOptions(StepOptions):
    """Points are all pairs of `lengths` and `sp`."""

    model: dict[str, Any]
    """`name` and options."""
    lengths: Selection
    """Tokens."""
    sp: Selection
    """Ranks that share a sequence."""
    warmup_steps: Annotated[int, Ge(0)] = 1
    steps: Count = 5
    """Timed steps of a point; their median counts."""
