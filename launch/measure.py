"""One measurement in fresh ranks: python -m launch.measure <case.json> <result.json> <device>

`sweep` and `bench` start it under torchrun; it can be started by hand under any launcher.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError
from launch.ranks.discovery import discover
from launch.ranks.exit import run_command
from launch.ranks.group import choose_device, process_group, share_cores


def _train_step(case: dict[str, Any], device: Any) -> dict[str, Any]:
    from scaling.experiments.cases.train_step import StepCase, measure_step

    return dataclasses.asdict(measure_step(StepCase(**case), None, device))


def _bench(case: dict[str, Any], device: Any) -> list[dict[str, Any]]:
    from scaling.experiments.registry import BENCHES

    bench = BENCHES[case.pop("name")]
    return bench.rows(bench.case(**case), None, device)


MEASUREMENTS = {"train_step": _train_step, "bench": _bench}
"""Of `sweep` and of `bench`."""


def main(arguments: list[str]) -> None:
    """Measure the case in a file; rank 0 writes what was found to another."""
    ranks = discover()
    share_cores(ranks)
    case_file, result_file, wanted = arguments
    what = json.loads(Path(case_file).read_text())
    device = choose_device(wanted, ranks)
    with process_group(ranks, device, timeout_s=600.0):
        try:
            found = MEASUREMENTS[what["measurement"]](what["case"], device)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise ConfigError(f"out of memory: {str(error).splitlines()[0]}") from None
            raise
        if ranks.rank == 0:
            Path(result_file).write_text(json.dumps(found))


def measure(
    measurement: str,
    case: dict[str, Any],
    place: Path,
    ranks: int,
    *,
    threads: int,
    timeout_s: float,
    device: str,
) -> tuple[str, Any]:
    """Runs a measurement on fresh ranks; "ok" and what it found, or why there is nothing.

    The folder `place` gets the case, the result and what the ranks said.
    """
    place.mkdir(parents=True, exist_ok=True)
    case_file, result, log = place / "case.json", place / "result.json", place / "log.txt"
    case_file.write_text(json.dumps({"measurement": measurement, "case": case}))
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), "-m", "launch.measure", str(case_file), str(result), device]  # fmt: skip
    environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("w") as output:
        began = time.monotonic()
        # Told to stop, this process would leave its ranks running.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
        try:
            code = child.wait(timeout_s)
        except BaseException as error:
            # torchrun ends its ranks on SIGTERM; SIGKILL would leave them running.
            child.send_signal(signal.SIGTERM)
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"time-out after {time.monotonic() - began:.0f} s", None
        finally:
            signal.signal(signal.SIGTERM, before)
    if code != 0 or not result.exists():
        return reason(log.read_text()), None
    return "ok", json.loads(result.read_text())


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


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
