"""How long a training step will take, part by part.

computing   every operator: the larger of its arithmetic and its bytes at the machine's rates, and
            the time to start it; times what the part took longer where it was measured
exchanging  collectives · latency · log2(ranks) + bytes / bandwidth; a ring's exchanges go on
            while pairs are computed, and only what is longer counts
gradients   one sum over all ranks a step
optimizer   5 numbers read and written for each parameter, and 15 operators for each tensor
"""

from dataclasses import dataclass
from math import ceil

from data_pipeline.errors import ConfigError
from scaling.cost.machine import NETWORKS, NODE, Machine, Network
from scaling.cost.planner import Job
from scaling.cost.trace import KEPT, StepTrace

OFFLOAD_BYTES_PER_S = {"none": float("inf"), "host": 25e9, "file": 1e9}
"""PCIe 4.0 x16 and a disk, about; not measured."""
OPTIMIZER_OPERATORS, OPTIMIZER_NUMBERS = 15, 5
EXCHANGES = ("exchange", "gradients")


@dataclass(frozen=True)
class Networks:
    """Between ranks that share a sequence, and between all."""

    sequence: Network
    world: Network


def networks_of(job: Job, machine: Machine, network: Network | None) -> Networks:
    """The one that is asked for, or this machine's, or its node's, and InfiniBand beyond.

    Raises:
        ConfigError: several ranks of a machine whose exchange was not measured.
    """
    if chosen := network or machine.network:
        return Networks(chosen, chosen)
    if machine.measured and job.world > 1:
        raise ConfigError(f"{machine.name}: measured without an exchange of ranks; name network=")
    sequence, world = (
        (ranks <= NODE and machine.within_node) or NETWORKS["infiniband"]
        for ranks in (job.sp, job.world)
    )
    return Networks(sequence, world)


def step_seconds(
    job: Job, trace: StepTrace, machine: Machine, network: Network | None = None
) -> dict[str, float]:
    """Seconds of an optimiser step, by part."""
    networks = networks_of(job, machine, network)
    computing = machine.seconds_by_part(trace, job.bf16)
    exchange = 0.0
    for operator, count in trace.exchanges.items():
        seconds = networks.sequence.seconds(count.calls, count.bytes, job.sp)
        hidden = computing.get("pairs", 0.0) if operator == "pairs" else 0.0
        exchange += max(seconds - hidden, 0.0)
    parts = {part: job.micro_batches * seconds for part, seconds in computing.items()}
    parts["exchange"] = job.micro_batches * exchange
    if job.execution.offload != "none":
        moved = 2 * trace.held[KEPT] / OFFLOAD_BYTES_PER_S[job.execution.offload]
        parts["offload"] = job.micro_batches * moved
    size, tensors = job.parameter_bytes, len([*job.model.parameters()])
    sent = 2 * size * (job.world - 1) / job.world * (1.5 if job.zero_stage == 3 else 1.0)
    parts["gradients"] = networks.world.seconds(1, sent, job.world)
    own = size / (job.world if job.zero_stage else 1)
    parts["optimizer"] = (
        OPTIMIZER_NUMBERS * own / machine.memory + OPTIMIZER_OPERATORS * tensors * machine.call_s
    )
    return {part: seconds for part, seconds in parts.items() if seconds > 0}


@dataclass(frozen=True)
class Budget:
    """What a number of tokens takes."""

    tokens_per_s: float
    exchange_share: float
    steps: int
    hours: float
    rank_hours: float


def budget(job: Job, seconds: dict[str, float], tokens: float) -> Budget:
    step = sum(seconds.values())
    dp = job.world // job.sp
    of_step = dp * job.micro_batches * job.rows * job.length
    steps = max(ceil(tokens / of_step), 1)
    hours = steps * step / 3600
    share = sum(seconds.get(part, 0.0) for part in EXCHANGES) / step
    return Budget(of_step / step, share, steps, hours, hours * job.world)
