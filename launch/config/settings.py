"""The configuration of a training run: which keys there are, their bounds and their defaults."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from data_pipeline.options import check_options
from launch.config.check import Choice, FolderName
from scaling.execution import Execution
from scaling.train.settings import (
    EngineSettings,
    EvaluationSettings,
    OptimSettings,
    TrainSettings,
)

Task = Annotated[dict[str, Any], Choice("data_pipeline.tasks.registry:TASKS")]
Model = Annotated[dict[str, Any], Choice("scaling.models:MODELS", ("vectors", "scalars"))]


@dataclass
class ParallelSettings:
    dp: Annotated[int, Ge(1)] | None = None
    """Data-parallel size; null: whatever sp leaves of the world."""
    sp: Annotated[int, Ge(1)] | None = None
    """Ranks that share one sequence; null: all that dp leaves of the world."""
    timeout_s: Annotated[float, Interval(ge=1, le=30 * 86400)] = 600.0
    """Seconds that a rank waits for another before it gives up; 30 days at most."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class Config:
    """One training run: `python -m launch train`."""

    task: Task
    """`name` and the options of that task's constructor."""
    model: Model
    """`name` and the options of that model's constructor."""
    name: FolderName = "train"
    """The run lives in <runs>/<name>; the same name resumes it."""
    runs: str = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)


@dataclass
class EvalConfig:
    """One evaluation: `python -m launch eval`. Task, model, execution and train are the run's."""

    paths: list[str]
    """One, the run's folder."""
    task: Task = field(default_factory=dict)
    """The run's; another value is refused."""
    model: Model = field(default_factory=dict)
    """The run's; another value is refused."""
    split: Literal["train", "validation", "test"] = "test"
    store: str | list[str] | None = None
    """Evaluate on this store's split, or on that of several, instead of the run's data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    train: EvaluationSettings = field(default_factory=EvaluationSettings)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)


@dataclass
class PredictConfig:
    """One prediction: `python -m launch predict`."""

    paths: list[str]
    """One, the folder of a run on task=denoising or of its exported model."""
    input: str | None = None
    """A PDB or mmCIF file, or a folder of such with its sub-folders; must be given."""
    output: str | None = None
    """Folder for the files with the model's coordinates; must be given."""
    skip_unreadable: bool = False
    """Leave out and name files that cannot be read, instead of stopping at them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    precision: Literal["float32", "float64", "bf16"] = "float32"
    """The run's, where it is not given."""
    execution: Execution = field(default_factory=Execution)
    """The run's, where it is not given."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)


def mesh_sizes(parallel: ParallelSettings, world: int) -> tuple[int, int]:
    """(dp, sp) for that many ranks, null filled by what the other leaves; `Mesh` checks them."""
    dp, sp = parallel.dp, parallel.sp
    if sp is None:
        sp = max(world // dp, 1) if dp else world
    return (max(world // sp, 1) if dp is None else dp), sp
