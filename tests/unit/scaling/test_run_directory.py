"""One folder, one configuration, one writer, any number of readers."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from time import time
from typing import Annotated

import pytest

from data_pipeline.errors import RunError
from data_pipeline.tasks.registry import build_task
from scaling.runs.folder import RunFolder, State, claimed
from scaling.runs.identity import Identity, MayGrow, NotIdentity
from scaling.train.report import Reporter


@dataclass
class Task:
    tokens: int = 9
    weights: tuple[int, ...] = (1, 2)


@dataclass
class Train:
    steps: Annotated[int, MayGrow()] = 10
    seed: int = 0
    micro_batch_size: Annotated[int, NotIdentity()] = 4


@dataclass
class LaterTask(Task):
    """An option more: the program used to do what it says by default."""

    new: str = "as ever"


def identity(task: Task | None = None, **train: int) -> Identity:
    task = task or Task()
    sections = {"task": (type(task), {"name": "recall"} | asdict(task))}
    return Identity(sections | {"train": (Train, asdict(Train(**train)))})


def claim(path, task: Task | None = None, config=None, environment=None, **train: int):
    return claimed(path, identity(task, **train), config or {}, environment or {"world": 1})


def open_and_close(*arguments, **options) -> None:
    with claim(*arguments, **options):
        pass


def test_a_reader_needs_no_lock_and_changes_nothing(tmp_path):
    path = tmp_path / "runs" / "first"
    assert RunFolder(path).status() == {} and RunFolder(path).rows() == []
    assert not path.exists()
    with claim(path, config={"name": "first"}) as run:
        run.step = 3
        run.set_status("running")
        began = time()
        run.append({"step": 3, "split": "train", "loss": 1.0})
        before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
        reader = RunFolder(path)
        assert (path / "config.yaml").read_text() == "name: first\n"
        assert json.loads((path / "environment.json").read_text()) == {"world": 1}
        assert (reader.status()["state"], reader.status()["step"]) == ("running", 3)
        assert reader.identity()["task"] == {"name": "recall", "tokens": 9, "weights": [1, 2]}
        (row,) = reader.rows()
        assert row.items() >= {"step": 3, "loss": 1.0}.items() and began <= row["time"] <= time()
    assert before == {file.name: file.stat().st_mtime_ns for file in path.iterdir()}


def test_reading_needs_no_torch(tmp_path):
    code = "import sys; from scaling.runs.folder import RunFolder; RunFolder('x').rows(); "
    code += "import scaling.runs.environment; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_another_configuration_is_refused_with_both_values(tmp_path):
    open_and_close(tmp_path)
    for task, train, said in [
        (Task(17), {}, "task.tokens was 9, is 17"),
        (Task(weights=(1, 3)), {}, r"task.weights was \[1, 2\], is \[1, 3\]"),
        (Task(), {"seed": 1}, "train.seed was 0, is 1"),
        (Task(), {"steps": 5}, "train.steps was 10, is 5"),
    ]:
        with pytest.raises(RunError, match=said) as error:
            open_and_close(tmp_path, task, **train)
        assert "name=" in str(error.value) and "\n" not in str(error.value)
    # A refused start leaves everything as it was, and nobody locked out.
    assert RunFolder(tmp_path).identity() == identity().values()
    open_and_close(tmp_path)


def test_what_does_not_change_the_result_may_change(tmp_path):
    open_and_close(tmp_path)
    open_and_close(tmp_path, micro_batch_size=1)
    open_and_close(tmp_path, steps=20)  # it may grow


def test_an_option_gained_since_goes_on_with_what_the_program_did_before(tmp_path):
    open_and_close(tmp_path)
    with pytest.raises(RunError, match=r"task.new was 'as ever', is 'other'"):
        open_and_close(tmp_path, LaterTask(new="other"))
    open_and_close(tmp_path, LaterTask())
    with pytest.raises(RunError, match=r"task.new was 'as ever', is no option"):
        open_and_close(tmp_path)


def test_identities_of_earlier_versions_are_understood(tmp_path):
    """They named what does not belong to it, and left out what the user had not given."""
    earlier = {"task": {"name": "recall"}, "train": {"steps": 10, "seed": 0, "micro_batch_size": 2}}
    (tmp_path / "identity.json").write_text(json.dumps(earlier))
    with pytest.raises(RunError, match=r"configuration: task.tokens was 9, is 17; use"):
        open_and_close(tmp_path, Task(17))
    open_and_close(tmp_path)


def test_two_writers_are_one_too_many(tmp_path):
    """The owner is named from the first moment, and stays named however many ask."""
    owner = f"being written by process {os.getpid()} on {socket.gethostname()};"
    with claim(tmp_path):
        for _ in range(2):
            with pytest.raises(RunError, match=owner):
                open_and_close(tmp_path)
    open_and_close(tmp_path)


def test_a_second_start_rewrites_nothing_that_is_right(tmp_path):
    open_and_close(tmp_path, config={"name": "x"})
    files = [tmp_path / name for name in ("config.yaml", "identity.json", "environment.json")]
    before = [file.stat().st_ino for file in files]
    open_and_close(tmp_path, config={"name": "x"})
    assert [file.stat().st_ino for file in files] == before
    open_and_close(tmp_path, config={"name": "y"})
    assert [file.stat().st_ino == ino for file, ino in zip(files, before, strict=True)] == [
        False, True, True,
    ]  # fmt: skip


def test_an_error_is_noted_unless_the_run_had_finished(tmp_path):
    states: list[tuple[State, State]] = [("running", "failed"), ("finished", "finished")]
    for state, noted in states:
        with pytest.raises(ZeroDivisionError), claim(tmp_path) as run:
            run.set_status(state)
            raise ZeroDivisionError("division by zero")
        assert run.status()["state"] == noted
        said = "ZeroDivisionError: division by zero" if noted == "failed" else None
        assert run.status()["error"] == said
    with pytest.raises(KeyboardInterrupt), claim(tmp_path) as run:
        run.set_status("running")
        raise KeyboardInterrupt
    assert run.status()["error"].startswith("KeyboardInterrupt")


@pytest.mark.parametrize("content", ["", "[1]", '{"half'])
def test_a_damaged_file_is_named(tmp_path, content):
    open_and_close(tmp_path)
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(RunError, match=r"status\.json is damaged .* remove it"):
        RunFolder(tmp_path).status()
    (tmp_path / "identity.json").write_text(content)
    with pytest.raises(RunError, match=r"identity\.json is damaged .* remove it"):
        open_and_close(tmp_path)


def test_rows_are_dropped_at_once_and_half_a_row_is_none(tmp_path):
    with claim(tmp_path) as run:
        assert run.keep(lambda row: True) == []
        run.append(*({"step": step, "split": "train"} for step in (1, 2, 3)))
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 4, "spl')
        assert [row["step"] for row in run.rows()] == [1, 2, 3]
        assert [row["step"] for row in run.keep(lambda row: row["step"] <= 2)] == [1, 2]
        run.append({"step": 3, "split": "train", "loss": 1 / 3})
        assert [row["step"] for row in run.rows()] == [1, 2, 3]
        assert run.rows()[2]["loss"] == 1 / 3
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_removed_meanwhile_is_one_line_at_every_write(tmp_path):
    row = {"step": 1, "split": "validation", "loss": 1.0, "equivariance_error": 0.0}
    for write in (
        lambda report: report.row(row),
        lambda report: [report.advance(1, saved=True) for _ in range(2)],
        lambda report: report.finish(1),
    ):
        task = build_task("recall", tokens=9, held_out_size=1)
        with (
            pytest.raises(RunError, match=r"cannot write to the run .*/run: ") as error,
            claim(tmp_path / "run") as run,
            Reporter(run, task, 2) as report,
        ):
            report.start(0)
            shutil.rmtree(run.path)
            write(report)
        assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run cannot be written.*runs=") as error:
        open_and_close(tmp_path / "file" / "run")
    assert "\n" not in str(error.value)
