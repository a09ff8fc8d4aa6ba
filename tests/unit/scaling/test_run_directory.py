"""One directory, one configuration, one writer."""

import json
import os
import shutil
import socket

import pytest

from data_pipeline.errors import RunError
from data_pipeline.tasks.registry import build_task
from scaling.train.report import Reporter
from scaling.train.run import RunDirectory

IDENTITY = {
    "task": {"name": "recall", "tokens": 9},
    "train": {"steps": 10, "seed": 0, "micro_batch_size": 4, "log_every": 1},
}


def changed(section: str, key: str, value) -> dict:
    return {**IDENTITY, section: {**IDENTITY[section], key: value}}


def test_it_holds_what_a_reader_needs(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "first", IDENTITY, {"name": "first", **IDENTITY})
    names = {path.name for path in run.path.iterdir()}
    assert {"config.yaml", "environment.json", "checkpoints", "tensorboard"} <= names
    assert "name: first" in (run.path / "config.yaml").read_text()
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["world"] == 1
    assert run.status() == {}
    run.set_status("running", 3)
    assert (run.status()["state"], run.status()["step"]) == ("running", 3)
    run.close()


def test_another_configuration_is_refused_with_both_values(tmp_path):
    RunDirectory(tmp_path, IDENTITY, {}).close()
    for section, key, value, said in [
        ("task", "tokens", 17, "task.tokens was 9, is 17"),
        ("train", "seed", 1, "train.seed was 0, is 1"),
        ("train", "steps", 5, "train.steps was 10, is 5"),
        ("train", "new", "x", "train.new was None, is 'x'"),
    ]:
        with pytest.raises(RunError, match=said) as error:
            RunDirectory(tmp_path, changed(section, key, value), {})
        assert "name=" in str(error.value) and "\n" not in str(error.value)
    # A refused start leaves everything as it was, and nobody locked out.
    assert json.loads((tmp_path / "identity.json").read_text()) == IDENTITY
    RunDirectory(tmp_path, IDENTITY, {}).close()


def test_what_does_not_change_the_result_may_change(tmp_path):
    RunDirectory(tmp_path, IDENTITY, {}).close()
    RunDirectory(tmp_path, changed("train", "micro_batch_size", 1), {}).close()
    RunDirectory(tmp_path, changed("train", "log_every", 5), {}).close()
    RunDirectory(tmp_path, changed("train", "steps", 20), {}).close()  # it may grow


def test_two_writers_are_one_too_many(tmp_path):
    """The owner is named from the first moment, and stays named however many ask."""
    run = RunDirectory(tmp_path, IDENTITY, {})
    owner = f"being written by process {os.getpid()} on {socket.gethostname()};"
    for _ in range(2):
        with pytest.raises(RunError, match=owner):
            RunDirectory(tmp_path, IDENTITY, {})
    run.close()
    RunDirectory(tmp_path, IDENTITY, {}).close()


@pytest.mark.parametrize("content", ["", "[1]", '{"half'])
def test_a_damaged_file_is_named(tmp_path, content):
    run = RunDirectory(tmp_path, IDENTITY, {})
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(RunError, match=r"status\.json is damaged .* remove it"):
        run.status()
    run.close()
    (tmp_path / "identity.json").write_text(content)
    with pytest.raises(RunError, match=r"identity\.json is damaged .* remove it"):
        RunDirectory(tmp_path, IDENTITY, {})


def test_a_directory_removed_meanwhile_is_one_line_at_every_write(tmp_path):
    row = {"step": 1, "split": "validation", "loss": 1.0, "equivariance_error": 0.0}
    for write in (
        lambda report: report.row(row),
        lambda report: [report.advance(1, saved=True) for _ in range(2)],
        lambda report: report.finish(1),
    ):
        run = RunDirectory(tmp_path / "run", IDENTITY, {})
        task = build_task("recall", tokens=9, held_out_size=1)
        with (
            pytest.raises(RunError, match=f"cannot write to the run {run.path}: ") as error,
            Reporter(run, task, 2) as report,
        ):
            report.start(0)
            shutil.rmtree(run.path)
            write(report)
        assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run cannot be written.*runs=") as error:
        RunDirectory(tmp_path / "file" / "run", IDENTITY, {})
    assert "\n" not in str(error.value)
