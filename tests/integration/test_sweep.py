"""A small sweep: real points, a failing one, a rerun, and the views of its numbers."""

import csv
import json
import os
import signal
from pathlib import Path
from threading import Thread
from time import sleep

import pytest

from data_pipeline.errors import RunError
from launch import sweep
from launch.measure import ENTRY
from scaling.experiments import ranks
from scaling.experiments.experiment import Point
from scaling.experiments.options import Running
from scaling.experiments.ranks import reason as reason_of
from scaling.runs.folder import RunFolder

TINY = ["name=tiny", "model.channels=2", "model.hidden=2", "steps=2", "scalars=0", "sp=[1,2]",
        "device=cpu"]  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_sweep_measures_resumes_and_keeps_failures(tmp_path, monkeypatch, capsys):
    """64 tokens on 1 and 2 ranks; again; then a point whose processes do not start."""
    arguments = [*TINY, f"sweeps={tmp_path}"]
    sweep.main([*arguments, "lengths=[64]"])
    folder = tmp_path / "tiny"
    rows = read(folder / "rows.csv")
    assert [(row["length"], row["sp"]) for row in rows] == [("64", "1"), ("64", "2")]
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["tokens_per_s"]) * float(row["step_s"]) == pytest.approx(
            int(row["length"])
        )
        assert float(row["peak_bytes"]) > float(row["base_bytes"]) > 1e7
    alone, shared = rows
    assert float(alone["comm_bytes"]) == float(alone["all_to_alls"]) == 0
    # The convolution's 2 + 2, the token shift, and the door: at most one a field.
    assert 4 < float(shared["all_to_alls"]) <= 9
    # Two channels of one scalar and one vector: operands 16 and results 14 floats a token, there
    # and back; the door 41 bytes, the shift 6 floats; of 32 local tokens half leave, the shift's
    # all. Beyond that only the frequencies' rounding up and the sums.
    real = 32 * (2 * (16 + 14) * 4 / 2 + 41 / 2 + 6 * 4)
    assert real <= float(shared["comm_bytes"]) <= 1.15 * real
    said = capsys.readouterr().out
    assert "tokens/s" in said
    summary = (folder / "summary.md").read_text()
    assert "| all ranks together, tokens/s | 2 | " in summary
    assert "launch sweep name=tiny" in summary
    run = RunFolder(folder)
    assert run.status()["state"] == "finished"
    assert json.loads((folder / "environment.json").read_text())["threads"] == 1
    assert [row["point"] for row in run.rows()] == ["N64_sp1", "N64_sp2"]
    assert all(row["time"] > 1.7e9 for row in run.rows())
    assert (folder / "figure.png").stat().st_size > 20_000

    monkeypatch.setattr(ranks.sys, "executable", "/bin/false")  # nothing is measured again
    sweep.main([*arguments, "lengths=[64]"])
    assert capsys.readouterr().out.count("measured before, kept") == 2
    assert read(folder / "rows.csv") == rows

    with pytest.raises(RunError, match="1 of 3 points failed"):
        sweep.main([*arguments, "lengths=[9]", "sp=[1]"])
    assert [row["status"] for row in read(folder / "rows.csv")] == [
        "ok", "ok", "failed without a word",
    ]  # fmt: skip
    assert "Not measured: N9_sp1: failed without a word" in (folder / "summary.md").read_text()
    assert run.status()["state"] == "failed"
    assert "failed without a word" in capsys.readouterr().out

    with pytest.raises(RunError, match=r"another configuration: steps was 2, is 3; .* name="):
        sweep.main([*arguments, "lengths=[64]", "steps=3"])


def test_a_point_that_fails_says_why_and_is_tried_again(tmp_path: Path):
    """Out of time, and an error inside a rank."""
    tiny = [*TINY, "lengths=[8]", "sp=[1]", f"sweeps={tmp_path}"]
    with pytest.raises(RunError, match=r"1 of 1 points failed, N8_sp1: time-out after .*log\.txt"):
        sweep.main([*tiny, "timeout_s=0.5"])
    with pytest.raises(RunError, match=r"1 of 1 points failed, N8_sp1: .*needs scalars"):
        sweep.main([*tiny, "name=other", "model.salience=true", "scalars=0"])
    (row,) = RunFolder(tmp_path / "other").rows()
    assert "salience" in row["status"]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("rank 1: error: another rank ended first\nerror: out of memory: x", "out of memory: x"),
        ("  File x\nRuntimeError: bad\nx.ChildFailedError: \n", "bad"),
        ("error: another rank ended first\n traceback : Signal 9 (SIGKILL) received by PID 4",
         "a rank died of SIGKILL, probably out of memory"),
        ("raise ChildFailedError(\n Signal 6 (SIGABRT) received", "a rank died of SIGABRT"),
        ("", "failed without a word"),
    ],
)  # fmt: skip
def test_the_reason_is_the_cause_not_its_echo(log: str, reason: str):
    assert reason_of(log) == reason


@pytest.mark.parametrize(
    "override",
    ["lengths=[]", "lengths=[0]", "sp=[-1]", "steps=0", "model=x", "vectors=-1"],
)
def test_bad_values_are_refused(override: str, tmp_path: Path):
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        sweep.main([f"sweeps={tmp_path}", override])


def test_who_is_told_to_stop_leaves_no_ranks_running(tmp_path, monkeypatch):
    """SIGTERM, from a scheduler or `timeout`."""
    pid, launcher = tmp_path / "pid", tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 60\n")
    launcher.chmod(0o700)
    monkeypatch.setattr(ranks.sys, "executable", str(launcher))

    def stop() -> None:
        while not (pid.exists() and pid.read_text()):
            sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # not the end of all tests
    try:
        Thread(target=stop, daemon=True).start()
        with pytest.raises(SystemExit):
            running = Running(name="x", timeout_s=10.0, device="cpu")
            ranks.measure("sweep", {}, Point(), tmp_path, running, ENTRY)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
