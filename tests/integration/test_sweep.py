"""A small sweep: real points, a failing one, a rerun, and the views of its numbers."""

import csv
import json
import os
import signal
from pathlib import Path
from threading import Barrier, Event, Thread
from time import sleep

import pytest

from data_pipeline.errors import ConfigError, OptionError, RunError
from launch import sweep
from launch.measure import ENTRY
from launch.sweep import SweepConfig
from scaling.experiments import ranks
from scaling.experiments.cases.sweep import Sweep
from scaling.experiments.columns import COLUMNS
from scaling.experiments.experiment import Point
from scaling.experiments.harness import run_experiment
from scaling.experiments.options import Running
from scaling.experiments.ranks import reason as reason_of
from scaling.models import build
from scaling.runs.folder import RunFolder
from scaling.runs.identity import Identity

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


def test_a_cell_has_the_values_of_its_grid(tmp_path):
    """Two data-parallel ranks under DeepSpeed, in the grid; the counts are the formulas'."""
    grid = ["grid.engine.zero_stage=[2]", "grid.rows=[3]", "engine=deepspeed", "dp=[2]", "sp=[1]"]
    sweep.main([*TINY, *grid, "lengths=[64]", f"sweeps={tmp_path}"])
    (row,) = RunFolder(tmp_path / "tiny").rows()
    assert row["point"] == "N64_sp1_dp2_engine.zero_stage=2_rows=3"
    assert set(row) - set(COLUMNS) == {"time", "engine.zero_stage"}
    assert set(COLUMNS) - set(row) == {"loss", "steps", "tokens", "train_flops", "seconds"}
    expected = {"kind": "step", "sp": 1, "dp": 2, "ranks": 2, "rows": 3, "zero_stage": 2}
    assert {key: row[key] for key in expected} == expected
    assert row["tokens_per_s"] * row["step_s"] == pytest.approx(2 * 3 * 64)
    assert row["step_low_s"] <= row["step_s"] <= row["step_high_s"]
    assert row["comm_hidden"] is None and row["comm_bytes"] == row["formula_bytes"] == 0
    model = build("se3_hyena", 1, 0, channels=2, hidden=2, operators=1, layers=2)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    work = model.work(64)
    assert row["fft_flops"] == 2 * 3 * 64 * (work.transform_flops + work.frequency_flops)
    assert row["flops"] > row["fft_flops"]


def test_a_cell_can_be_a_whole_run_with_a_budget(tmp_path):
    sweep.main([
        "name=runs", f"sweeps={tmp_path}", "kind=train", "lengths=null", "sp=[1]", "device=cpu",
        "train=[experiment=recall,engine=ddp,model.hidden=2,train.batch_size=2,"
        "train.micro_batch_size=2]",
        "grid.model.channels=[2]", "grid.budget.tokens=[192]", "grid.task.held_out_size=[8]",
    ])  # fmt: skip
    (row,) = RunFolder(tmp_path / "runs").rows()
    assert set(row) - set(COLUMNS) == {
        "time", "model.channels", "budget.tokens", "task.held_out_size",
    }  # fmt: skip
    assert (row["steps"], row["tokens"], row["length"]) == (3, 192, 32)
    run = RunFolder(tmp_path / "runs" / "points" / row["point"] / "run")
    (validation,) = (each for each in run.rows() if each["split"] == "validation")
    assert row["loss"] == validation["loss"] and validation["samples"] == 8
    assert row["train_flops"] == 3 * row["flops"]
    assert (
        "| channels=2, tokens=192, held_out_size=8: last validation"
        in (tmp_path / "runs" / "summary.md").read_text()
    )


def test_a_job_of_an_array_measures_its_point_alone(tmp_path, capsys):
    asked = [*TINY, "lengths=[64,128]", "grid.seed=[0,1]", f"sweeps={tmp_path}"]
    sweep.main([*asked, "count=true"])
    assert capsys.readouterr().out == "8\n"
    assert not (tmp_path / "tiny").exists()
    with pytest.raises(OptionError, match="point=8: must be below 8"):
        sweep.main([*asked, "point=8"])


def test_several_processes_share_a_folder(tmp_path, capsys):
    """Each point is measured by one; the last to end shows all."""
    swept = Sweep(model={"name": "linear_motion"}, lengths=[8, 16, 32], sp=[1])
    running, identity = SweepConfig(name="x", sweeps=str(tmp_path), **vars(swept)), Identity({})
    measured, begun, meet = [], Event(), Barrier(2, timeout=60)

    def measure(point: Point, _: Path):
        measured.append(point.length)
        begun.set()
        if len(measured) <= 2:
            meet.wait()
        return "ok", [{"step_s": 1.0, "tokens_per_s": float(point.length)}]

    def process(only: int | None = None) -> None:
        run_experiment(swept, measure, running, identity, "sweeps", ["sweep"], only)

    first = Thread(target=process, args=(0,), daemon=True)
    first.start()
    assert begun.wait(60)
    process()
    first.join(60)
    said = capsys.readouterr().out
    assert sorted(measured) == [8, 16, 32]
    process()
    assert sorted(measured) == [8, 16, 32]
    assert "another process measures it" in said
    assert {row["length"] for row in read(tmp_path / "x" / "rows.csv")} == {"8", "16", "32"}
    assert RunFolder(tmp_path / "x").status()["state"] == "finished"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["grid.model.hiden=[2]"], "unknown key model.hiden"),
        (["grid.stps=[2]"], "grid.stps=2: is no key of a step; there are rows, "),
        (["grid.seed=1"], r"grid.seed=1: must be a list of values"),
        (["grid.engine.zero_stage=[7]"], "engine.zero_stage=7: must be less than or equal to 3"),
        (["lengths=null"], "lengths=None: kind=step needs lengths"),
        (["kind=train"], r"lengths=\[64\]: kind=train takes its task's"),
        (["kind=train", "lengths=null", "grid.train.stps=[3]"], "unknown key train.stps"),
    ],
)
def test_cells_that_cannot_be_are_refused_before_any_is_measured(overrides, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        sweep.main([*TINY, "lengths=[64]", f"sweeps={tmp_path}", *overrides])
    assert not (tmp_path / "tiny").exists()


def test_efficiencies_beside_the_ideal():
    """Twice the tokens on twice the ranks: an FFT that is half of the work grows with log N."""
    cell = {"step_s": 2.0, "flops": 10.0, "fft_flops": 5.0}
    rows = [
        {"sp": 1, "length": 256, **cell},
        {"sp": 2, "length": 256, **cell, "step_s": 1.25},
        {"sp": 2, "length": 512, **cell, "step_s": 2.5},
    ]
    swept = Sweep(model={"name": "linear_motion"}, lengths=[256], sp=[1])
    found = {r["case"]: (r["length"], r["ratio"]) for r in swept.conclude(rows)[0] if r["ratio"]}
    assert found == {
        "strong efficiency": (256, 2.0 / 2 / 1.25),
        "weak efficiency": (512, 2.0 / 2.5),
        "weak efficiency, ideal": (512, pytest.approx(1 / (0.5 + 0.5 * 9 / 8))),
    }


def test_the_share_of_measured_peaks_is_said_where_they_are_known(tmp_path, monkeypatch):
    """Two threads of 5 flop/s each, of which a step uses 4."""
    monkeypatch.chdir(tmp_path)
    cell = {"sp": 2, "length": 256, "ranks": 2, "threads": 1, "step_s": 2.0, "flops": 8.0}
    swept = Sweep(model={"name": "linear_motion"}, lengths=[256], sp=[2])
    title = "share of the measured peaks of matrix products"
    assert title not in [each["case"] for each in swept.conclude([cell])[0]]
    rates = {"(16 x 16) @ (16 x 9), float32": 5e-9, "(16 x 16) @ (16 x 9), bfloat16": 1e-9,
             "copy": 1.0, "triad": 1.0}  # fmt: skip
    values = {f"1 thread: {case}": rate for case, rate in rates.items()}
    values |= {"all-to-all: latency": 1.0, "all-to-all: sent by a rank": 1.0}
    rows = [{"case": case, "length": 0, "value": x} for case, x in values.items()]
    folder = tmp_path / "benches/machine"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {each["case"]: each["value"] for each in swept.conclude([cell])[0]}
    assert found[title] == pytest.approx(0.4) and found["computed"] == pytest.approx(4e-9)


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
