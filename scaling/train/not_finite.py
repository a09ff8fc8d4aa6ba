"""What becomes of a step whose loss or gradient is not finite: `train.not_finite`.

Either way nothing moves, and a row of split `not_finite` says which samples were in it:
    what, value     "loss" or "gradient norm", and what it was, as text
    samples         names of those whose loss is not finite, NAMED at most; of all of the step where
                    each loss is finite and the gradient alone is not
    among           how many those are
    ranks           whose part of the loss is not finite
"""

import math
from collections.abc import Sequence

from torch import Tensor

from data_pipeline.errors import RunError
from scaling.parallel.collectives import every_rank_says, first_rank_says
from scaling.runs.folder import RunFolder
from scaling.runs.rows import NOT_FINITE, Row, of_split
from scaling.train.settings import OptimSettings, TrainSettings

IN_A_ROW = 10
"""Steps left out one after another that end a run: it does not learn any more."""
NAMED = 8


def not_finite_row(
    step: int, loss: float, norm: float, losses: Sequence[Tensor], names: Sequence[Sequence[str]]
) -> Row:
    """The row of such a step. Collective; it waits for the device.

    Args:
        losses: this rank's loss sum of each row, by micro-batch.
        names: what those rows are called.
    """
    what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
    own = [name for rows in names for name in rows]
    finite = [x for each in losses for x in each.isfinite().tolist()]
    bad = [name for name, fine in zip(own, finite, strict=True) if not fine]
    said = every_rank_says(lambda: (bad, own))
    ranks = [rank for rank, (wrong, _) in enumerate(said) if wrong]
    samples = list(dict.fromkeys(x for wrong, all_of_them in said for x in wrong or
                                 (() if ranks else all_of_them)))  # fmt: skip
    return {
        "step": step,
        "split": NOT_FINITE,
        "what": what,
        "value": str(value),
        "samples": samples[:NAMED],
        "among": len(samples),
        "ranks": ranks,
    }


def said_of(row: Row) -> str:
    """The row in words, from what it was."""
    more = f" and {row['among'] - NAMED} more" if row["among"] > NAMED else ""
    samples = ", ".join(row["samples"]) + more
    where = f"the samples are {samples}, each with a finite loss"
    if row["ranks"]:
        ranks = ", ".join(map(str, row["ranks"][:NAMED])) + ", ..." * (len(row["ranks"]) > NAMED)
        where = f"not finite is that of {samples}, on rank{'s' * (len(row['ranks']) > 1)} {ranks}"
    return f"the {row['what']} of step {row['step']} is {row['value']} ({where})"


class LeftOut:
    """Counts the steps that a run leaves out, from those of which it has rows. Collective to make;
    alike on all ranks."""

    def __init__(self, train: TrainSettings, optim: OptimSettings, run: RunFolder) -> None:
        self._train, self._optim = train, optim
        self._steps: list[int] = first_rank_says(
            lambda: [row["step"] for row in of_split(run.rows(), NOT_FINITE)]
        )

    def add(self, row: Row) -> None:
        """A step that was left out.

        Raises:
            RunError: the run is not to go on.
        """
        self._steps.append(row["step"])
        skip, step = self._train.not_finite == "skip", row["step"]
        if skip and self._steps[-IN_A_ROW:] != list(range(step + 1 - IN_A_ROW, step + 1)):
            return
        fix = f"{IN_A_ROW} steps in a row were left out" if skip else "or train.not_finite=skip"
        raise RunError(
            f"{said_of(row)}; the parameters of step {step - 1} were kept: try a smaller "
            f"optim.lr (now {self._optim.lr:g}), more optim.warmup_steps "
            f"({self._optim.warmup_steps}) or optim.gradient_clipping=1; {fix}"
        )

    def row(self) -> Row:
        """How many so far, where they are left out."""
        return {"skipped": len(self._steps)} if self._train.not_finite == "skip" else {}
