"""SideChainNet's pickles, of both layouts, as protein backbones; the package is not needed.

The file is unpickled once, by a child process that trusts nothing in it and has a limit on its
memory, and comes back in batches: this process holds one of them at a time. King and Koes,
SidechainNet, Proteins 89, 1489 (2021).
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from tqdm import tqdm

from data_pipeline.chains import IMPOSSIBLE, Chain, Notes, impossible
from data_pipeline.errors import OptionError, SourceError
from data_pipeline.sources.protein import ProteinSource, file_sha256

ADDRESS = "http://bits.csb.pitt.edu/~jok120/sidechainnet_data"
"""Where sidechainnet 1.0.1 downloads from."""
BLOCK = 1 << 24
"""Bytes downloaded at a time."""
# Threads of a linear algebra library would count against the limit. Memory in large pages and
# pieces makes unpickling some 1.5 times as fast.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
_OTHER = "get the file again, or choose another path"


@dataclass
class SideChainNetSource(ProteinSource):
    """One of SideChainNet's pickles, with its authors' splits."""

    path: Path = Path("sidechainnet_data")
    """The pickle, or the folder that holds it or is to hold it."""
    casp: int | str = 12
    """7 to 12, or `debug`: the edition in a folder."""
    thinning: int | str = 30
    """Largest identity in % between training sequences, of that edition: 30, 50, 70, 90, 95, 100;
    of CASP 12 also `scnmin` and `scnunmin`."""
    sha256: str = ""
    """What the file must hash to; empty: whatever it does."""
    official_split: bool = True
    """train, valid-* and test as they are in the file; else by cluster, as for other sources."""
    memory_gib: Annotated[float, Gt(0), Lt(2**20)] | None = None
    """Limit of the reading process; None: three times the file and 2 GiB."""
    min_length: Annotated[int, Ge(1)] = field(default=1, kw_only=True)
    min_complete: Annotated[float, Ge(0), Le(1)] = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.official_split and (self.clusters or self.max_identity):
            key = "clusters" if self.clusters else "max_identity"
            rule = "its authors' split needs no groups: add official_split=false"
            raise OptionError(key, getattr(self, key), rule)
        known = {f"casp{c}_{t}" for c in range(7, 13) for t in (30, 50, 70, 90, 95, 100)}
        known |= {"debug", "casp12_scnmin", "casp12_scnunmin"}
        edition = "debug" if self.casp == "debug" else f"casp{self.casp}_{self.thinning}"
        if edition not in known:
            rule = (
                f"no such edition with thinning={self.thinning}; casp is 7 to 12 or debug, "
                "thinning 30, 50, 70, 90, 95 or 100"
            )
            raise OptionError("casp", self.casp, rule)
        if edition.startswith("casp12_scn"):
            edition = f"{self.thinning}_ommloss_paper"
        self._name = f"sidechainnet_{edition}.pkl"

    @property
    def file(self) -> Path:
        """The pickle, downloaded if the path is a folder that lacks it."""
        if os.path.isfile(self.path) or self.path.suffix == ".pkl":
            return self.path
        file = self.path / self._name
        if not os.path.exists(file):
            download(f"{ADDRESS}/{self._name}", file)
        return file

    def identity(self) -> dict[str, Any]:
        """Name and sha256 of the pickle, and the rule."""
        return {
            "kind": "sidechainnet",
            "files": {self.file.name: self._hash},
            "official_split": self.official_split,
            **self.rule(),
        }

    def chains(self, notes: Notes) -> Iterator[Chain]:
        """Every chain of every split, shuffled: the file is sorted by length.

        Raises:
            SourceError: the file cannot be opened, has another sha256, is no SideChainNet pickle,
                asks for code, or needs more memory than allowed.
        """
        return self.chosen(self._read(notes), notes, self.file)

    @cached_property
    def _hash(self) -> str:
        """The pickle's sha256; an error if another was asked for."""
        digest = file_sha256(self.file)
        if self.sha256 and digest != self.sha256.lower():
            raise SourceError(
                f"{self.file} has sha256 {digest}, not sha256={self.sha256}; {_OTHER}"
            )
        return digest

    def _read(self, notes: Notes) -> Iterator[Chain]:
        with ThreadPoolExecutor(1) as thread:
            hashed = thread.submit(lambda: self._hash)
            if self.sha256:
                hashed.result()  # before anything in it is looked at
            for header, payload in self._frames():
                yield from self._batch(header, payload, notes)
            hashed.result()

    def _batch(self, header: dict[str, Any], payload: bytearray, notes: Notes) -> Iterator[Chain]:
        ends = np.cumsum(header["lengths"])
        total = int(ends[-1])
        letters = payload[:total].decode()
        xyz = np.frombuffer(payload, np.float32, offset=total).reshape(total, 4, 3)
        wrong = impossible(xyz)
        xyz[wrong] = np.nan
        for place in np.flatnonzero(wrong):
            chain = int(np.searchsorted(ends, place, side="right"))
            first = ends[chain] - header["lengths"][chain]
            notes[IMPOSSIBLE].append(f"{header['ids'][chain]}/{place - first}")
        table = zip(header["ids"], header["splits"], header["lengths"], ends, strict=True)
        for name, split, length, end in table:
            here = slice(end - length, end)
            if self.official_split:
                # Copies are one cluster; to look for relatives takes ten times as long as to read.
                key = blake2b(letters[here].encode(), digest_size=8).hexdigest()
                yield Chain(name, letters[here], xyz[here], cluster=key, split=split)
            else:
                yield Chain(name, letters[here], xyz[here])

    def _frames(self) -> Iterator[tuple[dict[str, Any], bytearray]]:
        """The batches that the reading process sends, with progress on a terminal."""
        done, bar = False, None
        command = [sys.executable, "-m", "data_pipeline.sources.sidechainnet_reader"]
        environment, pipe = os.environ | _ENVIRONMENT, subprocess.PIPE
        try:
            with open(self.file, "rb") as file:
                limit = 3 * os.fstat(file.fileno()).st_size + (2 << 30)
                if self.memory_gib is not None:
                    limit = int(self.memory_gib * 2**30)
                command.append(str(limit))
                reader = subprocess.Popen(
                    command, stdin=file, stdout=pipe, stderr=pipe, env=environment
                )
        except OSError as error:
            raise SourceError(
                f"cannot read path={self.file}: {error.strerror}; give a pickle that you may read, "
                "or a folder to download one into"
            ) from error
        try:
            assert reader.stdout is not None and reader.stderr is not None
            while line := reader.stdout.readline():
                header = json.loads(line)
                payload = bytearray(header["bytes"])
                reader.stdout.readinto(payload)  # pyright: ignore[reportAttributeAccessIssue]
                if "error" in header:
                    raise SourceError(f"{self.file} {_explain(header, limit)}")
                if "residues" in header:
                    bar = _bar("converting", header["residues"], " residues", 1000)
                elif "ids" in header:
                    yield header, payload
                    assert bar is not None
                    bar.update(sum(header["lengths"]))
                done = "done" in header
            if bar is not None:
                bar.close()
            if not done:
                last = reader.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise SourceError(
                    f"the process that reads {self.file} died (code {reader.wait()}): {last}; "
                    f"is there memory for memory_gib={limit / 2**30:.1f}?"
                )
        finally:
            reader.kill()
            reader.communicate()


def download(address: str, file: Path) -> None:
    """Fetches `address` to `file`; what is there is whole.

    Raises:
        SourceError: no network, no such file, no room, or the connection broke.
    """
    draft = file.with_name(f"{file.name}.part-{os.getpid()}")
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            size = int(answer.headers["Content-Length"] or 0)
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as out, _bar("downloading", size, "B", 1024) as bar:
                while block := answer.read(BLOCK):
                    out.write(block)
                    bar.update(len(block))
                if size and out.tell() != size:
                    raise OSError(f"{out.tell()} of {size} bytes came")
        os.replace(draft, file)
    except (OSError, ValueError) as error:  # urllib's are OSError
        raise SourceError(
            f"cannot download {address} to {file}: {error}; fetch it by other means and give "
            "path=<the file>"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def _explain(header: dict[str, Any], limit: int) -> str:
    reason = " ".join(str(header.get("reason", "")).split())[:300]
    return {
        "memory": f"needs more than {limit / 2**30:.1f} GiB to read; raise memory_gib",
        "forbidden": f"asks for {reason}, which no array needs: it is made to run code, or it is "
        f"no SideChainNet file; {_OTHER}",
        "unreadable": f"is no whole pickle ({reason}), perhaps half of a download; {_OTHER}",
        "format": f"is not as SideChainNet writes it: {reason}; {_OTHER}",
    }[header["error"]]


def _bar(what: str, total: int, unit: str, scale: int) -> tqdm:
    """On a terminal only."""
    return tqdm(
        desc=what, total=total, unit=unit, unit_scale=True, unit_divisor=scale, disable=None
    )
