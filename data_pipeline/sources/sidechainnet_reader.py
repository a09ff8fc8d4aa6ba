"""The child process that unpickles a SideChainNet file and passes its backbones on as raw bytes.

python -m data_pipeline.sources.sidechainnet_reader BYTES < FILE        BYTES: limit of its memory

It answers in frames: a line of JSON, then as many bytes as its "bytes" says. The parent never
unpickles anything.
"""

import io
import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipeline.chains import RESIDUES
from data_pipeline.counter_rng import hash64, uniforms
from data_pipeline.sources.batches import batches
from data_pipeline.sources.safe_pickle import ForbiddenName, PickledArray, load

BATCH = 1 << 16
"""Residues of a frame, and those of its last chain."""
FIELDS = ("ids", "seq", "msk", "crd")
SLOTS = {3: 15, 2: 14}
"""Atoms of a residue by the number of axes of crd: (L, 15, 3) since 1.0, (L 14, 3) before."""


class FormatError(Exception):
    """A pickle, but not SideChainNet's; the text says where."""


def main() -> None:
    """Reads standard input, writes frames to standard output."""
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it has no file to write
    try:
        with io.FileIO(0, closefd=False) as raw, io.BufferedReader(raw, 1 << 20) as file:
            data = load(file)
        chains = [
            (split, *chain)
            for split, fields in _splits(data)
            for chain in zip(*(fields[key] for key in FIELDS), strict=True)
        ]
        _send({"residues": sum(len(seq) for _, _, seq, _, _ in chains)})
        # The file is sorted by length; neighbours in a store had better be of any length.
        order = np.argsort(uniforms(hash64("order"), 0, len(chains))[:, 0], kind="stable")
        for batch in batches([chains[place] for place in order], BATCH, letters=2):
            _send_batch(*zip(*batch, strict=True))
        _send({"done": True})
    except MemoryError:
        _send({"error": "memory"})
    except ForbiddenName as error:
        _send({"error": "forbidden", "reason": str(error)})
    except FormatError as error:
        _send({"error": "format", "reason": str(error)})
    except Exception as error:  # a broken pickle raises anything
        _send({"error": "unreadable", "reason": f"{type(error).__name__}: {error}"})


def _splits(data: Any) -> Iterator[tuple[str, dict[str, list]]]:
    """Our name of each split, and its fields."""
    if not isinstance(data, dict):
        raise FormatError(f"it holds a {type(data).__name__}, not a dictionary of splits")
    if not any(isinstance(fields, dict) and "seq" in fields for fields in data.values()):
        raise FormatError("it has no split such as train or test")
    for name, fields in data.items():
        if not isinstance(fields, dict) or "seq" not in fields:
            continue  # settings, date, description
        split = {"train": "train", "test": "test"}.get(name)
        if split is None and str(name).startswith("valid"):
            split = "validation"
        if split is None:
            raise FormatError(f"its split {name!r} is not train, test or valid-...")
        missing = [key for key in FIELDS if not isinstance(fields.get(key), list)]
        if missing:
            raise FormatError(f"its split {name} lacks {', '.join(missing)}")
        if len({len(fields[key]) for key in FIELDS}) > 1:
            raise FormatError(
                f"the fields {', '.join(FIELDS)} of its split {name} differ in length"
            )
        for key in FIELDS[:3]:
            if not all(isinstance(value, str) for value in fields[key]):
                raise FormatError(f"{key} of its split {name} holds something that is no text")
        yield split, fields


def _send_batch(
    splits: tuple[str, ...],
    ids: tuple[str, ...],
    seq: tuple[str, ...],
    msk: tuple[str, ...],
    crd: tuple[Any, ...],
) -> None:
    parts = [_backbone(*chain) for chain in zip(ids, seq, msk, crd, strict=True)]
    letters = "".join(seq)
    unknown = set(letters) - set(RESIDUES + "X")
    if unknown:
        name = next(name for name, s in zip(ids, seq, strict=True) if unknown & set(s))
        raise FormatError(
            f"chain {name} has residue {min(unknown)!r}, which is none of the twenty nor X"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is named below
        xyz = np.concatenate(parts, dtype=np.float32, casting="same_kind")
    hidden = np.frombuffer("".join(msk).encode("ascii", "replace"), np.uint8) == ord("-")
    x, y, z = (xyz[..., axis] for axis in range(3))  # reductions over three numbers are slow
    xyz[((x == 0) & (y == 0) & (z == 0)) | hidden[:, None]] = np.nan
    seen = [np.isfinite(each) for each in (x, y, z)]
    torn = (seen[0] | seen[1] | seen[2]) & ~(seen[0] & seen[1] & seen[2])
    if np.isinf(xyz).any():
        torn = torn | np.isinf(x) | np.isinf(y) | np.isinf(z)
    if torn.any():
        ends = np.cumsum([len(s) for s in seq])
        place = int(np.flatnonzero(torn.any(-1))[0])
        chain = int(np.searchsorted(ends, place, side="right"))
        residue = place - int(ends[chain]) + len(seq[chain])
        values = ", ".join(map(str, xyz[place][torn[place]][0]))
        raise FormatError(f"chain {ids[chain]}, residue {residue}: an atom is at ({values})")
    header = {"splits": splits, "ids": ids, "lengths": [len(s) for s in seq]}
    _send(header, letters.encode(), xyz)


def _backbone(name: str, seq: str, msk: str, crd: Any) -> np.ndarray:
    """(length, 4, 3) of one chain, still as it was pickled."""
    if not isinstance(crd, PickledArray):
        raise FormatError(f"the coordinates of chain {name} are no array")
    try:
        array = crd.numpy()
    except MemoryError:
        raise
    except Exception as error:  # whatever a crafted array leads to
        raise FormatError(f"the coordinates of chain {name}: {error}") from None
    length, slots = len(seq), SLOTS.get(array.ndim, 0)
    shape = (length, slots, 3) if array.ndim == 3 else (length * slots, 3)
    if array.shape != shape or not slots or array.dtype.kind != "f":
        raise FormatError(
            f"the coordinates of chain {name} have shape {array.shape} and dtype {array.dtype}; "
            f"{length} residues need floats ({length}, 15, 3) or ({14 * length}, 3)"
        )
    if len(msk) != length or set(msk) - {"+", "-"}:
        raise FormatError(f"the mask of chain {name} is not {length} signs + or -")
    return array.reshape(length, slots, 3)[:, :4]


def _send(header: dict[str, Any], *parts: Any) -> None:
    size = sum(memoryview(part).nbytes for part in parts)
    out = sys.stdout.buffer
    out.write(json.dumps(header | {"bytes": size}).encode() + b"\n")
    for part in parts:
        out.write(part)
    out.flush()


if __name__ == "__main__":
    main()
