"""What a rank says is in its log; one rank alone is heard."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from scaling.runs import log
from scaling.runs.folder import RunFolder
from scaling.runs.log import RankLog

_log = logging.getLogger("longfold.test")


def records(run: Path, rank: int, ending: str = "") -> list[dict[str, Any]]:
    lines = (run / "logs" / f"rank-{rank:05d}.jsonl{ending}").read_text().splitlines()
    return [json.loads(line) for line in lines if line != "half a li"]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_writes_what_it_hears_and_the_first_one_shows_warnings(tmp_path, rank, capfd):
    """From before there was a folder, too, in order; behind an earlier start that was killed."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"rank-{rank:05d}.jsonl").write_text("half a li")
    run = RunFolder(tmp_path)
    with warnings.catch_warnings(), RankLog(rank) as mine:
        warnings.simplefilter("always")
        warnings.warn("odd", UserWarning, stacklevel=1)
        _log.info("early")
        with mine.written_to(run, "cpu"):
            run.step = 7
            _log.warning("the disk\nis slow")
    _log.warning("nobody's")
    said = records(tmp_path, rank)
    assert [record["text"].partition(" ")[2] for record in said[1:]] == [
        "", f"{os.getpid()} begins, cpu: {said[2]['text'].partition('cpu: ')[2]}",
        "disk\nis slow", f"{os.getpid()} ends",
    ]  # fmt: skip
    assert "UserWarning: odd" in said[0]["text"] and said[0]["level"] == "WARNING"
    assert [record["step"] for record in said] == [0, 0, 0, 7, 7]
    assert {record["rank"] for record in said} == {rank}
    shown = capfd.readouterr()
    assert ("odd" in shown.err, "slow" in shown.err, "early" in shown.err) == (
        rank == 0, rank == 0, False,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_is_there_with_its_traceback_and_is_told_where(tmp_path, rank, capfd):
    """The screen gets it from whoever ends the process."""
    with (
        pytest.raises(RuntimeError, match="boom") as error,
        RankLog(rank) as mine,
        mine.written_to(RunFolder(tmp_path), "cpu"),
    ):
        raise RuntimeError("boom")
    assert not capfd.readouterr().err
    last = records(tmp_path, rank)[-1]
    assert last["level"] == "CRITICAL" and last["traceback"].endswith("RuntimeError: boom\n")
    assert "written_to" in last["traceback"]
    assert error.value.__notes__ == [f"this rank's log is {tmp_path}/logs/rank-0000{rank}.jsonl"]


def test_without_a_folder_warnings_of_other_ranks_are_shown(capfd):
    with pytest.raises(RuntimeError), RankLog(1):
        _log.info("early")
        _log.warning("odd")
        raise RuntimeError
    assert capfd.readouterr().err == "odd\n"


def test_it_takes_no_more_room_than_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "LARGEST", 2000)
    monkeypatch.setattr(log, "LONGEST", 100)
    with RankLog(1) as mine, mine.written_to(RunFolder(tmp_path), "cpu"):
        for number in range(100):
            _log.info("%d %s", number, "x" * 200)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["rank-00001.jsonl", "rank-00001.jsonl.1"]
    assert all(500 < file.stat().st_size <= 2000 for file in files)
    said = records(tmp_path, 1, ".1") + records(tmp_path, 1)
    assert [int(each["text"].split()[0]) for each in said[:-1]] == [*range(100)][1 - len(said) :]
    assert said[0]["text"].endswith(" ... (103 characters more)")


def test_a_disk_that_takes_nothing_is_said_once_and_ends_nothing(tmp_path, capfd):
    (tmp_path / "logs").touch()
    with RankLog(1) as mine, mine.written_to(RunFolder(tmp_path), "cpu"):
        _log.info("heard by nobody")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/logs/rank-00001.jsonl cannot be written")
