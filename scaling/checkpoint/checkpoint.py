"""Checkpoints that know neither the number of ranks nor the engine.

    checkpoints/latest             the name of the newest complete one
    checkpoints/step-00000100/
        model.pt                   parameters and buffers by name, whole
        optimizer.pt               optimiser state by parameter name, whole
        state.json                 step, data cursor, random state, identity of the run, checksums

The first rank writes, into `step-N.tmp`; once it is on disk it is renamed, `latest` is replaced,
and only then are older ones deleted: a process killed at any moment leaves a complete one. Every
rank reads (the run directory must be visible to all, as the data is).

Random state is one for all ranks: whatever is random for a token is a function of the token.
"""

import base64
import json
import re
import shutil
import zlib
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from data_pipeline.disk import sync, write_atomically
from data_pipeline.errors import LongfoldError, RunError
from scaling.engine.base import Engine
from scaling.parallel.collectives import first_rank_says

FORMAT = 1
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What reading a file that is not as it was written can raise."""


@runtime_checkable
class Resumable(Protocol):
    """What knows its place: the stream of training data."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    keep: int
    """How many are kept, at least 1."""

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint. Only the first rank's answer counts."""
        latest = self.folder / "latest"
        if not latest.exists():
            return None
        name = latest.read_text(errors="replace").strip()
        if not re.fullmatch(r"step-\d{8}", name):
            wrong = f"holds {name[:40]!r}, not the name of a checkpoint"
        elif not (self.folder / name).is_dir():
            wrong = f"names {name}, which is not there"
        else:
            return int(name.removeprefix("step-"))
        raise RunError(f"{latest} {wrong}; {_way_out(self.folder)}")

    def save(self, step: int, engine: Engine, stream: Resumable, identity: dict[str, Any]) -> None:
        """Writes a checkpoint of all ranks. Collective; it is complete on return."""
        parameters, optimizer = engine.state()
        buffers = {name: value.cpu() for name, value in _buffers(engine).items()}
        state = {
            "format": FORMAT,
            "step": step,
            "stream": stream.state_dict(),
            "random": random_state(),
            "identity": identity,
        }
        first_rank_says(lambda: self._write(step, parameters | buffers, optimizer, state))

    def load(self, engine: Engine, stream: Resumable) -> int:
        """Goes on from the newest checkpoint, if there is one. Returns its step, else 0.

        Raises:
            RunError: it is damaged, or belongs to another model or other data.
        """
        step = first_rank_says(self.latest_step)
        if step is None:
            return 0
        folder = self.folder / _name(step)
        state, model, optimizer = _read(folder)
        _check_names(folder, model, engine)
        engine.load_state(model, optimizer)
        for name, buffer in _buffers(engine).items():
            buffer.copy_(model[name])
        try:
            stream.load_state_dict(state["stream"])
            set_random_state(state["random"])
        except LongfoldError:  # says more itself
            raise
        except DAMAGE as error:
            raise _damaged(folder, error) from error
        return step

    def _write(self, step: int, model: Any, optimizer: Any, state: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):  # of a killed process
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        target = self.folder / _name(step)
        temporary = target.with_suffix(".tmp")
        temporary.mkdir()
        checksums = {}
        for name, content in (("model.pt", model), ("optimizer.pt", optimizer)):
            with (temporary / name).open("wb") as file:
                torch.save(content, file)
            sync(temporary / name)
            checksums[name] = _checksum(temporary / name)
        write_atomically(
            temporary / "state.json", json.dumps(state | {"checksums": checksums}, indent=1)
        )
        if target.exists():  # the same step again, after a resumed run was rolled back
            shutil.rmtree(target)
        temporary.rename(target)
        sync(self.folder)
        write_atomically(self.folder / "latest", target.name + "\n")
        for name in _complete(self.folder)[: -max(self.keep, 1)]:
            shutil.rmtree(self.folder / name)


def _complete(folder: Path) -> list[str]:
    """Names of the complete checkpoints, the oldest first."""
    return sorted(path.name for path in folder.glob("step-" + 8 * "[0-9]") if path.is_dir())


def _way_out(folder: Path, damaged: str = "") -> str:
    others = [name for name in _complete(folder) if name != damaged]
    write = f"write {others[-1]!r} into {folder / 'latest'}, or " if others else ""
    return f"{write}remove {folder.parent} to start anew"


def _buffers(engine: Engine) -> dict[str, Tensor]:
    """What the module saves besides its parameters."""
    state = engine.module.state_dict()
    return {name: x for name, x in state.items() if name not in engine.parameters}


def random_state() -> dict[str, str]:
    """PyTorch's generators, as text."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(x.numpy().tobytes()).decode() for name, x in state.items()}


def set_random_state(state: dict[str, str]) -> None:
    """Restores those generators that are there now as well."""
    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in state.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    try:
        state = json.loads((folder / "state.json").read_text())
        if state["format"] != FORMAT:
            raise RunError(f"{folder} has format {state['format']}, this program reads {FORMAT}")
        if _name(state["step"]) != folder.name:
            raise ValueError(f"state.json is of step {state['step']}")
        for name, checksum in state["checksums"].items():
            if _checksum(folder / name) != checksum:
                raise ValueError(f"the checksum of {name} is wrong")
        model, optimizer = (
            torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            for name in ("model.pt", "optimizer.pt")
        )
    except RunError:
        raise
    except DAMAGE as error:
        raise _damaged(folder, error) from error
    return state, model, optimizer


def _damaged(folder: Path, error: Exception) -> RunError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    way_out = _way_out(folder.parent, damaged=folder.name)
    return RunError(f"the checkpoint {folder} is damaged ({reason}); {way_out}")


def _check_names(folder: Path, saved: dict[str, Tensor], engine: Engine) -> None:
    """Raises RunError if the checkpoint is of other tensors than the engine's module has."""
    mine = engine.shapes | {name: tuple(x.shape) for name, x in _buffers(engine).items()}
    theirs = {name: tuple(x.shape) for name, x in saved.items()}
    wrong = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if wrong:
        raise RunError(
            f"{folder} holds another model: {wrong[0]} has the shape {theirs.get(wrong[0])} there "
            f"and {mine.get(wrong[0])} here ({len(wrong)} tensors differ); use the model options "
            "that wrote it, or another name=..."
        )


def _checksum(path: Path) -> int:
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return zlib.crc32(content)


def _name(step: int) -> str:
    return f"step-{step:08d}"
