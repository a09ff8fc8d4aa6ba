"""A measurement in fresh processes of this machine: the one way into them, and what they run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from data_pipeline.errors import LongfoldError
from scaling.experiments.experiment import Point
from scaling.experiments.options import Running
from scaling.experiments.registry import EXPERIMENTS
from scaling.runs.rows import Row


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
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise LongfoldError(f"out of memory: {str(error).partition(chr(10))[0]}") from None
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
    with log.open("w") as output:
        began = time.monotonic()
        # Told to stop, this process would leave its ranks running.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        environ = os.environ | {"OMP_NUM_THREADS": str(running.threads)}
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
        try:
            code = child.wait(running.timeout_s)
        except BaseException as error:
            # torchrun ends its ranks on SIGTERM; SIGKILL would leave them running.
            child.send_signal(signal.SIGTERM)
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"time-out after {time.monotonic() - began:.0f} s"
        finally:
            signal.signal(signal.SIGTERM, before)
    return reason(log.read_text()) if code else "ok"


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
