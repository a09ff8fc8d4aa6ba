"""What tasks of made sequences share: items are numbers, and all have one length."""

from dataclasses import asdict
from typing import Any, ClassVar, cast

import numpy as np

from data_pipeline.options import check_options
from data_pipeline.tasks.protocol import Task


class ProceduralTask(Task):
    """For dataclasses whose samples follow from their options and the item's number."""

    tokens: int
    """Length of every sequence."""
    train_size: int
    held_out_size: int
    came_later: ClassVar[dict[str, Any]] = {}
    """Options that earlier versions had not, and what those did: with it, their runs go on."""

    def _settle(self) -> None:
        """Checks the options; then their digest.

        Raises:
            OptionError: one breaks the bounds at its field.
        """
        check_options(self)
        self.digest = self.hash(self.options())

    def options(self) -> dict[str, Any]:
        """What the samples follow from."""
        options = asdict(cast(Any, self))
        return {k: v for k, v in options.items() if (k, v) not in self.came_later.items()}

    def read_out(self, scalars: np.ndarray) -> dict[str, Any]:
        """What answers, and at which tokens, if not the points at all of them."""
        return {}

    def lengths(self, split: str) -> np.ndarray:
        return np.broadcast_to(
            self.tokens, self.train_size if split == "train" else self.held_out_size
        )
