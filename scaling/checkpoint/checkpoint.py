"""Checkpoints that know neither the number of ranks nor the engine.

    checkpoints/step-00000100/
        model.pt                   parameters and buffers by name, whole
        optimizer.pt               optimiser state by parameter name, whole
        state.json                 step, data cursor, random state, identity of the run, checksums

While training goes on the first rank writes into `step-N.tmp`; once on disk it is renamed, and
only then are older ones deleted: a process killed at any moment leaves a complete one. To go on
every rank reads the newest whole one (the run directory must be visible to all, as the data is).

Random state is one for all ranks: whatever is random for a token is a function of the token.
"""

import base64
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.disk import sync, write_atomically
from data_pipeline.errors import LongfoldError, RunError
from data_pipeline.stream.stream import Stream
from scaling.engine.base import Engine, on_cpu
from scaling.models.pretrained import read_pretrained
from scaling.parallel.collectives import first_rank_gives, first_rank_says

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape of a whole tensor."""

FORMAT = 1
FILES = ("model.pt", "optimizer.pt")
OBJECTIVE = "model."
"""Before the names of a model's tensors, as the trained objective holds it."""
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What reading a file that is not as it was written can raise."""


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
        self._writing: Future[None] | None = None  # on the first rank

    def save(self, step: int, engine: Engine, stream: Stream, identity: dict[str, Any]) -> None:
        """Copies the state of all ranks, and begins to write it; the one before is complete on
        return. Collective.

        Raises:
            RunError: the one before could not be written.
        """
        self.wait()
        parameters, optimizer = engine.state()
        buffers = {name: on_cpu(value) for name, value in _buffers(engine).items()}
        state = {
            "format": FORMAT,
            "step": step,
            "stream": stream.state_dict(),
            "random": _random_state(),
            "identity": identity,
        }
        first_rank_says(lambda: self._begin(step, parameters | buffers, optimizer, state))

    @property
    def failed(self) -> bool:
        """Whether what this rank was writing could not be written; `wait` says why."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Until what was saved last is complete. Collective.

        Raises:
            RunError: it could not be written.
        """
        first_rank_says(self._end)

    def close(self) -> None:
        """Lets this rank end what it is writing; whether that succeeds is not said."""
        if self._writing is not None:
            self._writing.exception()

    def load(self, engine: Engine, stream: Stream) -> tuple[int, str]:
        """Goes on from the newest whole checkpoint, if there is one. Collective.

        Returns:
            Its step, else 0, and what is wrong with newer ones, if anything.

        Raises:
            RunError: all are damaged, or it belongs to another model or other data.
        """
        folder, damage = first_rank_says(lambda: _newest_whole(self.folder, *FILES)[:2])
        if folder is None:
            return 0, ""
        with _naming(folder):
            state, (model, optimizer) = _read(folder, *FILES)
        mine = engine.shapes | _shapes(_buffers(engine))
        fix = "use the model options that wrote it, or another name=..."
        _check_shapes(folder, mine, model, fix)
        engine.load_state(model, optimizer)
        for name, buffer in _buffers(engine).items():
            buffer.copy_(model[name])
        with _naming(folder):
            stream.load_state_dict(state["stream"])
            _set_random_state(state["random"])
        return state["step"], damage

    def _begin(self, *content: Any) -> None:
        writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing = writer.submit(self._write, *content)
        writer.shutdown(wait=False)

    def _end(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, model: Any, optimizer: Any, state: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):  # of a killed process
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        target = self.folder / _name(step)
        temporary = target.with_suffix(".tmp")
        temporary.mkdir()
        checksums = {}
        for name, content in zip(FILES, (model, optimizer), strict=True):
            with (temporary / name).open("wb") as file:
                torch.save(content, file)
            sync(temporary / name)
            checksums[name] = _checksum(temporary / name)
        write_atomically(
            temporary / "state.json", json.dumps(state | {"checksums": checksums}, indent=1)
        )
        if target.exists():  # damaged: training went on from an older one
            shutil.rmtree(target)
        temporary.rename(target)
        sync(self.folder)
        *older, _ = _complete(self.folder)
        loss = self.losses()
        evaluated = [path for path in older if _step(path) in loss]
        best = sorted(evaluated, key=lambda path: loss[_step(path)])[: self.keep_best]
        for old in older[: len(older) + 1 - self.keep_last]:
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
        path, damage, state, saved = _newest_whole(folder, "model.pt")
        if path is None:
            raise RunError(f"{folder.parent} has no checkpoint yet: a run that trains saves one "
                           "every train.save_every steps")  # fmt: skip
        with _naming(path):
            trained_on = state["stream"]["digest"]
        if digest not in (None, trained_on):
            raise RunError(f"{path} was trained on other data than the task's store holds now: "
                           "restore it, or choose data by store=...")  # fmt: skip
        weights = {name.removeprefix(OBJECTIVE): x for name, x in saved[0].items()}
        _check_shapes(path, _shapes(model.state_dict()), weights, fix)
        model.load_state_dict(weights)
        return state["step"], damage

    answer = first_rank_says(read)
    first_rank_gives(model.state_dict().values())
    return answer


def load_exported(folder: Path, model: nn.Module, digest: str | None, fix: str) -> int:
    """The same from what `export` wrote. Returns the step."""

    def read() -> int:
        saved = read_pretrained(folder)
        if digest not in (None, saved.config["digest"]):
            raise RunError(f"{folder} was trained on other data than the task's store holds now: "
                           "restore it, or choose data by store=...")  # fmt: skip
        _check_shapes(folder, _shapes(model.state_dict()), saved.weights, fix)
        model.load_state_dict(saved.weights)
        return saved.config["step"]

    step = first_rank_says(read)
    first_rank_gives(model.state_dict().values())
    return step


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints, the oldest first."""
    return sorted(path for path in folder.glob("step-" + 8 * "[0-9]") if path.is_dir())


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _newest_whole(
    folder: Path, *names: str
) -> tuple[Path | None, str, dict[str, Any], list[dict[str, Any]]]:
    """The newest checkpoint whose state and files of these names are whole, None if there is no
    checkpoint at all; what is wrong with newer ones; state and files.

    Raises:
        RunError: all are damaged.
    """
    damage = ""
    for path in reversed(_complete(folder)):
        try:
            return path, damage, *_read(path, *names)
        except DAMAGE as error:
            damage = damage or f"{path} is damaged ({_reason(error)})"
    if damage:
        raise RunError(f"{damage}, and so is every older one: remove {folder.parent} and train "
                       "again")  # fmt: skip
    return None, "", {}, []


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """What goes wrong while a checkpoint is read, as one line that names it and the way out."""
    try:
        yield
    except LongfoldError:  # says more itself
        raise
    except DAMAGE as error:
        raise RunError(
            f"{folder} is damaged ({_reason(error)}); remove it to go on from an older one"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


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


def _read(folder: Path, *names: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """State, and what some files hold."""
    state = json.loads((folder / "state.json").read_text())
    if state["format"] != FORMAT:
        raise RunError(f"{folder} has format {state['format']}, this program reads {FORMAT}")
    if _name(state["step"]) != folder.name:
        raise ValueError(f"state.json is of step {state['step']}")
    for name in names:
        if _checksum(folder / name) != state["checksums"][name]:
            raise ValueError(f"the checksum of {name} is wrong")
    load = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
    return state, [load(folder / name) for name in names]


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(x.shape) for name, x in tensors.items()}


def _check_shapes(folder: Path, mine: Shapes, saved: Mapping[str, Tensor], fix: str) -> None:
    """Raises RunError, with the way out, if the checkpoint is of other tensors than `mine`."""
    theirs = _shapes(saved)
    wrong = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if wrong:
        raise RunError(
            f"{folder} holds another model: {wrong[0]} has the shape {theirs.get(wrong[0])} there "
            f"and {mine.get(wrong[0])} here ({len(wrong)} tensors differ); {fix}"
        )


def _checksum(path: Path) -> int:
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return zlib.crc32(content)


def _name(step: int) -> str:
    return f"step-{step:08d}"
