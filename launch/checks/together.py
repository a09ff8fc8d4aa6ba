"""Checks that the ranks make together: names, clocks, the process group, exchanges, the engine."""

import ipaddress
import os
import socket
import time
from statistics import median

from launch.checks.finding import Finding, Job, failed, not_here, ok, who
from launch.config.check import options_within
from launch.config.settings import mesh_sizes
from launch.ranks.process import process_group

CLOCKS_S = 2.0
"""Clocks may differ by so much; the ranks look at them about as exactly as a tenth of it."""
MESSAGE = 16 << 20
"""Bytes that a rank gives to an all-to-all."""
PAIR = 4 << 20
"""Bytes that one rank sends to another."""
ROUNDS = 3
SECONDS = 0.3
"""That an all-to-all is repeated for."""
SLOW = 5.0
"""Times the median between machines: a pair that is slower than that has a bad link."""


def names(job: Job) -> Finding:
    """Whether this machine finds the others, and gives them an address that they can reach."""
    own, several = socket.gethostname(), job.ranks.local_world < job.ranks.world
    fix = "name it in DNS or in /etc/hosts of every machine"
    wanted = [
        *([job.ranks.master[0]] if job.ranks.master else []),
        *sorted(set(job.hosts.values())),
    ]
    found = {name: addresses(name) for name in dict.fromkeys(wanted)}
    lost = [name for name, known in found.items() if not known and (several or name != own)]
    if lost:
        return failed(f"{', '.join(lost)} resolve{'s' * (len(lost) == 1)} to no address", fix)
    chosen = any(map(os.environ.get, ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")))
    if several and not chosen and all(map(is_loopback, found[own])):
        text = f"{own} is {', '.join(found[own])} to itself: others would call themselves"
        return failed(
            text,
            "take that line out of its /etc/hosts, or GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME)"
            "=the network's interface",
        )
    said = [name if known == [name] else f"{name} = {', '.join(known) or 'no address'}"
            for name, known in found.items()]  # fmt: skip
    more = f", and {len(said) - 3} more" if len(said) > 3 else ""
    return ok(", ".join(said[:3]) + more)


def addresses(name: str) -> list[str]:
    """Of a machine, as this one knows it."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except (OSError, UnicodeError):
        return []


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def clocks(job: Job) -> Finding:
    """What this machine's clock says just after all ranks have finished the check before."""
    if job.ranks.local_world == job.ranks.world:
        return not_here("one machine, one clock")
    return ok("", time.time())


def same_clock(job: Job, findings: dict[int, Finding]) -> Finding:
    times = {rank: each.data for rank, each in findings.items()}
    late, early = max(times, key=times.__getitem__), min(times, key=times.__getitem__)
    apart = times[late] - times[early]
    if apart > CLOCKS_S:
        text = f"{who([late], job.hosts)} is {apart:,.1f} s ahead of {who([early], job.hosts)}"
        return failed(text, "let a time service (chrony, ntpd) set the clocks")
    return ok(f"within {max(apart, 0.1):.1f} s")


def backend(job: Job) -> Finding:
    """Whether gloo or nccl connects all ranks."""
    deepspeed = job.config.engine.name == "deepspeed"
    if job.ranks.world == 1 and not deepspeed:
        return not_here("one rank needs no process group")
    if (lack := job.lacks("ranks", "device")) or job.device is None:
        return lack or not_here("no device")
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a time-out is an error, no abort
    began = time.perf_counter()
    group = process_group(job.ranks, job.device, job.patience_s, needed=deepspeed)
    job.stack.enter_context(group)
    import torch.distributed as dist

    dist.barrier(device_ids=None if job.device.index is None else [job.device.index])
    seconds = time.perf_counter() - began
    return ok(f"{dist.get_backend()} connects {job.ranks.world}", [seconds])


def connected(job: Job, findings: dict[int, Finding]) -> Finding:
    slowest = max(each.data[0] for each in findings.values())
    return ok(f"{next(iter(findings.values())).text} in {slowest:.1f} s")


def exchange(job: Job) -> Finding:
    """Time of a small and of a large all-to-all, and of this rank with every other."""
    if job.ranks.world == 1:
        return not_here("one rank exchanges nothing")
    if lack := job.lacks("backend"):
        return lack
    from functools import partial

    import torch
    import torch.distributed as dist

    from scaling.experiments.timing import medians

    assert job.device is not None
    world = job.ranks.world
    little, much = (
        torch.ones(world * max(size // world, 1), device=job.device) for size in (2, MESSAGE // 4)
    )
    sides = {
        name: partial(dist.all_to_all_single, torch.empty_like(x), x)
        for name, x in (("little", little), ("much", much))
    }
    seconds = medians(sides, SECONDS, job.device)
    return ok("", [seconds["little"], much.nbytes / seconds["much"], _pairs(job)])


def _pairs(job: Job) -> list[list[float]]:
    """[other rank, median seconds of PAIR bytes both ways]; all pairs, as in a tournament."""
    import torch
    import torch.distributed as dist

    from scaling.experiments.timing import now

    assert job.device is not None
    mine = torch.ones(PAIR // 4, device=job.device)
    theirs, found = torch.empty_like(mine), []
    rank, seats = job.ranks.rank, job.ranks.world + job.ranks.world % 2
    for turn in range(seats - 1):
        other = partner(rank, turn, seats)
        if other >= job.ranks.world:
            continue  # an odd number: one waits
        times = []
        for _ in range(ROUNDS):
            began = now(job.device)
            both = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
            for work in dist.batch_isend_irecv(both):
                work.wait()
            times.append(now(job.device) - began)
        found.append([other, median(times)])
    return found


def partner(rank: int, turn: int, seats: int) -> int:
    """Whom a rank meets in a turn of a tournament in which everybody meets everybody once."""
    last = seats - 1
    if rank == last:
        return next(r for r in range(last) if 2 * r % last == turn)
    other = (turn - rank) % last
    return last if other == rank else other


def speeds(job: Job, findings: dict[int, Finding]) -> Finding:
    """Of all ranks; a pair of machines that is far slower than others fails."""
    little, rate, _ = findings[min(findings)].data
    pairs = {(rank, int(other)): seconds
             for rank, each in findings.items() for other, seconds in each.data[2]
             if rank < other}  # fmt: skip
    text = f"all-to-all {1e6 * little:,.0f} us, {rate / 1e9:.2f} GB/s a rank with 16 MiB"
    slow = max(pairs, key=pairs.__getitem__)
    between = f"ranks {slow[0]} ({job.hosts[slow[0]]}) and {slow[1]} ({job.hosts[slow[1]]})"
    text += f"; slowest pair {between}: {PAIR / 1e9 / pairs[slow]:.2f} GB/s each way"
    far = {p: s for p, s in pairs.items() if job.hosts[p[0]] != job.hosts[p[1]]}
    if far and pairs[slow] > SLOW * median(far.values()) and slow in far:
        usual = PAIR / 1e9 / median(far.values())
        text += f", others {usual:.2f}"
        return failed(text, "look at the link between these two machines, or leave one out")
    return ok(text)


def engine(job: Job) -> Finding:
    """The configured engine takes a step of one number, by way of the whole configuration."""
    name = job.config.engine.name
    needed = ["device", *["backend"] * (name == "deepspeed" or job.ranks.world > 1)]
    needed += ["exchange"] * (job.ranks.world > 1)
    if (lack := job.lacks(*needed)) or job.device is None:
        return lack or not_here("no device")
    import torch

    from scaling.engine.build import build_engine

    config, began = job.config, time.perf_counter()
    dp, _ = mesh_sizes(config.parallel, job.ranks.world)
    micro_batches = max(config.train.batch_size // (dp * config.train.micro_batch_size), 1)
    with options_within(config, "engine", "train", "optim"):
        built = build_engine(
            name,
            torch.nn.Linear(1, 1).to(job.device),
            torch.optim.AdamW,
            gradient_clipping=config.optim.gradient_clipping,
            micro_batch_size=config.train.micro_batch_size,
            accumulation=micro_batches,
            precision=config.train.precision,
            zero_stage=config.engine.zero_stage,
            deepspeed=config.engine.deepspeed_config,
        )
    for number in range(micro_batches):
        with built.accumulate(last=number == micro_batches - 1):
            built.backward(built(torch.ones(1, 1, device=job.device)).sum())
    built.step(0.0)
    stage = f", ZeRO {config.engine.zero_stage}" if name == "deepspeed" else ""
    return ok(f"{name}{stage} takes a step", [time.perf_counter() - began])


def started(job: Job, findings: dict[int, Finding]) -> Finding:
    slowest = max(each.data[0] for each in findings.values())
    return ok(f"{next(iter(findings.values())).text} ({slowest:.1f} s with its start)")
