"""What experiments can be told, without torch: bounds stand at the fields."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, MinLen

from data_pipeline.errors import OptionError
from data_pipeline.options import check_options
from scaling.execution import Execution
from scaling.runs.identity import NotIdentity
from scaling.train.settings import EngineSettings

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
    """Cells are all combinations of lengths, sp, dp and the grid's values."""

    kind: Literal["step", "train"] = "step"
    """step: some steps on random input; train: whole runs, each with a loss."""
    model: dict[str, Any]
    """`name` and options; of kind=train see `train`."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """Of kind=train see `train`."""
    lengths: Annotated[Counts | None, NotIdentity()] = None
    """Tokens of a sequence; null, of kind=train: the task's."""
    weak: bool = False
    """Whether lengths are tokens of a rank: N / P."""
    sp: Selection
    """Ranks that share a sequence."""
    dp: Selection = field(default_factory=lambda: [1])
    """Data-parallel ranks."""
    grid: Annotated[dict[str, Any], NotIdentity()] = field(default_factory=dict)
    """Further keys with lists of values: model.hidden=[8,16], seed=[0,1,2], ..."""
    repeats: Annotated[Count, NotIdentity()] = 1
    """Of each cell, in fresh processes."""
    warmup_steps: Annotated[int, Ge(0)] = 1
    steps: Count = 5
    """Timed steps of a repeat; their median counts."""
    train: list[str] = field(default_factory=list)
    """What `train` is told in every cell of kind=train, before the grid's keys."""

    of_cells: ClassVar = ("kind", "lengths", "weak", "sp", "dp", "grid", "repeats", "train")
    """Say which cells there are; all other options are of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "step" and self.lengths is None:
            raise OptionError("lengths", None, "kind=step needs lengths, such as [4096,16384]")
        if self.kind == "train" and self.lengths is not None:
            rule = "kind=train takes its task's; say grid.task.tokens=[32,64] where it has such"
            raise OptionError("lengths", self.lengths, rule)
