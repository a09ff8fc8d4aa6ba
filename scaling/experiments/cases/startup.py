"""How long a start takes: from the command to the first step, beside a launch that only imports
torch and DeepSpeed and makes the process group. Every number is of fresh processes; all sides run
in turn, from the folder of the checkout.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import ClassVar

import psutil
import torch

from data_pipeline.errors import LongfoldError
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row

BARE = """
import sys, time
import torch, deepspeed
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()
if torch.distributed.get_rank() == 0:
    open(sys.argv[1], "w").write(f"{time.time()}.")
torch.distributed.destroy_process_group()
"""
LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_\w+|TORCHELASTIC_\w+")
"""Variables of the launcher that started this process."""
FIRST = "train, to the first step / bare launch"
SECOND = "train that goes on, to its next step / bare launch"
POLL_S, PATIENCE_S = 0.02, 300.0


@dataclass
class Startup(Experiment):
    """
    Args:
        config: of accelerate.
        run: what `train` is told.
        ranks: of the launch.
        rounds: of all sides, in turn; medians count.
    """

    config: str
    run: list[str]
    ranks: Count = 2
    rounds: Count = 5

    goals: ClassVar = {FIRST: ("<=", 1.3), SECOND: ("<=", 1.3)}

    def points(self) -> list[Point]:
        return [Point("start")]

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        with TemporaryDirectory(prefix="longfold-") as place:
            sides = self._sides(Path(place), device)
            times = [{name: side(number) for name, side in sides.items()}
                     for number in range(self.rounds + 1)]  # fmt: skip
        found = {name: median(each[name] for each in times[1:]) for name in sides}
        bare = found["bare launch"]
        for name, seconds in found.items():
            ratio = seconds / bare if name in self.goals else None
            yield row(name, seconds, "s", ratio) | {"sp": self.ranks}

    def _sides(self, place: Path, device: torch.device) -> dict[str, Callable[[int], float]]:
        """Seconds of a round, by what is measured."""
        environ = {key: x for key, x in os.environ.items() if not LAUNCHER.fullmatch(key)}
        environ |= {"DS_ACCELERATOR": "cpu"} if device.type == "cpu" else {}
        python, script, mark = sys.executable, place / "bare.py", place / "mark"
        script.write_text(BARE)
        launch = [str(Path(python).with_name("accelerate")), "launch", "--config_file", self.config,
                  "--num_processes", str(self.ranks), "--main_process_port", "0"]  # fmt: skip
        often = ["train.log_every=1", "train.save_every=1", f"runs={place}"]
        train = [*launch, "-m", "launch.train", *self.run, *often]

        def bare(_: int) -> float:
            mark.unlink(missing_ok=True)
            return seconds_until([*launch, str(script), str(mark)], lambda _: _said(mark), environ)

        def first_step(name: str) -> float:
            run = RunFolder(place / name)
            return seconds_until([*train, f"name={name}"], lambda t: _step_after(run, t), environ)

        def alone(*command: str) -> float:
            return seconds_until([python, "-m", "launch", *command], None, environ)

        return {
            "bare launch": bare,
            FIRST: lambda number: first_step(f"run{number}"),
            SECOND: lambda _: first_step("run0"),  # of the first round, which does not count
            "train --cfg, which checks arguments": lambda _: alone("train", "--cfg", *self.run),
            "prepare, of a store that is there": lambda _: alone("prepare"),
        }


def seconds_until(
    command: Sequence[str], happens: Callable[[float], float | None] | None, environ: dict[str, str]
) -> float:
    """From the start of a command until what it is asked for has happened, then its processes are
    killed; or, where nothing is asked for, until it has ended.

    Args:
        happens: of the time of the start, the time of the event, unix seconds; None: not yet.

    Raises:
        LongfoldError: it failed, ended before, or took too long.
    """
    with TemporaryDirectory(prefix="longfold-") as folder:
        log = Path(folder, "log")
        with log.open("w") as output:
            began = time.time()
            process = psutil.Popen(command, stdout=output, stderr=output, env=environ)
        try:
            while time.time() - began < PATIENCE_S:
                ended = process.poll()
                if happens and (at := happens(began)):
                    return at - began
                if ended == 0 and not happens:
                    return time.time() - began
                if ended is not None:
                    raise LongfoldError(f"{' '.join(command)} ended too early, exit code {ended}: "
                                        f"{log.read_text()[-2000:]}")  # fmt: skip
                time.sleep(POLL_S)
        finally:
            _kill(process)
    raise LongfoldError(f"{' '.join(command)} took more than {PATIENCE_S:g} s")


def _kill(process: psutil.Popen) -> None:
    """With all that it started."""
    if process.poll() is None:
        family = [*process.children(recursive=True), process]
        for each in family:
            each.kill()
        psutil.wait_procs(family)


def _said(mark: Path) -> float | None:
    """The time in a file, once it is whole."""
    text = mark.read_text() if mark.exists() else ""
    return float(text[:-1]) if text.endswith(".") else None


def _step_after(run: RunFolder, began: float) -> float | None:
    """When the first step since then was logged."""
    return next((row["time"] for row in run.rows() if row["time"] > began), None)
