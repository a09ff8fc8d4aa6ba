"""metrics.jsonl, the truth about a run: one JSON object a line, each (step, split) once.

Training rows, every log_every steps and at the last step:
    step            optimiser steps so far             split           "train"
    loss            of this step, over all ranks, in units of the trivial answer
    grad_norm       before clipping                    lr              learning rate
    tokens          valid tokens of this step, over all ranks, each counted once
    tokens_per_s    of the steps since the last row; evaluation and saving are not counted
and, per step, means since the last row, each of the rank where it is largest:
    step_s forward_s backward_s
    comm_bytes               the sequence's exchanges; gradients are not counted
    peak_bytes               memory so far
and how ranks spent the step on average; these add up to the mean rank's step_s:
    projection_s             pointwise modules, their recomputation and their backward
    transforms_s             the long convolutions, forward and backward, except for
    comm_s                   waiting in the sequence's exchanges
    optimizer_s data_wait_s
    other_s                  the rest: read-out and loss, gradients' exchange, waiting for slower
                             ranks at the loss, the backward of modules too small for tiles
and besides
    transfer_s               exchanges under way; what of it is not in comm_s, computing hid
    skipped                  with train.not_finite=skip: steps left out so far, each with a row of
                             its own, of split not_finite (train/not_finite.py)
    slow_rank slow_by        only where one rank computed SLOW times as long as the others' median
                             in the last SEEN steps: which, and how many times
Validation rows: step, split, loss and its standard_error over samples, samples (that count),
tokens, step_s (of the evaluation), equivariance_error, and where tokens have targets of their own
error_by_position: eighths of the longest sequence with the loss of the targets from token `from` up
to `to`, and its standard_error. The rows of evaluations.jsonl, which `eval` adds after training or
beside it, are of the same kind, of any split, with the store, the precision and the baselines.

The first steps of a process (allocations, thread pools, DDP's buckets) are left out of rates and
times, unless a row has no others.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

from scaling.observe.memory import peak_bytes
from scaling.parallel.collectives import global_maxima, global_sums, group_rank, group_size
from scaling.parallel.telemetry import is_traced, measuring, progress
from scaling.runs.rows import Row

WARMUP_STEPS = 2
LARGEST = ("step_s", "forward_s", "backward_s", "comm_bytes")
"""Of the rank where it is largest."""
TIME_SHARES = ("projection_s", "transforms_s", "comm_s", "optimizer_s", "data_wait_s", "other_s")
"""Of the mean rank."""
COMPUTING = ("projection", "transforms", "pairs")
"""Ranges in which a rank waits for no other."""
SEEN, SLOW = 10, 1.5


@dataclass
class StepMeter:
    """Times and exchanges of the steps since the last row, on this rank."""

    device: torch.device
    tokens: int = 0
    """Valid tokens of the step under way, over all ranks."""
    _steps_seen: int = 0
    _steps: list[Row] = field(default_factory=list)
    _computing: deque[float] = field(default_factory=lambda: deque(maxlen=SEEN))

    @contextmanager
    def step(self, number: int = 0) -> Iterator[None]:
        """Around the step of that number, which sets `tokens`; its data is waited for inside."""
        with measuring(self.device) as measured:
            progress.step, progress.measured = number, measured
            yield
        progress.measured = None
        shares = {f"{name}_s": seconds for name, seconds in measured.innermost().items() if name}
        step = {name: shares.get(name, 0.0) for name in TIME_SHARES}
        step["other_s"] = measured.total_s - sum(step.values())
        step |= {
            "step_s": measured.total_s,
            "forward_s": measured.within("forward"),
            "backward_s": measured.within("backward"),
            "comm_bytes": measured.sent_bytes,
            "transfer_s": measured.transfer_s,
            "tokens": self.tokens,
            "warm": self._steps_seen >= WARMUP_STEPS and not is_traced(),
        }
        self._steps.append(step)
        self._steps_seen += 1
        if step["warm"]:
            self._computing.append(sum(measured.within(name) for name in COMPUTING))

    def row(self) -> Row:
        """Tokens of the last step; rates and times since the last row. Collective."""
        steps, self._steps = self._steps, []
        warm = [step for step in steps if step["warm"]] or steps

        def mean(name: str) -> float:
            return sum(step[name] for step in warm) / len(warm)

        *most, peak = global_maxima(
            *map(mean, LARGEST), peak_bytes(self.device), device=self.device
        )
        averages = (*TIME_SHARES, "transfer_s")
        computing = [0.0] * group_size(None)
        computing[group_rank(None)] = sum(self._computing)
        sums = (1, *map(mean, averages), *computing)
        ranks, *split = global_sums(*sums, device=self.device)
        slow = {}
        if len(self._computing) == SEEN:
            slow = slow_rank(split[len(averages) :])
        seconds = most[0] * len(warm)
        return {
            "tokens": steps[-1]["tokens"],
            "tokens_per_s": sum(step["tokens"] for step in warm) / seconds,
            **dict(zip(LARGEST, most, strict=True)),
            **{name: value / ranks for name, value in zip(averages, split, strict=False)},
            "peak_bytes": int(peak),
            **slow,
        }


def slow_rank(seconds: Sequence[float]) -> Row:
    """The columns of that name, from what each rank computed; none if all are about as fast."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = median([*seconds[:slowest], *seconds[slowest + 1 :]] or [seconds[slowest]])
    if seconds[slowest] <= SLOW * others or not others:
        return {}
    return {"slow_rank": slowest, "slow_by": seconds[slowest] / others}
