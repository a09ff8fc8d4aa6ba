"""A measurement in fresh processes of this machine: the one way into them, and what they run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from data_pipeline.errors import LongfoldError
from scaling.experiments.experiment import Point
from scaling.experiments.options import Running
from scaling.experiments.registry import EXPERIMENTS
from scaling.experiments.two_nodes import Link, Node, two_nodes
from scaling.observe.memory import out_of_memory
from scaling.runs.rows import Row

PORT = 29500
"""Where ranks on nodes of their own meet: nobody else is there."""


def measure_case(case_file: Path, device: torch.device) -> list[Row]:
    """What each rank runs: the point that `case.json` describes; the same on every rank.

    Raises:
        LongfoldError: among others, out of memory.
    """
    case = json.loads(case_file.read_text())
    experiment = TypeAdapter(EXPERIMENTS[case["experiment"]]).validate_python(case["options"])
    try:
        return list(experiment.measure(Point(**case["point"]), device))
    except (MemoryError, RuntimeError) as error:
        if lack := out_of_memory(error):
            raise LongfoldError(lack) from None
        raise


def measure(
    experiment: str,
    options: dict[str, Any],
    point: Point,
    place: Path,
    running: Running,
    entry: Sequence[str],
) -> tuple[str, list[Row]]:
    """Measures a point under torchrun; "ok" and its rows, or why there are none.

    The folder `place` gets the case, the result and what the ranks said.

    Args:
        entry: arguments of torchrun that start one rank, before case.json, result.json and device.
    """
    place.mkdir(parents=True, exist_ok=True)
    case_file, result, log = place / "case.json", place / "result.json", place / "log.txt"
    case = {"experiment": experiment, "options": options, "point": asdict(point)}
    case_file.write_text(json.dumps(case))
    result.unlink(missing_ok=True)
    told = [*entry, str(case_file), str(result), running.device]
    if link := Link.named(point.values):
        with two_nodes(link) as nodes:
            status = run_together(list(on_nodes(nodes, told)), log, running)
    else:
        status = run_ranks(point.ranks, told, log, running)
    if status == "ok" and not result.exists():
        status = reason(log.read_text())
    return status, json.loads(result.read_text()) if status == "ok" else []


def run_ranks(ranks: int, command: Sequence[str], log: Path, running: Running) -> str:
    """Runs python with these arguments on so many ranks of this machine; "ok", or why not.

    Args:
        log: gets what they say.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), *command]  # fmt: skip
    return run_together([command], log, running)


def on_nodes(nodes: Sequence[Node], command: Sequence[str]) -> Iterator[list[str]]:
    """What starts python with these arguments as one rank on each node."""
    for rank, node in enumerate(nodes):
        places = {
            "RANK": rank,
            "WORLD_SIZE": len(nodes),
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": nodes[0].address,
            "MASTER_PORT": PORT,
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        told = [f"{key}={value}" for key, value in places.items()]
        yield node.command(["env", *told, sys.executable, "-u", *command])


def run_together(commands: Sequence[Sequence[str]], log: Path, running: Running) -> str:
    """Runs them at once; "ok", or why not. If one fails or none ends in time, all are stopped."""
    with log.open("w") as output:
        began = time.monotonic()
        # Told to stop, this process would leave its ranks running.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        environ = os.environ | {"OMP_NUM_THREADS": str(running.threads)}
        children = [
            subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
            for command in commands
        ]
        try:
            for child in children:
                left = began + running.timeout_s - time.monotonic()
                if child.wait(max(left, 0.1)):
                    break
        except BaseException as error:
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"time-out after {time.monotonic() - began:.0f} s"
        finally:
            # torchrun ends its ranks on SIGTERM; SIGKILL would leave them running.
            for child in children:
                child.terminate()
            codes = [child.wait() for child in children]
            signal.signal(signal.SIGTERM, before)
    return reason(log.read_text()) if any(codes) else "ok"


def reason(log: str) -> str:
    """Why a measurement failed, from what its ranks and torchrun said."""
    if died := re.search(r"Signal \d+ \((SIGKILL|SIGABRT|SIGSEGV|SIGBUS)\)", log):
        guess = ", probably out of memory" if died[1] == "SIGKILL" else ""
        return f"a rank died of {died[1]}{guess}"
    said = re.findall(r"error: (.+)|^\w*Error: (.+)", log, re.MULTILINE)
    reasons = [ours or others for ours, others in said]
    # A rank that lost its partner is not the cause.
    reasons.sort(key=lambda reason: reason.startswith("another rank"))
    return reasons[0] if reasons else "failed without a word"
