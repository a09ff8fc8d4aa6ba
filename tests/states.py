"""Training states put together again, for comparison."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from scaling.checkpoint.files import MODEL, OPTIMIZER, newest_whole
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
