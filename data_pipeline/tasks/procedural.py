"""What tasks of made sequences share: items are numbers, and all have one length."""

import hashlib
import json
from dataclasses import asdict
from typing import Any, ClassVar, cast

import numpy as np

from data_pipeline.options import check_options


class ProceduralTask:
    """For dataclasses whose samples follow from their options and the item's number."""

    name: str
    train_size: int
    held_out_size: int
    digest: str
    came_later: ClassVar[dict[str, Any]] = {}
    """Options that earlier versions had not, and what those did: with it, their runs go on."""

    def _settle(self) -> None:
        """Checks the options; then their digest.

        Raises:
            OptionError: one breaks the bounds at its field.
        """
        check_options(self)
        text = json.dumps([self.name, self.options()])
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def options(self) -> dict[str, Any]:
        """What the samples follow from."""
        options = asdict(cast(Any, self))
        return {k: v for k, v in options.items() if (k, v) not in self.came_later.items()}

    def read_out(self, scalars: np.ndarray) -> dict[str, Any]:
        """What answers, and at which tokens, if not the points at all of them."""
        return {}

    def size(self, split: str) -> int:
        return self.train_size if split == "train" else self.held_out_size

    def parts(self, split: str) -> list[tuple[int, int]]:
        return [(self.size(split), 1)]

    def longest(self, split: str) -> int:
        return 0

    def describe(self, split: str, item: int) -> str:
        return f"sequence {item} of {split}"
