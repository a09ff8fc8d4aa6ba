"""What `status` says of runs in every state."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RunError
from launch import status
from scaling.runs.state import duration

GONE = "is gone without a word; the same command goes on"


def make(folder: Path, step: int = 3, age: float = 5.0, **said: Any) -> Path:
    """A run that has made some steps of 2 s each."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train:\n  steps: 63\n")
    rows = [{"time": time.time() - age, "step": n + 1, "split": "train", "step_s": 2.0}
            for n in range(step)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if said:
        here = {"step": step, "pid": os.getpid(), "host": socket.gethostname(), "error": None}
        (folder / "status.json").write_text(json.dumps(here | said))
    return folder


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def say(capsys: pytest.CaptureFixture, *paths: Path | str) -> list[str]:
    status.main([str(path) for path in paths])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"state": "running"}, "running     step 3 of 63, about 2 min left, last row 5 s ago"),
        ({"state": "finished", "summary": {"validation_loss": 0.25}},
         "finished    step 3 of 63, validation loss 0.25, last row 5 s ago"),
        ({"state": "interrupted"},
         "interrupted step 3 of 63, the same command goes on, last row 5 s ago"),
        ({"state": "failed", "error": "RunError: no room"},
         "failed      step 3 of 63, RunError: no room, last row 5 s ago"),
        ({"state": "running", "host": "elsewhere"},
         "unknown     step 3 of 63, on elsewhere, which alone can tell, last row 5 s ago"),
        ({}, "not started step 3 of 63, last row 5 s ago"),
    ],
)  # fmt: skip
def test_every_state_is_a_line(said, expected, tmp_path, capsys, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    run = make(tmp_path / "a", **said)
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert say(capsys, run) == [f"{run}  {expected}"]
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}


def test_a_process_that_is_gone_was_killed_even_if_another_has_its_number(tmp_path, capsys, ended):
    run = make(tmp_path / "a", state="running", pid=ended)
    (line,) = say(capsys, run)
    assert "  killed      step 3 of 63, process" in line and GONE in line
    again = make(tmp_path / "b", state="running")
    os.utime(again / "status.json", (0, 0))  # long before this process began
    (line,) = say(capsys, again)
    assert "  killed " in line and GONE in line


def test_all_runs_of_this_folder_are_told_and_an_unreadable_one_among_them(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="there is no run in runs, sweeps, benches"):
        status.main([])
    make(tmp_path / "runs/a", state="interrupted")
    broken = make(tmp_path / "sweeps/b", state="interrupted")
    (broken / "status.json").write_text("{")
    first, second = say(capsys)
    assert first.startswith("runs/a    interrupted step 3")
    assert second.startswith("sweeps/b  unreadable  sweeps/b/status.json is damaged")
    with pytest.raises(RunError, match="is damaged"):
        say(capsys, "sweeps/b")
    with pytest.raises(RunError, match="there is no such folder"):
        say(capsys, "runs/none")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 s"), (300.0, "5 min"), (9000.0, "2 h"), (4e5, "5 days")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
