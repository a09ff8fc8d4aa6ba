"""A small training run, what may happen in it, and how two are compared."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.tasks.registry import build_task
from scaling.models import build
from scaling.parallel.mesh import Mesh
from scaling.runs.identity import Identity
from scaling.train.loop import fit
from scaling.train.report import claimed_together
from scaling.train.settings import EngineSettings, OptimSettings, TrainSettings
from tests.states import saved_tensors

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


def curve(folder: Path) -> list[dict]:
    """What the rows say of the training itself, not of the time it took."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "split", "loss", "grad_norm", "lr", "tokens", "equivariance_error")
    return [{name: row[name] for name in names if name in row} for row in rows]


def assert_same(run: Path, straight: Path, tolerance: float) -> None:
    """Every step is there once, and curve, parameters and optimiser state are the straight run's;
    tolerance 0 means bitwise."""
    ours, theirs = curve(run), curve(straight)
    assert [(row["step"], row["split"]) for row in ours] == [
        (row["step"], row["split"]) for row in theirs
    ]
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() & {"loss", "grad_norm", "lr", "tokens"}:
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=0)
    mine, other = (saved_tensors(folder / "checkpoints" / f"step-{STEPS:08d}")
                   for folder in (run, straight))  # fmt: skip
    assert mine.keys() == other.keys()
    floor = 1e-3 * max(x.float().norm() for x in other.values())
    for name, x in other.items():
        assert (mine[name] - x).norm() <= tolerance * max(x.norm(), floor), name
