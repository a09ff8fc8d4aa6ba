"""The files of a checkpoint: written by all ranks, read by any number of them.

    checkpoints/step-00000100/
        model-00000.pt ...         parameters and buffers by name: the shards of each rank
        optimizer-00000.pt ...     optimiser state by parameter name: the shards of each rank
        state.json                 step, data cursor, random state, identity of the run, shapes of
                                   parameters and buffers, checksums

Every rank writes into `step-N.tmp`; when all have, the first renames it. Format 1 had one file of
whole tensors of each kind (model.pt, optimizer.pt), and is read as shards that are whole.
"""

import json
import logging
import math
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.disk import sync, write_atomically
from data_pipeline.errors import LongfoldError, RunError
from scaling.engine.shards import PARAMETER, SavedState, Shards

_log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape of a whole tensor."""

FORMAT = 2
MODEL, OPTIMIZER = "model", "optimizer"
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What reading a file that is not as it was written can raise."""


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    return sorted(path for path in folder.glob("step-" + 8 * "[0-9]") if path.is_dir())


def step_of(path: Path) -> int:
    """Of a complete checkpoint."""
    return int(path.name.removeprefix("step-"))


def begin(folder: Path, step: int) -> Path:
    """An empty folder for all ranks to write into; removes what a killed run left."""
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    temporary = folder / f"{_name(step)}.tmp"
    temporary.mkdir()
    return temporary


def write_shards(temporary: Path, rank: int, shards: Shards) -> None:
    """A rank's files, and last of all a note with their checksums."""
    began, size, checksums = time.monotonic(), 0, {}
    for kind in (MODEL, OPTIMIZER):
        content = {
            name: {k: tuple(x) for k, x in own.items() if (k == PARAMETER) == (kind == MODEL)}
            for name, own in shards.items()
        }
        path = temporary / f"{kind}-{rank:05d}.pt"
        with path.open("wb") as file:
            torch.save(content, file)
        sync(path)
        checksums[path.name] = _checksum(path)
        size += path.stat().st_size
    write_atomically(note_of(temporary, rank), json.dumps(checksums))
    seconds = time.monotonic() - began
    _log.info("%s: wrote this rank's part, %d bytes in %.3f s", temporary, size, seconds)


def note_of(temporary: Path, rank: int) -> Path:
    """Where a rank says that its files are written."""
    return temporary / f"rank-{rank:05d}.json"


def publish(temporary: Path, ranks: int, state: Mapping[str, Any]) -> Path:
    """Makes a checkpoint, to which all ranks have written, complete."""
    notes = [note_of(temporary, rank) for rank in range(ranks)]
    checksums = {name: x for note in notes for name, x in json.loads(note.read_text()).items()}
    whole = {"format": FORMAT, **state, "checksums": checksums}
    write_atomically(temporary / "state.json", json.dumps(whole, indent=1))
    for note in notes:
        note.unlink()
    target = temporary.with_suffix("")
    if target.exists():  # damaged: training went on from an older one
        shutil.rmtree(target)
    temporary.rename(target)
    sync(target.parent)
    _log.info("%s is complete", target)
    return target


def newest_whole(
    paths: list[Path],
    *kinds: str,
    rank: int = 0,
    ranks: int = 1,
    ask: Callable[[Callable[[], str]], list[str]] = lambda function: [function()],
) -> tuple[Path | None, str, dict[str, Any], SavedState]:
    """The last of these checkpoints whose files of these kinds are whole, None if there are no
    checkpoints at all; what is wrong with newer ones; state.json; the tensors.

    Args:
        rank, ranks: who checks which files; together they check all.
        ask: gives the answers of all ranks, so that all take the same checkpoint.

    Raises:
        RunError: all are damaged.
    """
    damage = ""
    for path in reversed(paths):
        opened: list[Any] = []
        problem = partial(_open, path, kinds, rank, ranks, opened)
        problems = list(filter(None, ask(problem)))
        if not problems:
            return path, damage, *opened
        damage = damage or f"{path} is damaged ({problems[0]})"
    if damage:
        raise RunError(f"{damage}, and so is every older one: remove {paths[0].parent} and train "
                       "again")  # fmt: skip
    return None, "", {}, SavedState([])


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """What goes wrong while a checkpoint is read, as one line that names it and the way out."""
    try:
        yield
    except LongfoldError:  # says more itself
        raise
    except DAMAGE as error:
        raise RunError(
            f"{folder} is damaged ({_reason(error)}); remove it to go on from an older one"
        ) from error


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(x.shape) for name, x in tensors.items()}


def check_shapes(source: Path, mine: Shapes, theirs: Shapes, fix: str) -> None:
    """Raises RunError, with the way out, if the checkpoint is of other tensors than `mine`."""
    wrong = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if wrong:
        raise RunError(
            f"{source} holds another model: {wrong[0]} has the shape {theirs.get(wrong[0])} there "
            f"and {mine.get(wrong[0])} here ({len(wrong)} tensors differ); {fix}"
        )


def _open(folder: Path, kinds: tuple[str, ...], rank: int, ranks: int, opened: list[Any]) -> str:
    """Adds state and tensors to the list, or says why not."""
    try:
        opened.extend(_read(folder, kinds, rank, ranks))
    except DAMAGE as error:
        return _reason(error)
    return ""


def _read(
    folder: Path, kinds: tuple[str, ...], rank: int, ranks: int
) -> tuple[dict[str, Any], SavedState]:
    """State and tensors; a rank checks its share of the files, and that all elements are there."""
    state = json.loads((folder / "state.json").read_text())
    if not 1 <= state["format"] <= FORMAT:
        raise RunError(f"{folder} has format {state['format']}, this program reads 1 to {FORMAT}")
    if _name(state["step"]) != folder.name:
        raise ValueError(f"state.json is of step {state['step']}")
    checksums = state["checksums"]
    names = sorted(name for name in checksums if name.startswith(kinds))
    for name in names[rank::ranks]:
        if _checksum(folder / name) != checksums[name]:
            raise ValueError(f"the checksum of {name} is wrong")
    contents = {
        name: torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        for name in names
    }
    if state["format"] == 1:
        state["shapes"] = shapes_of(contents["model.pt"])
        contents = {name: _as_shards(name, content) for name, content in contents.items()}
    state["shapes"] = {name: tuple(shape) for name, shape in state["shapes"].items()}
    saved = SavedState(contents.values())
    for name, shape in state["shapes"].items():
        for kind in [PARAMETER, *saved.kinds(name)]:
            count = saved.numel(name, kind)
            if count != math.prod(shape) and (kind == PARAMETER or count != 1):
                raise ValueError(f"{count} elements of {name} ({kind}) of {math.prod(shape)}")
    return state, saved


def _as_shards(name: str, content: dict[str, Any]) -> dict[str, dict[str, tuple[int, Tensor]]]:
    """Format 1, of whole tensors."""

    def shard(x: Tensor) -> tuple[int, Tensor]:
        return 0, x.reshape(-1) if x.ndim else x

    if name.startswith(MODEL):
        return {name: {PARAMETER: shard(x)} for name, x in content.items()}
    return {name: {k: shard(x) for k, x in kept.items()} for name, kept in content.items()}


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _checksum(path: Path) -> int:
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return zlib.crc32(content)


def _name(step: int) -> str:
    return f"step-{step:08d}"
