"""Checks of the data: the store, the model that is to read it, and which rank reads what."""

import shutil
import tempfile
import time
from collections import Counter
from contextlib import closing
from copy import copy
from pathlib import Path
from typing import Any

from launch.checks.finding import Finding, Job, failed, not_here, ok
from launch.checks.machine import PROBE, existing
from launch.config.check import options_of, options_within
from launch.config.settings import mesh_sizes
from launch.ranks.discovery import who

STEPS = 2
"""Optimiser steps whose readings are compared."""
LINES = 16
"""Ranks whose readings are printed."""
SAMPLES = 8
"""Samples of a micro-batch that are named."""
SAID = 4
"""Micro-batches of a rank that a line holds."""


def store(job: Job) -> Finding:
    """The task opens its stores, which checks every file's size; one chunk of each is read, which
    checks its sum. Bundled data that training would build are built aside."""
    from data_pipeline.prepare import ensure_bundled
    from data_pipeline.store.reader import Store
    from data_pipeline.tasks.denoising import BUNDLED
    from data_pipeline.tasks.registry import build_task

    options, aside = dict(job.config.task), ""
    if options.get("store") == BUNDLED and not Path(BUNDLED).exists():
        folder = tempfile.mkdtemp()
        job.stack.callback(shutil.rmtree, folder, ignore_errors=True)
        options["store"] = f"{folder}/bundled"
        ensure_bundled(options["store"])
        aside = f"{BUNDLED} is not there yet, training will build it; built aside to look: "
    with options_within(job.config, "task"):
        job.task = build_task(options["name"], **options_of(options))
    names = stores_of(options)
    if not names:
        return ok(f"task {options['name']} makes its samples and reads no store", job.task.digest)
    said = []
    for name in names:
        opened = Store(name)
        began, rows = time.perf_counter(), opened.read("xyz", 0, 0, int(opened.lengths[0]))
        seconds = time.perf_counter() - began
        said.append(f"{'' if aside else name + ' '}{len(opened.lengths):,} chains, the first "
                    f"({len(rows)} residues) read in {1e3 * seconds:.0f} ms")  # fmt: skip
    return ok(aside + "; ".join(said), job.task.digest)


def same_store(job: Job, findings: dict[int, Finding]) -> Finding:
    """Every rank must see the same data."""
    digests: dict[str, list[int]] = {}
    for rank, each in findings.items():
        digests.setdefault(each.data, []).append(rank)
    if len(digests) > 1:
        said = " | ".join(f"{digest[:12]} on {who(r, job.hosts)}" for digest, r in digests.items())
        fix = "copy one store to every machine, or put it on a disk that all share"
        return failed(f"ranks see different data: {said}", fix)
    return ok(findings[min(findings)].text)


def stores_of(options: dict[str, Any]) -> list[str]:
    """Paths of the stores that a task is to read."""
    named = options.get("store")
    return [str(each) for each in ([named] if isinstance(named, str) else named or [])]


def disk_of_store(job: Job) -> Finding:
    """How fast the store's own files come; nothing is written there."""
    paths = [Path(name) for name in stores_of(job.config.task) if "://" not in name]
    files = [file for path in paths for file in sorted(path.rglob("*")) if file.is_file()]
    if not files:
        return not_here("no store of files is there to be read")
    began, read = time.perf_counter(), 0
    for file in files:
        with file.open("rb") as opened:
            read += len(opened.read(PROBE - read))
        if read >= PROBE:
            break
    rate = read / 1e6 / (time.perf_counter() - began)
    free = shutil.disk_usage(existing(paths[0])).free
    text = f"{paths[0]}: {rate:,.0f} MB/s for {read / 1e6:,.1f} MB, perhaps out of memory"
    return ok(f"{text}, {free / 1e9:,.1f} GB free")


def model(job: Job) -> Finding:
    """The model can be built for the task's channels; counted without its memory."""
    if job.task is None:
        return not_here("can be tried when store is ok")
    import torch

    from scaling.models import build

    channels = {"vectors": job.task.vectors, "scalars": job.task.scalars}
    with options_within(job.config, "model"), torch.device("meta"):
        built = build(job.config.model["name"], **channels, **options_of(job.config.model))
        longest = int(max(job.task.lengths("train"), default=0))
        built.check_longest(longest)
    job.parameters = sum(p.numel() for p in built.parameters())
    name = job.config.model["name"]
    return ok(f"{name}, {job.parameters:,} parameters, reads up to {longest:,} tokens a sample")


def reading(job: Job) -> Finding:
    """What this rank asks of the task in the first steps: samples, keys, tokens [start, stop)."""
    if (lack := job.lacks("ranks", "store")) or job.task is None:
        return lack or not_here("no task")
    from data_pipeline.stream.order import DataSlot
    from scaling.parallel.mesh import check_sizes
    from scaling.train.loop import training_stream

    calls: list[list[Any]] = []
    dp, sp = mesh_sizes(job.config.parallel, job.ranks.world)
    with options_within(job.config, "parallel", "train"):
        check_sizes(dp, sp, job.ranks.world)
        recorded = copy(job.task)
        sample = recorded.sample

        def record(split: str, items: Any, keys: Any, start: int, stop: int) -> Any:
            calls.append([list(items), list(keys), int(start), int(stop)])
            return sample(split, items, keys, start, stop)

        vars(recorded)["sample"] = record
        slot = DataSlot(job.ranks.rank // sp, dp, job.ranks.rank % sp, sp)
        stream = training_stream(recorded, job.config.train, slot)
    with closing(stream):
        sizes = [len(next(stream)) for _ in range(STEPS)]
    steps = [calls[sum(sizes[:n]) : sum(sizes[: n + 1])] for n in range(STEPS)]
    return ok(_told(steps), steps)


def _told(steps: list[list[list[Any]]]) -> str:
    """samples 4, 17 tokens 0-511; in the order in which they are read."""
    said = [
        f"samples {_some(items)} tokens {f'{start}-{stop - 1}' * (stop > start)}"
        f"{'none' * (stop <= start)}"
        for items, _, start, stop in steps[0]
    ]
    more = f"; and {len(said) - SAID} micro-batches" if len(said) > SAID else ""
    return "; ".join(said[:SAID]) + more


def _some(items: list[int]) -> str:
    more = f", ... ({len(items)} in all)" if len(items) > SAMPLES else ""
    return ", ".join(map(str, items[:SAMPLES])) + more


def complete(job: Job, findings: dict[int, Finding]) -> Finding:
    """Every token of every sample of the first steps is read by one rank, and by one alone."""
    assert job.task is not None
    fix = "give every rank the same configuration and data; if they have, report this table"
    expected = expected_samples(job)
    for number in range(STEPS):
        readers: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        lengths: dict[tuple[int, int], int] = {}
        for rank, each in findings.items():
            for items, keys, start, stop in each.data[number]:
                length = max(job.task.length("train", item) for item in items)
                for row in zip(items, keys, strict=True):
                    readers.setdefault(row, []).append((start, stop, rank))
                    lengths[row] = length
        items = Counter(item for item, _ in readers)
        for item in items | expected[number]:
            if items[item] < expected[number][item]:
                return failed(f"step {number + 1}: nobody reads sample {item}", fix)
            if items[item] > expected[number][item]:
                ranks = [r for row, each in readers.items() if row[0] == item for *_, r in each]
                text = f"step {number + 1}: sample {item} is none of it, and read by"
                return failed(f"{text} {who(sorted(set(ranks)), job.hosts)}", fix)
        for (item, _), read in readers.items():
            if wrong := _gap(sorted(read), lengths[item, _], job):
                return failed(f"step {number + 1}: sample {item} {wrong}", fix)
    lines = [f"rank {rank}: {each.text}" for rank, each in sorted(findings.items())]
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"and {len(lines) - LINES + 1} ranks more"]
    dp, sp = mesh_sizes(job.config.parallel, job.ranks.world)
    return ok(f"dp {dp} x sp {sp}: every token of {STEPS} steps by one rank; step 1:", lines=lines)


def _gap(read: list[tuple[int, int, int]], length: int, job: Job) -> str:
    """What is wrong with the slices [start, stop) of a row, as ranks read them."""
    end, before = 0, -1
    for start, stop, rank in read:
        if start < end:
            return (f"tokens {start}-{min(end, stop) - 1} are read twice, by "
                    f"{who([before], job.hosts)} and {who([rank], job.hosts)}")  # fmt: skip
        if start > end:
            return f"tokens {end}-{start - 1} are read by nobody"
        end, before = stop, rank
    return f"tokens {end}-{length - 1} are read by nobody" if end < length else ""


def expected_samples(job: Job) -> list[Counter[int]]:
    """How often each sample comes in each of the first steps, by the order alone."""
    from data_pipeline.stream.order import Order

    assert job.task is not None
    train, task = job.config.train, job.task
    size = train.batch_size
    key = (train.seed, "train", task.digest)
    order = Order(task.parts("train"), key, size, train.bucket_steps or 1, task.lengths("train"))
    return [Counter(item for item, _ in order.samples(n * size, (n + 1) * size))
            for n in range(STEPS)]  # fmt: skip
