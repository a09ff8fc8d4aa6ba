"""What a training step will take of a rank's memory, before anybody pays for it.

Memory between tiles and chunks is proportional to the tokens of a rank. So one rank of the job runs
here, in a world of the same size that exchanges nothing, with fewer tokens and with its budgets cut
in proportion; what its live tensors hold is counted and scaled back. Parameters, optimiser and data
follow from their shapes. What does not depend on the tokens, libraries and the tiles with the holes
that they leave in the heap, is measured on a step of few tokens in tiles of full size.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.batch import GeometricBatch
from data_pipeline.counter_rng import hash64
from data_pipeline.stream.stream import AHEAD
from data_pipeline.tasks.protocol import Task
from scaling.execution import Execution
from scaling.observe.memory import resident_bytes, return_large_blocks, trim_heap
from scaling.ops.tiles import most_kept_per_token, set_execution
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import innermost_range, measuring

MOST_TOKENS = 1 << 15
"""Tokens of the rank that runs here; fewer make tiles too coarse to scale."""
MOST_TILES = 96
"""Tiles of a part in the step that runs here; parts that keep hardly anything may then stay whole,
which foresees a little too much."""
ADAM_STATES = 2
KEPT, TILE = "kept activations", "tile workspace"
PURPOSES = {"transforms": "FFT workspace and spectra", "comm": "exchange buffers"}
"""Of what is made inside these timed ranges. All else is kept where it has every token, and
part of a tile where it has not: tokens are the last axis."""


@dataclass
class Job:
    """A model, its data and how it is cut."""

    model: nn.Module
    task: Task
    execution: Execution
    length: int
    """Tokens of a row, all sequence ranks together."""
    rows: int
    """Rows of a micro-batch."""
    micro_batches: int
    """Of an optimiser step, on one rank."""
    sp: int
    world: int
    zero_stage: int
    """0 where nothing is partitioned."""
    bf16: bool = False
    """Whether autocast is on."""


def memory_by_part(job: Job) -> dict[str, int]:
    """Bytes of one rank at its peak. Call it in a process that has loaded what a rank loads, and
    has done nothing else yet: its memory counts."""
    process, tile = _process(job)
    activations = _activations(job)
    # What a tile leaves on the heap, beyond the tile itself, which is counted already.
    holes = max(tile - job.execution.tile_budget("cpu"), 0)
    activations[TILE] = holes + activations.get(TILE, 0)
    return {"process": process, **_states(job), "data": _data(job), **activations}


def _process(job: Job) -> tuple[int, int]:
    """What this process holds after a small step: by itself, and on the heap that tiles left."""
    return_large_blocks()
    set_execution(job.model, job.execution)
    _step(job, SequenceShard(min(job.length, MOST_TOKENS)))
    whole = resident_bytes()
    trim_heap()
    process = resident_bytes()
    return process, whole - process


def _states(job: Job) -> dict[str, int]:
    """Parameters with their gradients, and the optimiser's states: ZeRO partitions the states from
    stage 1, gradients from 2, parameters from 3; one copy of the gradients is exchanged."""
    size = sum(p.numel() * p.element_size() for p in job.model.parameters())
    share = size // job.world
    stage = job.zero_stage
    gradients = 2 * (share if stage >= 2 else size)
    masters = share if stage >= 1 else 0  # the optimiser's own flat copy
    return {
        "parameters and gradients": (share if stage >= 3 else size) + gradients + masters,
        "optimiser": ADAM_STATES * (share if stage >= 1 else size),
    }


def _data(job: Job) -> int:
    """The step's samples, those prepared ahead, and one cyclic copy. What making one takes is gone
    before the backward pass needs most."""
    n = -(-job.length // job.sp)
    few = min(n, MOST_TOKENS)
    items, keys = [0] * job.rows, [hash64("plan", row) for row in range(job.rows)]
    sample = job.task.sample("train", items, keys, 0, few)
    size = sum(x.nbytes for x in (*sample.inputs.tensors.values(), sample.target, sample.weight))
    copies = (1 + AHEAD) * job.micro_batches + 1
    return round(copies * size * n / few)


def _activations(job: Job) -> dict[str, int]:
    n = -(-job.length // job.sp)
    few = max(min(n, MOST_TOKENS), 2)  # of one alone nothing is sent on
    length = few * job.sp - (job.length % job.sp > 0)  # even or uneven like the job's
    tile = job.execution.tile_budget("cpu") * few // n
    least = int(most_kept_per_token(job.model) * few / MOST_TILES)
    cut = replace(
        job.execution,
        tile_bytes=max(tile, least, 1),
        workspace_bytes=max(job.execution.workspace_bytes * few // n, 1),
    )
    set_execution(job.model, cut)
    with _world((length - 1) % job.sp, job.sp):  # the rank of the last token knows the length
        shard = SequenceShard(length)
        with measuring(), LiveTensors(shard.n_local) as live:
            _step(job, shard)
    return {purpose: round(size * n / few) for purpose, size in live.peak.items()}


def _step(job: Job, shard: SequenceShard) -> None:
    """Forward and backward of random tokens."""
    n = shard.n_local
    batch = GeometricBatch(
        torch.randn(job.rows, 3, n),
        torch.randn(job.rows, job.task.vectors, 3, n),
        torch.randn(job.rows, job.task.scalars, n),
        shard.index.repeat(job.rows, 1),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16):
        out = job.model(batch, shard)
    loss = out.points.square().sum() + out.vectors.square().sum() + out.scalars.square().sum()
    loss.backward()
    job.model.zero_grad()


@contextmanager
def _world(rank: int, ranks: int) -> Iterator[None]:
    """A process group whose other members do not exist: what is received means nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class LiveTensors(TorchDispatchMode):
    """While it is entered, counts the bytes of all tensors that operators make and nobody has freed
    yet; `peak` is what was held, by purpose, when it was most.

    Args:
        tokens: of this process.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        self._tokens = tokens
        self._held: Counter[str] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x)
        if self._held.total() > self.peak.total():
            self.peak = self._held.copy()
        return result

    def _count(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._known:
            return
        whole = x.ndim > 0 and x.shape[-1] % self._tokens == 0
        purpose = PURPOSES.get(innermost_range() or "", KEPT if whole else TILE)
        self._known.add(key)
        self._held[purpose] += size

        def freed() -> None:
            self._known.discard(key)
            self._held[purpose] -= size

        weakref.finalize(storage, freed)
