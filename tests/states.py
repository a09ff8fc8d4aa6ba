"""Curves and training states put together again, for comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from scaling.checkpoint.files import MODEL, OPTIMIZER, complete, newest_whole
from scaling.engine.base import Engine
from scaling.engine.shards import PARAMETER, SavedState


def whole_state(engine: Engine) -> SavedState:
    """What all ranks hold; on every rank. Collective."""
    states: list[Any] = [engine.state()]
    if engine.world > 1:
        own, states = states[0], [None] * engine.world
        dist.all_gather_object(states, own, engine.group)
    return SavedState(states)


def whole_parameters(engine: Engine) -> dict[str, Tensor]:
    """Of an engine, by name. Collective."""
    state = whole_state(engine)
    return {name: state.read(name, PARAMETER).view(shape) for name, shape in engine.shapes.items()}


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a complete checkpoint, flat, by name and kind."""
    _, _, _, saved = newest_whole([checkpoint], MODEL, OPTIMIZER)
    return {
        f"{name}/{kind}": saved.read(name, kind)
        for name in saved.names()
        for kind in [PARAMETER, *saved.kinds(name)]
    }


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
    newest = complete(straight / "checkpoints")[-1].name
    mine, other = (saved_tensors(path / "checkpoints" / newest) for path in (run, straight))
    assert mine.keys() == other.keys()
    floor = 1e-3 * max(x.float().norm() for x in other.values())
    for name, x in other.items():
        assert (mine[name] - x).norm() <= tolerance * max(x.norm(), floor), name
