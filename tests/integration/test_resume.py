"""Nothing is lost: stop or kill a run anywhere, and the same command gives the same curve.

Run as a script, the file is a small training run that may be told to kill itself.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.tasks.recall import Recall
from scaling.runs.rows import of_split, read_rows
from scaling.train.stop import SAME_REQUEST_S
from tests import processes
from tests.small_runs import STEPS, saved_step, train
from tests.states import assert_same, curve


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    summary = train(folder)
    assert summary.status == "finished" and summary.steps == STEPS
    return folder


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"OMP_NUM_THREADS": "1"}
    return processes.run(command, env=environment)


def test_killed_and_started_again_in_a_new_process_is_bitwise_the_same(tmp_path, straight):
    """Killed in step 5, after the rows of step 4 and the checkpoint of step 3."""
    run = tmp_path / "run"
    killed = launch(str(run), "5")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in curve(run)] == [1, 2, 3, 4, 4]
    assert json.loads((run / "status.json").read_text())["state"] == "running"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')  # the power failed while it wrote
    (run / "checkpoints" / "step-00000005.tmp").mkdir()
    again = launch(str(run))
    assert again.returncode == 0, again.stderr
    assert "going on after step 3" in again.stdout
    assert_same(run, straight, 0)
    assert not list((run / "checkpoints").glob("*.tmp"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, STEPS + 1))


def interrupted_on_eight_ranks(group, folder: Path) -> tuple[str, int]:
    def happens(out):
        if dist.get_rank() == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    summary = train(folder, dp=2, sp=4, precision="float64", step=2, happens=happens)
    return summary.status, summary.steps


def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(distributed, tmp_path, straight):
    """dp 2 x sp 4; the flag travels with the next step's weight. One process goes on."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert distributed(interrupted_on_eight_ranks, 8, run) == [("interrupted", 3)] * 8
    assert saved_step(run) == 3
    train(run, precision="float64")
    train(whole, precision="float64")
    assert_same(run, whole, 1e-10)


@pytest.mark.parametrize("how", ["STOP", signal.SIGTERM, signal.SIGINT])
def test_a_stop_file_or_a_signal_interrupts_and_the_same_call_goes_on(
    tmp_path, straight, how, capsys
):
    def happens(out):
        (tmp_path / "STOP").touch() if how == "STOP" else signal.raise_signal(how)

    before = signal.getsignal(signal.SIGTERM)
    assert train(tmp_path, step=1, happens=happens).status == "interrupted"
    assert "the same command goes on from here" in capsys.readouterr().out
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", 2)
    assert not (tmp_path / "STOP").exists() and signal.getsignal(signal.SIGTERM) is before
    assert train(tmp_path).status == "finished"
    assert_same(tmp_path, straight, 0)


def test_asked_again_later_it_ends_at_once(tmp_path):
    """Twice within a moment is one request."""
    script = f"""if True:
        from pathlib import Path
        from scaling.train.stop import StopRequest
        with StopRequest(Path({str(tmp_path)!r}) / "STOP"):
            print("ready", flush=True)
            while True:
                pass
    """
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout and process.stderr
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(SAME_REQUEST_S + 0.5)
            process.send_signal(signal.SIGUSR1)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 128 + signal.SIGINT
            assert process.stderr.read().startswith("asked again: stopping at once")
        finally:
            process.kill()


def test_a_step_is_kept_though_its_evaluation_fails_and_is_evaluated_later(
    tmp_path, straight, monkeypatch
):
    def fails(*_):
        raise MemoryError("too large")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("scaling.train.loop.Evaluation.row", fails)
        train(tmp_path, save_every=4)
    assert saved_step(tmp_path) == 4
    train(tmp_path)
    assert_same(tmp_path, straight, 0)


def test_what_validation_cannot_read_is_said_before_the_first_step(tmp_path, monkeypatch):
    lengths = Recall.lengths
    monkeypatch.setattr(
        Recall, "lengths", lambda *a: lengths(*a) + (100 if a[1] == "validation" else 0)
    )
    with pytest.raises(ConfigError, match="max_length=50: sequence 0 of validation has 109"):
        train(tmp_path, max_length=50)
    assert not (tmp_path / "metrics.jsonl").exists()


def not_a_number_on_one_rank(group, folder: Path) -> str:
    def happens(out):
        return out.replace(vectors=out.vectors * float("nan")) if dist.get_rank() == 6 else None

    with pytest.raises(RunError) as error:
        train(folder, dp=2, sp=4, step=2, happens=happens)
    return str(error.value)


def test_a_loss_that_is_not_a_number_stops_every_rank_before_it_spreads(distributed, tmp_path):
    errors = distributed(not_a_number_on_one_rank, 8, tmp_path)
    assert len(set(errors)) == 1 and "loss of step 2 is nan" in errors[0] and "lr" in errors[0]
    (row,) = of_split(read_rows(tmp_path / "metrics.jsonl"), "not_finite")
    assert row["among"] == 2 and all(name in errors[0] for name in row["samples"])  # of dp rank 1
    assert row["ranks"][0] >= 4 and 6 in row["ranks"]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "loss of step 2" in status["error"]
    train(tmp_path)  # the directory is free again, and the run can be started anew
    assert [row["step"] for row in curve(tmp_path)].count(1) == 1


def a_disk_that_is_full(group, folder: Path, dp: int, sp: int, full: int) -> str:
    """Of one rank, from the first checkpoint on, which is that of step 3."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as error:
        if dist.get_rank() == full:
            patch.setattr(
                torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left"))
            )
        train(folder, dp=dp, sp=sp)
    return str(error.value)


@pytest.mark.parametrize(("dp", "sp", "full"), [(1, 8, 0), (2, 4, 3), (4, 2, 7)])
def test_a_checkpoint_that_cannot_be_written_ends_every_rank_alike(
    distributed, tmp_path, dp, sp, full
):
    errors = distributed(a_disk_that_is_full, 8, tmp_path, dp, sp, full)
    assert len(set(errors)) == 1 and "no space left" in errors[0] and "make room" in errors[0]
    last = max(row["step"] for row in curve(tmp_path))
    assert 3 <= last < STEPS and saved_step(tmp_path) == 0
    train(tmp_path)
    assert [row["step"] for row in curve(tmp_path) if row["split"] == "train"] == [*range(1, 7)]


def test_a_run_has_finished_only_when_its_last_checkpoint_is_complete(tmp_path, monkeypatch):
    """A disk that is full at the last one."""
    write, saved = torch.save, []

    def save(content: Any, file: Any) -> None:
        saved.append(file)
        if len(saved) > 2:  # model and optimiser of step 3 are the first two
            raise OSError(28, "no space left")
        write(content, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RunError, match="no space left"):
        train(tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert saved_step(tmp_path) == 3


def test_a_gradient_that_is_not_finite_names_the_step(tmp_path):
    def happens(out):
        out.vectors.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(RunError, match=r"gradient norm of step 2 is nan.*optim.lr"):
        train(tmp_path, step=2, happens=happens)


def test_a_finished_run_says_so_and_may_grow(tmp_path, straight, capsys):
    summary = train(straight)
    said = capsys.readouterr().out
    assert summary.status == "finished" and "nothing left to do: train.steps=12" in said
    assert f"tensorboard --logdir {straight.parent}" in said
    assert "validation loss" in said and "zero" in said  # beside what trivial answers score
    train(tmp_path)
    assert train(tmp_path, steps=STEPS + 1).steps == STEPS + 1
    assert [row["step"] for row in curve(tmp_path) if row["split"] == "train"] == [*range(1, 8)]


def test_accumulating_micro_batches_equals_one_batch(tmp_path, straight):
    train(tmp_path, micro_batch_size=1)
    assert_same(tmp_path, straight, 1e-5)


def in_a_process_of_its_own(folder: str, kill_in: int = 0) -> None:
    torch.set_num_threads(1)

    def happens(out):
        os.kill(os.getpid(), signal.SIGKILL)

    train(Path(folder), step=kill_in, happens=happens if kill_in else None)


if __name__ == "__main__":
    in_a_process_of_its_own(sys.argv[1], *map(int, sys.argv[2:]))
