"""A run of two ranks that is killed again and again, each time followed by the same command.

    LONGFOLD_SOAK_KILLS=100 LONGFOLD_SOAK_SEED=1 make test ARGS="-m soak -n0 -s"

At a random moment (of the start, of a step, of a save) a random one of launcher and ranks is ended,
mostly by SIGKILL. A kill takes 15 s and more, as long as a start and some steps.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import run
from tests.states import assert_same, curve

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LONGFOLD_SOAK_KILLS", 100))
SEED = int(os.environ.get("LONGFOLD_SOAK_SEED", time.time_ns() % 10**6))
STEPS = 20 * KILLS + 50
FARTHEST = 30  # new steps before a kill: 15 on average, so that the kills come before the end
LATEST_S = 8.0  # of a start
PATIENCE_S = 150.0  # longer than a rank waits for another
COMMAND = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    "-m", "launch.train", "experiment=recall", "task.held_out_size=4", "model.channels=2",
    "model.hidden=4", "model.operators=1", f"train.steps={STEPS}", "train.batch_size=4",
    "train.micro_batch_size=4", "train.log_every=1", "train.save_every=5",
    "train.evaluate_every=50", "optim.warmup_steps=0", "parallel.timeout_s=30", "device=cpu",
]  # fmt: skip
ENVIRON = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class Life:
    """One start of the run, until it ends or is ended."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.began = folder, time.time()
        with log.open("w") as output:
            self.launcher = subprocess.Popen(
                [*COMMAND, f"runs={folder.parent}", f"name={folder.name}"], cwd=ROOT, env=ENVIRON,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def kill(self, moment: str, dice: random.Random) -> str:
        """Ends one of its processes at such a moment; which and how. Nothing: all had ended."""
        self._wait_for(moment, dice)
        ranks = []
        with suppress(psutil.NoSuchProcess):
            ranks = [each for each in alive(self.folder) if each.ppid() == self.launcher.pid]
        number, how = dice.choice([0, 1, 2]), dice.choices(["SIGKILL", "SIGTERM"], [6, 1])[0]
        victim, name = self.launcher, "launcher"
        if number < len(ranks):
            victim, name = ranks[number], f"rank {number}"
        if self.launcher.poll() is not None:
            return ""
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            victim.send_signal(signal.Signals[how])
        return f"{how} to {name} at a {moment}"

    def _wait_for(self, moment: str, dice: random.Random) -> None:
        if moment == "start":
            with suppress(subprocess.TimeoutExpired):
                self.launcher.wait(dice.uniform(0, LATEST_S))
            return
        first, new = 0, dice.randint(1, FARTHEST)
        while not first or self._step() < first + new:
            first = first or self._step()
            if self._ended(within=0.02):
                return
        while moment == "save" and not [*(self.folder / "checkpoints").glob("*.tmp")]:
            if self._ended(within=0.002):
                return
        time.sleep(dice.uniform(0, 0.02 if moment == "save" else 0.1))

    def _step(self) -> int:
        """The last that this life has written; 0: none."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return 0
        with file.open("rb") as content:
            content.seek(max(file.stat().st_size - 4096, 0))
            *_, line, _ = [b"", *content.read().split(b"\n")]
        with suppress(ValueError):
            row = json.loads(line)
            return row["step"] if row["time"] > self.began else 0
        return 0

    def _ended(self, within: float) -> bool:
        assert time.time() < self.began + PATIENCE_S, "there is no new step"
        with suppress(subprocess.TimeoutExpired):
            self.launcher.wait(within)
        return self.launcher.returncode is not None

    def end(self) -> int:
        """Waits until none of its processes is left; the launcher's exit code."""
        deadline = time.time() + PATIENCE_S + STEPS
        self.launcher.wait(PATIENCE_S + STEPS)
        while left := alive(self.folder):
            assert time.time() < deadline, f"left over: {left}"
            time.sleep(0.1)
        return self.launcher.returncode


def alive(folder: Path) -> list[psutil.Process]:
    """Processes of that run, the oldest first."""
    told = {f"runs={folder.parent}", f"name={folder.name}"}
    every = psutil.process_iter(["cmdline"])
    return sorted((each for each in every if told <= {*(each.info["cmdline"] or [])}),
                  key=lambda each: each.pid)  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path: Path):
    print(f"\nseed {SEED}, {KILLS} kills, {STEPS} steps")
    straight, folder, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    ended = run([*COMMAND, f"runs={tmp_path}", "name=straight"], 3000, cwd=ROOT, env=ENVIRON)
    assert ended.returncode == 0, ended.stderr
    dice, kills, began = random.Random(SEED), [], time.time()
    try:
        while len(kills) < KILLS:
            life = Life(folder, log)
            moment = dice.choices(["start", "step", "save"], [1, 2, 2])[0]
            kills.append(life.kill(moment, dice))
            code = life.end()
            print(f"{len(kills):4d} {time.time() - life.began:5.1f} s  {kills[-1]}, code {code}")
            assert kills[-1], f"ended by itself: {log.read_text()}"
        last = Life(folder, log)
        assert last.end() == 0, log.read_text()
    finally:
        for process in alive(folder):
            process.kill()
    for kill, count in sorted(Counter(kills).items()):
        print(f"{count:4d} {kill}")
    print(f"{len(kills) + 1} starts, {time.time() - began:.0f} s")

    assert [row["step"] for row in curve(straight) if row["split"] == "train"] == [
        *range(1, STEPS + 1)
    ]
    assert_same(folder, straight, 0)
    states = [json.loads((path / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
              for path in (folder, straight)]  # fmt: skip
    assert states[0] == states[1]  # the data's cursor and the random state, too
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert not list(folder.rglob("*.tmp"))
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [*range(1, STEPS + 1)]
