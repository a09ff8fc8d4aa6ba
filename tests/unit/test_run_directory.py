"""One directory, one configuration, one writer."""

import json

import pytest

from data_pipeline.errors import RunError
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
    run = RunDirectory(tmp_path, IDENTITY, {})
    run.set_status("running", 1)
    pid = run.status()["pid"]
    with pytest.raises(RunError, match=f"being written by process {pid} on"):
        RunDirectory(tmp_path, IDENTITY, {})
    run.close()
    RunDirectory(tmp_path, IDENTITY, {}).close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run cannot be written.*runs=") as error:
        RunDirectory(tmp_path / "file" / "run", IDENTITY, {})
    assert "\n" not in str(error.value)
