"""What sources share: which chains become samples, and the hashes of their files."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from data_pipeline.chains import Chain, Notes, describe
from data_pipeline.errors import OptionError, SourceError
from data_pipeline.options import check_options


@dataclass(kw_only=True)
class ProteinSource:
    """What all sources of proteins can be asked for. What is left out is noted by name."""

    min_length: Annotated[int, Ge(1)] = 30
    """Residues; shorter chains are left out."""
    max_length: int | None = None
    """Residues; longer chains are left out; None: no limit."""
    min_complete: Annotated[float, Ge(0), Le(1)] = 0.9
    """Share of residues with all four atoms; chains with less are left out. At 0 a chain still
    needs one atom."""
    clusters: Path | None = None
    """See store/grouping.py, as max_identity: which of them the split never parts."""
    max_identity: float | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_length is not None and self.max_length < self.min_length:
            rule = f"below min_length={self.min_length}: no chain is both"
            raise OptionError("max_length", self.max_length, rule)

    def chosen(self, chains: Iterable[Chain], notes: Notes, source: object) -> Iterator[Chain]:
        """The chains that pass.

        Raises:
            SourceError: none does; says why each kind was left out.
        """
        count = 0
        for chain in chains:
            name, length = chain.id, len(chain.sequence)
            complete = float(chain.complete.mean()) if self.min_complete else 1.0
            if length < self.min_length:
                notes.leave_out(f"chains shorter than {self.min_length} residues", name, length)
            elif self.max_length is not None and length > self.max_length:
                notes.leave_out(f"chains longer than {self.max_length} residues", name, length)
            elif not np.isfinite(chain.xyz).any():
                notes.leave_out("chains without a single observed atom", name, length)
            elif complete < self.min_complete:
                reason = f"chains with less than {self.min_complete:.0%} complete residues"
                notes.leave_out(reason, f"{name} ({complete:.0%})", length)
            else:
                count += 1
                yield chain
        if not count:
            raise SourceError(f"{source} holds no usable protein chain: {describe(notes)}")

    def rule(self) -> dict[str, Any]:
        """Which chains, as JSON."""
        return {key: getattr(self, key) for key in ("min_length", "max_length", "min_complete")}


def file_sha256(path: Path) -> str:
    """Of a source's file.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}; correct path, or that file's permissions"
        ) from error
