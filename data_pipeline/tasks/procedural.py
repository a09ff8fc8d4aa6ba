"""What tasks of made sequences share: items are numbers, and all have one length."""

import hashlib
import json
from dataclasses import asdict
from typing import Any, cast

from data_pipeline.errors import ConfigError


class ProceduralTask:
    """For dataclasses whose samples follow from their options and the item's number."""

    name: str
    train_size: int
    held_out_size: int
    digest: str

    def _settle(self, **least: int) -> None:
        """Checks options against the least that each may be; then their digest.

        Raises:
            ConfigError: one is less, or no number.
        """
        for option, low in (least | {"train_size": 1, "held_out_size": 1}).items():
            if not getattr(self, option) >= low:  # NaN is not
                raise ConfigError(f"task.{option}={getattr(self, option)} must be {low} or more")
        options = [self.name, asdict(cast(Any, self))]
        self.digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()

    def size(self, split: str) -> int:
        return self.train_size if split == "train" else self.held_out_size

    def parts(self, split: str) -> list[tuple[int, int]]:
        return [(self.size(split), 1)]

    def longest(self, split: str) -> int:
        return 0

    def describe(self, split: str, item: int) -> str:
        return f"sequence {item} of {split}"
