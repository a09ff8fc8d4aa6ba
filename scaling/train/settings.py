"""What a training run can be told. Launching fills these from YAML; every field has its unit."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from scaling.runs.identity import MayGrow, NotIdentity


@dataclass
class TrainSettings:
    steps: Annotated[int, MayGrow()] = 600
    """Optimiser steps."""
    batch_size: int = 8
    """Samples per optimiser step, over all ranks: the loss curve depends on this alone."""
    micro_batch_size: Annotated[int, NotIdentity()] = 8
    """Samples that one data-parallel rank holds at once; the rest is accumulated."""
    max_length: Annotated[int, NotIdentity()] = 1 << 22
    """Longest allowed sequence, tokens; a longer one is an error, never cut."""
    bucket_steps: int | None = None
    """Steps whose samples are sorted by length and dealt out anew, so that a batch holds like
    lengths and little padding; null: none."""
    seed: int = 0
    precision: Literal["float32", "float64", "bf16"] = "float32"
    """bf16 is autocast: parameters and transforms stay float32."""
    log_every: Annotated[int, NotIdentity()] = 10
    """Steps between rows in metrics.jsonl."""
    evaluate_every: Annotated[int, NotIdentity()] = 100
    """Steps between evaluations; the last step is always evaluated."""
    save_every: Annotated[int, NotIdentity()] = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, NotIdentity()] = 2
    """Checkpoints kept."""
    profile_steps: Annotated[int, NotIdentity()] = 0
    """Steps that every process traces, after its first two, into <runs>/<name>/profile; 0: none.
    See docs/performance.md."""


@dataclass
class OptimSettings:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 50
    """Linear warm-up; then a cosine down to lr · final_lr_ratio at the last step."""
    final_lr_ratio: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass
class EngineSettings:
    name: Literal["deepspeed", "ddp"] = "ddp"
    zero_stage: int = 1
    """DeepSpeed's ZeRO stage, 0 to 3."""
    deepspeed_config: dict = field(default_factory=dict)
    """Further DeepSpeed keys; a key that contradicts this configuration is an error."""
