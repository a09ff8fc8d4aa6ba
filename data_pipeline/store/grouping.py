"""The rules by which chains fall into groups that the split never parts.

Shared 4-mers find sequences of about 75 % identity and more. What is less alike has to come from a
program made for it: its clusters as a file, or MMseqs2 itself.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Lt
from jaxtyping import Int, UInt8

from data_pipeline.chains import ATOMS, Chain, Notes, fasta
from data_pipeline.errors import ConfigError, OptionError, SourceError
from data_pipeline.options import check_options
from data_pipeline.store import clusters

SHARED_4MERS = (
    f"more than {clusters.CONTAINMENT:.0%} of the smaller sequence's 4-mers shared "
    "(about 75 % identity)"
)


@dataclass(frozen=True)
class GroupedSource:
    """A source, and what beside like sequences puts two of its chains into one group."""

    source: Any
    clusters: Path | None = None
    """Groups as MMseqs2 and Foldseek write them: two columns, a representative and a member."""
    max_identity: Annotated[float, Gt(0), Lt(1)] | None = None
    """Sequences that mmseqs easy-cluster finds alike at this identity."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_identity is not None and self.clusters is not None:
            raise OptionError("max_identity", self.max_identity, "give it or clusters, not both")
        if self.max_identity is not None and shutil.which("mmseqs") is None:
            rule = "needs the program mmseqs: apt-get install mmseqs2, or give groups as clusters"
            raise OptionError("max_identity", self.max_identity, rule)
        if self.clusters is not None:
            self._table()  # or it raises

    @property
    def atoms(self) -> tuple[str, ...]:
        """Names of the second axis of xyz."""
        return tuple(getattr(self.source, "atoms", ATOMS))

    def identity(self) -> dict[str, Any]:
        """The source's, and the rule if it is not the default."""
        rule: dict[str, Any] = {"max_identity": self.max_identity} if self.max_identity else {}
        if self.clusters is not None:
            rule = {"clusters": hashlib.sha256(self._text().encode()).hexdigest()}
        return self.source.identity() | rule

    def chains(self, notes: Notes) -> Iterable[Chain]:
        return self.source.chains(notes)

    @property
    def rule(self) -> str:
        """One line for the manifest."""
        if self.clusters is not None:
            return f"groups of {self.clusters}; of chains that it does not name: {SHARED_4MERS}"
        if self.max_identity is not None:
            return f"mmseqs easy-cluster at {self.max_identity:.0%} identity, or {SHARED_4MERS}"
        return SHARED_4MERS

    def groups(
        self,
        residue: UInt8[np.ndarray, " residues"],
        offsets: Int[np.ndarray, " ends"],
        names: Sequence[str],
        keys: Sequence[str | None],
        notes: Notes,
    ) -> Int[np.ndarray, " chains"]:
        """The group of each chain, numbered by their first members; equal keys are together."""
        if self.clusters is not None:
            keys = self._named(names, keys, notes)
        groups = clusters.cluster(residue, offsets, keys)
        if self.max_identity is not None:
            for one, other in _mmseqs(residue, offsets, self.max_identity):
                clusters.join(groups, one, np.array([other]))
            groups = np.unique(groups, return_inverse=True)[1]
        return groups

    def _named(
        self, names: Sequence[str], keys: Sequence[str | None], notes: Notes
    ) -> list[str | None]:
        """The keys, replaced by the file's group where it has one."""
        table = self._table()
        used, chosen = set(), []
        for name, key in zip(names, keys, strict=True):
            found = next((alias for alias in _aliases(name) if alias in table), None)
            if found is None:
                notes[f"chains that {self.clusters} does not name"].append(name)
            used.add(found)
            chosen.append(key if found is None else f"group of {table[found]}")
        if missing := [member for member in table if member not in used]:
            notes[f"names in {self.clusters} that no chain has"] += missing
        return chosen

    def _table(self) -> dict[str, str]:
        """Member -> representative."""
        table = {}
        for number, line in enumerate(self._text().splitlines(), 1):
            columns = line.split("\t") if "\t" in line else line.split()
            if len(columns) != 2:
                raise SourceError(
                    f"{self.clusters} line {number} has {len(columns)} columns, not two: a "
                    "representative and a member, as MMseqs2 and Foldseek write them"
                )
            # Foldseek keeps the suffix of the file's name before the chain's.
            group, member = (
                re.sub(r"\.(pdb\d?|ent|cif|mmcif)(\.gz)?(?=_|$)", "", column.strip())
                for column in columns
            )
            if table.setdefault(member, group) != group:
                raise SourceError(f"{self.clusters} line {number}: {member} is in two groups")
        return table

    def _text(self) -> str:
        assert self.clusters is not None
        try:
            return self.clusters.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise OptionError("clusters", self.clusters, f"cannot be read: {reason}") from error


def _aliases(name: str) -> Iterator[str]:
    """Under which names others may know a chain: its own, or `file_chain` as Foldseek does."""
    plain = re.sub(r"\s", "_", name)
    yield from (name, plain)
    plain = re.sub(r"/model-[^/]*$", "", plain)
    yield from (plain, "_".join(plain.rsplit("/", 2)[-2:]), plain.rpartition("/")[0])


def _mmseqs(residue: np.ndarray, offsets: np.ndarray, identity: float) -> list[tuple[int, int]]:
    """Pairs of a representative and a member, by number.

    Raises:
        ConfigError: the program failed; says what it said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/in.fasta", "w") as file:
            for chain in range(len(offsets) - 1):
                file.write(
                    fasta(str(chain), np.asarray(residue[offsets[chain] : offsets[chain + 1]]))
                )
        command = ["mmseqs", "easy-cluster", "in.fasta", "out", "tmp"]
        # Connected components of all alignments over half of both sequences.
        command += ["--min-seq-id", str(identity), "-c", "0.5", "--cluster-mode", "1"]
        command += ["--single-step-clustering", "1", "-s", "7.5", "-v", "1"]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if ended.returncode:
            last = " ".join((ended.stderr or ended.stdout).split())[-300:]
            raise ConfigError(f"mmseqs easy-cluster failed with {ended.returncode}: {last}")
        lines = Path(folder, "out_cluster.tsv").read_text().splitlines()
    return [(int(one), int(other)) for one, other in map(str.split, lines)]
