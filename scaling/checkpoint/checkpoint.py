"""Checkpoints that know neither the number of ranks nor the engine.

Every rank copies and writes the shards that it owns, while training goes on; what a checkpoint is
on disk stands in files.py. A process killed at any moment leaves a complete one. To go on, every
rank reads what it needs of the newest whole one (the run directory must be visible to all, as the
data is): beyond the engine's own state a rank holds the copies of its shards and one tensor.

Random state is one for all ranks: whatever is random for a token is a function of the token.
"""

import base64
import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import RunError
from data_pipeline.stream.stream import Stream
from scaling.checkpoint.files import (
    MODEL,
    OPTIMIZER,
    begin,
    check_shapes,
    complete,
    naming,
    newest_whole,
    note_of,
    publish,
    shapes_of,
    step_of,
    write_shards,
)
from scaling.engine.base import Engine
from scaling.engine.shards import PARAMETER, Shards, shard_of
from scaling.models.pretrained import read_pretrained
from scaling.parallel.collectives import (
    every_rank_says,
    first_rank_gives,
    first_rank_says,
    group_rank,
    group_size,
)

OBJECTIVE = "model."
"""Before the names of a model's tensors, as the trained objective holds it."""
POLL_S = 0.05
"""Between two looks of the first rank for the others' files."""
CLOSE_S = 10.0
"""How long a run that ends waits for files that other ranks may be writing."""


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    keep_last: int = 2
    """How many of the newest are kept, at least 1."""
    keep_best: int = 0
    """How many more, of those with the smallest loss."""
    losses: Callable[[], Mapping[int, float]] = dict
    """Of steps, as far as they are known."""

    def __post_init__(self) -> None:
        self._writing: Future[None] | None = None  # this rank's files
        self._publishing: Future[None] | None = None  # on the first rank
        self._deadline = math.inf

    def save(self, step: int, engine: Engine, stream: Stream, identity: dict[str, Any]) -> None:
        """Copies each rank's shards, and begins to write them; the checkpoint before is complete on
        return. Collective.

        Raises:
            RunError: the one before could not be written, or this one cannot be begun.
        """
        self.wait()
        rank, ranks = group_rank(engine.group), group_size(engine.group)
        buffers = _buffers(engine)
        shards: Shards = engine.state()
        shards |= {name: {PARAMETER: shard_of(x, rank, ranks)} for name, x in buffers.items()}
        state = {
            "step": step,
            "stream": stream.state_dict(),
            "random": _random_state(),
            "identity": identity,
            "shapes": engine.shapes | shapes_of(buffers),
        }
        temporary = first_rank_says(partial(begin, self.folder, step))
        self._deadline = math.inf
        writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing = writer.submit(write_shards, temporary, rank, shards)
        if rank == 0:
            own = self._writing
            self._publishing = writer.submit(self._publish, own, temporary, ranks, state)
        writer.shutdown(wait=False)

    @property
    def failed(self) -> bool:
        """Whether what this rank was writing could not be written; `wait` says why."""
        return any(
            each is not None and each.done() and each.exception() is not None
            for each in (self._writing, self._publishing)
        )

    def wait(self) -> None:
        """Until what was saved last is complete. Collective.

        Raises:
            RunError: a rank could not write.
        """
        writing, self._writing = self._writing, None
        publishing, self._publishing = self._publishing, None
        if writing is not None:
            try:
                every_rank_says(writing.result)
            except BaseException:
                self._deadline = 0.0
                raise
            first_rank_says(lambda: publishing and publishing.result())

    def close(self) -> None:
        """Lets this rank end what it is writing; whether that succeeds is not said."""
        self._deadline = min(self._deadline, time.monotonic() + CLOSE_S)
        for each in (self._writing, self._publishing):
            if each is not None:
                each.exception()

    def load(self, engine: Engine, stream: Stream) -> tuple[int, str]:
        """Goes on from the newest whole checkpoint, if there is one. Collective.

        Returns:
            Its step, else 0, and what is wrong with newer ones, if anything.

        Raises:
            RunError: all are damaged, or it belongs to another model or other data.
        """
        paths = first_rank_says(partial(complete, self.folder))
        ranks = {"rank": group_rank(engine.group), "ranks": group_size(engine.group)}
        path, damage, state, saved = newest_whole(
            paths, MODEL, OPTIMIZER, **ranks, ask=every_rank_says
        )
        if path is None:
            return 0, ""
        buffers = _buffers(engine)
        fix = "use the model options that wrote it, or another name=..."
        check_shapes(path, engine.shapes | shapes_of(buffers), state["shapes"], fix)
        engine.load_state(saved)
        for name, buffer in buffers.items():
            buffer.copy_(saved.read(name, PARAMETER).view(buffer.shape))
        with naming(path):
            stream.load_state_dict(state["stream"])
            _set_random_state(state["random"])
        return state["step"], damage

    def _publish(
        self, own: Future[None], temporary: Path, ranks: int, state: dict[str, Any]
    ) -> None:
        """Makes the checkpoint complete when all ranks have written, and removes older ones."""
        own.result()
        for rank in range(ranks):
            while not note_of(temporary, rank).exists():
                if time.monotonic() > self._deadline:
                    raise RunError(f"rank {rank} did not write its part of {temporary}")
                time.sleep(POLL_S)
        publish(temporary, ranks, state)
        *older, _ = complete(self.folder)
        loss = self.losses()
        evaluated = [path for path in older if step_of(path) in loss]
        best = sorted(evaluated, key=lambda path: loss[step_of(path)])[: self.keep_best]
        for old in older[: max(len(older) + 1 - self.keep_last, 0)]:
            if old not in best:
                shutil.rmtree(old)


def load_model(folder: Path, model: nn.Module, digest: str | None, fix: str) -> tuple[int, str]:
    """Fills a model, on every rank, from the newest checkpoint of a run whose model is whole, also
    while the run goes on. Collective; only the first rank reads.

    Args:
        digest: of the data that the run must have been trained on; None: whatever it was.
        fix: the way out where the checkpoint's model has other shapes.

    Returns:
        Its step, and what is wrong with newer ones, if anything.

    Raises:
        RunError: there is none, all are damaged, or the newest belongs to another model or data.
    """

    def read() -> tuple[int, str]:
        path, damage, state, saved = newest_whole(complete(folder), MODEL)
        if path is None:
            raise RunError(f"{folder.parent} has no checkpoint yet: a run that trains saves one "
                           "every train.save_every steps")  # fmt: skip
        with naming(path):
            trained_on = state["stream"]["digest"]
        _check_digest(path, trained_on, digest)
        shapes = {name.removeprefix(OBJECTIVE): shape for name, shape in state["shapes"].items()}
        mine = model.state_dict()
        check_shapes(path, shapes_of(mine), shapes, fix)
        for saved_as in state["shapes"]:
            tensor = mine[saved_as.removeprefix(OBJECTIVE)]
            tensor.copy_(saved.read(saved_as, PARAMETER).view(tensor.shape))
        return state["step"], damage

    answer = first_rank_says(read)
    first_rank_gives(model.state_dict().values())
    return answer


def load_exported(folder: Path, model: nn.Module, digest: str | None, fix: str) -> int:
    """The same from what `export` wrote. Returns the step."""

    def read() -> int:
        saved = read_pretrained(folder)
        _check_digest(folder, saved.config["digest"], digest)
        check_shapes(folder, shapes_of(model.state_dict()), shapes_of(saved.weights), fix)
        model.load_state_dict(saved.weights)
        return saved.config["step"]

    step = first_rank_says(read)
    first_rank_gives(model.state_dict().values())
    return step


def _check_digest(source: Path, trained_on: str, digest: str | None) -> None:
    if digest not in (None, trained_on):
        raise RunError(f"{source} was trained on other data than the task's store holds now: "
                       "restore it, or choose data by store=...")  # fmt: skip


def _buffers(engine: Engine) -> dict[str, Tensor]:
    """What the module saves besides its parameters."""
    state = engine.module.state_dict()
    return {name: x for name, x in state.items() if name not in engine.parameters}


def _random_state() -> dict[str, str]:
    """PyTorch's generators, as text."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(x.numpy().tobytes()).decode() for name, x in state.items()}


def _set_random_state(state: dict[str, str]) -> None:
    """Restores those generators that are there now as well."""
    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in state.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
