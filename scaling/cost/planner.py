"""What a training step will take of a rank's memory, before anybody pays for it.

What live tensors hold is counted on a step of the same shapes that computes nothing (trace.py).
Parameters, optimiser and data follow from their shapes. On a CPU the process counts, too: its
libraries, and the holes in its heap; these are measured here, on a small step.
"""

from dataclasses import dataclass

import torch

from data_pipeline.counter_rng import hash64
from data_pipeline.stream.stream import AHEAD
from data_pipeline.tasks.protocol import Task
from scaling.cost.trace import (
    HEAP,
    KEPT,
    StepTrace,
    forward_and_backward,
    random_batch,
    trace_step,
)
from scaling.execution import Execution
from scaling.models.protocol import Model
from scaling.observe.memory import (
    peak_bytes,
    reset_peak,
    resident_bytes,
    return_large_blocks,
    trim_heap,
)
from scaling.ops.tiles import most_kept_per_token, set_execution

SAMPLED_TOKENS = 1 << 15
"""Of a sample that is made here to weigh it."""
TILES = 3
"""Of the small step that is run here: each one leaves its holes where the others did."""
PAIRED_TOKENS = 1 << 11
"""The most that are run here of a model of all pairs, whose time is quadratic."""
SMALLEST_STEP = 1 << 10
STEPS = 3
"""That are run here: later ones find a heap with holes."""
ADAM_STATES = 2


@dataclass
class Job:
    """A model, its data and how it is cut."""

    model: Model
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
    data_bytes: int
    """Of the samples that a rank holds at once."""
    device: str = "cpu"
    """cpu or cuda."""
    bf16: bool = False
    """Whether autocast is on; activations are counted as float32 all the same, which foresees too
    much rather than too little."""

    @property
    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def trace(self) -> StepTrace:
        """Of a micro-batch."""
        return trace_step(
            self.model,
            self.execution,
            self.length,
            rows=self.rows,
            ranks=self.sp,
            device=self.device,
        )


def memory_by_part(job: Job, trace: StepTrace, process: tuple[int, int] = (0, 0)) -> dict[str, int]:
    """Bytes of one rank at its peak.

    Args:
        process: of a CPU's rank, see `process_bytes`.
    """
    parts = {**_states(job), "data": job.data_bytes}
    parts |= {purpose: round(size) for purpose, size in trace.held.items()}
    if job.execution.offload != "none":
        parts.pop(KEPT, None)
    itself, heap = process
    if itself:
        parts = {"process": itself} | parts | {HEAP: heap + parts.get(HEAP, 0)}
    return parts


def sample_bytes(task: Task, length: int, rows: int, micro_batches: int, sp: int) -> int:
    """The step's samples, those prepared ahead, and one cyclic copy. What making one takes is gone
    before the backward pass needs most."""
    n = -(-length // sp)
    few = min(n, SAMPLED_TOKENS)
    items, keys = [0] * rows, [hash64("plan", row) for row in range(rows)]
    sample = task.sample("train", items, keys, 0, few)
    size = sum(x.nbytes for x in (*sample.inputs.tensors.values(), sample.target, sample.weight))
    copies = (1 + AHEAD) * micro_batches + 1
    return round(copies * size * n / few)


def process_bytes(job: Job) -> tuple[int, int]:
    """What a CPU's process holds by itself, and at the peak of small steps beyond what a trace of
    them tells: holes that nothing fits.
    Call it in a process that has loaded what a rank loads, and has done nothing large yet."""
    return_large_blocks()
    set_execution(job.model, job.execution)
    kept = max(most_kept_per_token(job.model), 1.0)
    tokens = max(round(TILES * job.execution.tile_budget("cpu") / kept), SMALLEST_STEP)
    most = PAIRED_TOKENS if job.model.work(job.length).pair_flops else SAMPLED_TOKENS
    tokens = min(job.length, tokens, most)
    batch = random_batch(job.model, 1, tokens)
    reset_peak(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16):
        for _ in range(STEPS):
            forward_and_backward(job.model, batch)
            job.model.zero_grad()
    peak = peak_bytes(torch.device("cpu"))
    del batch
    trim_heap()
    itself = resident_bytes()
    traced = sum(trace_step(job.model, job.execution, tokens).held.values())
    return itself, max(peak - itself - traced, 0)


def _states(job: Job) -> dict[str, int]:
    """Parameters with their gradients, and the optimiser's states: ZeRO partitions the states from
    stage 1, gradients from 2, parameters from 3; one copy of the gradients is exchanged."""
    size = job.parameter_bytes
    share = size // job.world
    stage = job.zero_stage
    gradients = 2 * (share if stage >= 2 else size)
    masters = share if stage >= 1 else 0  # the optimiser's own flat copy
    return {
        "parameters and gradients": (share if stage >= 3 else size) + gradients + masters,
        "optimiser": ADAM_STATES * (share if stage >= 1 else size),
    }
