"""Which chains of a source become samples, and which residues of them were observed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from data_pipeline.chains import LONGEST_BOND, Chain, Notes, describe, norms
from data_pipeline.errors import ConfigError, SourceError

SHORTEST_BOND = 1.0
"""Å; a residue whose N-CA or CA-C is not from here to LONGEST_BOND was not observed so."""
IMPOSSIBLE = (
    f"residues with impossible bonds (N-CA or CA-C not {SHORTEST_BOND} to {LONGEST_BOND} Å), "
    "read as missing"
)


@dataclass(frozen=True)
class Selection:
    """Which chains of a source become samples. What is left out is noted by name."""

    min_length: int = 30
    """Residues; shorter chains are left out."""
    max_length: int | None = None
    """Residues; longer chains are left out; None: no limit."""
    min_complete: float = 0.9
    """Share of residues with all four atoms; chains with less are left out. At 0 a chain still
    needs one atom."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_complete <= 1:
            raise ConfigError(f"source.min_complete={self.min_complete} must be in [0, 1]")
        if self.min_length < 1:
            raise ConfigError(f"source.min_length={self.min_length} must be 1 or more")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ConfigError(
                f"source.max_length={self.max_length} is below "
                f"source.min_length={self.min_length}: no chain is both"
            )

    def chosen(self, chains: Iterable[Chain], notes: Notes, source: object) -> Iterator[Chain]:
        """The chains that pass.

        Raises:
            SourceError: none does; says why each kind was left out.
        """
        count = 0
        for chain in chains:
            length = len(chain.sequence)
            complete = float(chain.complete.mean()) if self.min_complete else 1.0
            if length < self.min_length:
                notes[f"chains shorter than {self.min_length} residues"].append(chain.id)
            elif self.max_length is not None and length > self.max_length:
                notes[f"chains longer than {self.max_length} residues"].append(chain.id)
            elif not np.isfinite(chain.xyz).any():
                notes["chains without a single observed atom"].append(chain.id)
            elif complete < self.min_complete:
                notes[f"chains with less than {self.min_complete:.0%} complete residues"].append(
                    f"{chain.id} ({complete:.0%})"
                )
            else:
                count += 1
                yield chain
        if not count:
            raise SourceError(f"{source} holds no usable protein chain: {describe(notes)}")

    def identity(self) -> dict[str, Any]:
        """The rule as JSON."""
        return {
            "min_length": self.min_length,
            "max_length": self.max_length,
            "min_complete": self.min_complete,
        }


def impossible(xyz: Float32[np.ndarray, "length 4 3"]) -> Bool[np.ndarray, " length"]:
    """Residues whose N-CA or CA-C is no bond's length; a missing atom has no bond."""
    first, second = norms(xyz[:, 1] - xyz[:, 0]), norms(xyz[:, 2] - xyz[:, 1])
    wrong = (first < SHORTEST_BOND) | (first > LONGEST_BOND)
    return wrong | (second < SHORTEST_BOND) | (second > LONGEST_BOND)
