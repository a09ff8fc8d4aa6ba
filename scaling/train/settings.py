"""What a training run can be told. Launching fills these from YAML; every field has its unit."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval
from pydantic import FiniteFloat

from data_pipeline.options import check_options
from scaling.runs.identity import MayGrow, NotIdentity

Count = Annotated[int, Ge(1)]
NotNegative = Annotated[FiniteFloat, Ge(0)]
Decay = Annotated[float, Interval(ge=0, lt=1)]


@dataclass
class EvaluationSettings:
    """What evaluation asks, in training and alone."""

    micro_batch_size: Annotated[Count, NotIdentity()] = 8
    """Samples that one data-parallel rank holds at once; in training the rest is accumulated."""
    max_length: Annotated[Count, NotIdentity()] = 1 << 22
    """Longest allowed sequence, tokens; a longer one is an error, never cut."""
    precision: Literal["float32", "float64", "bf16"] = "float32"
    """bf16 is autocast: parameters and transforms stay float32."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class TrainSettings(EvaluationSettings):
    steps: Annotated[Count, MayGrow()] = 600
    """Optimiser steps."""
    batch_size: Count = 8
    """Samples per optimiser step, over all ranks: the loss curve depends on this alone."""
    bucket_steps: Count | None = None
    """Steps whose samples are sorted by length and dealt out anew, so that a batch holds like
    lengths and little padding; null: none."""
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 0
    log_every: Annotated[Count, NotIdentity()] = 10
    """Steps between rows in metrics.jsonl."""
    evaluate_every: Annotated[Count, NotIdentity()] = 100
    """Steps between evaluations; the last step is always evaluated."""
    save_every: Annotated[Count, NotIdentity()] = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[Count, NotIdentity()] = 2
    """Newest checkpoints kept."""
    keep_best: Annotated[int, Ge(0), NotIdentity()] = 0
    """Checkpoints kept besides, of the steps with the smallest validation loss so far; of these are
    those that are saved and evaluated, see save_every and evaluate_every."""
    not_finite: Annotated[Literal["stop", "skip"], NotIdentity()] = "stop"
    """What a loss or gradient that is not finite does: it ends the run; or the step is left out,
    with its samples named, until ten in a row are."""
    deterministic: Annotated[bool, NotIdentity()] = False
    """Use PyTorch's deterministic algorithms alone: the same ranks and machine give the same bits,
    on GPUs, too; an operator that has none is an error."""
    profile_steps: Annotated[int, Interval(ge=0, le=20), NotIdentity()] = 0
    """Steps that every process traces, after its first two, into <runs>/<name>/profile; 0: none.
    See docs/performance.md. No viewer opens a trace of more than 20."""


@dataclass
class OptimSettings:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[FiniteFloat, Gt(0)] = 3e-3
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: NotNegative = 0.0
    warmup_steps: Annotated[int, Ge(0)] = 50
    """Linear warm-up; then a cosine down to lr · final_lr_ratio at the last step."""
    final_lr_ratio: NotNegative = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    gradient_clipping: NotNegative = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class EngineSettings:
    name: Literal["deepspeed", "ddp"] = "ddp"
    zero_stage: Annotated[int, Interval(ge=0, le=3)] = 1
    """DeepSpeed's ZeRO stage, 0 to 3."""
    deepspeed_config: dict = field(default_factory=dict)
    """Further DeepSpeed keys; a key that contradicts this configuration is an error."""

    def __post_init__(self) -> None:
        check_options(self)
