"""A small training run, and what may happen in it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tasks.registry import build_task
from scaling.models import build
from scaling.parallel.mesh import Mesh
from scaling.runs.identity import Identity
from scaling.train.loop import fit
from scaling.train.report import claimed_together
from scaling.train.settings import EngineSettings, OptimSettings, TrainSettings

STEPS = 6
CPU = torch.device("cpu")


def plan(model: torch.nn.Module, forward: int, happens) -> None:
    """`happens` to the outputs of the model's training forward of that number."""
    count = 0

    def hook(module, arguments, out):
        nonlocal count
        count += torch.is_grad_enabled()
        if count == forward and torch.is_grad_enabled():
            return happens(out)

    model.register_forward_hook(hook)


def train(
    folder: Path,
    dp=1,
    sp=1,
    precision: Any = "float32",
    engine: Any = "ddp",
    zero_stage=1,
    step=0,
    happens=None,
    every=None,
    **changes,
):
    """A run of six steps of AdamW on recall, saved after every third; `happens` in `step`."""
    task = build_task("recall", tokens=9, held_out_size=4)
    torch.manual_seed(0)
    model = build("se3_hyena", task.vectors, task.scalars, channels=2, hidden=2, operators=1)
    # One forward a step.
    train = TrainSettings(
        steps=STEPS,
        batch_size=4,
        micro_batch_size=4 // dp,
        precision=precision,
        log_every=1,
        evaluate_every=4,
        save_every=3,
    )
    optim = OptimSettings(warmup_steps=2)
    for name, value in changes.items():
        setattr(train, name, value)
    settings = {"train": (TrainSettings, asdict(train)), "optim": (OptimSettings, asdict(optim))}
    if happens:
        plan(model, step - saved_step(folder), happens)
    if every:
        model.register_forward_hook(lambda module, arguments, out: every(out))
    chosen = EngineSettings(name=engine, zero_stage=zero_stage)
    with claimed_together(folder, Identity(settings), {}) as run:
        return fit(model, task, Mesh(dp, sp), train, optim, chosen, run, CPU)


def saved_step(folder: Path) -> int:
    saved = (folder / "checkpoints").glob("step-*[0-9]")
    return max((int(path.name.removeprefix("step-")) for path in saved), default=0)
