"""The report says what the folders hold, and says so where they hold nothing."""

import json
import re
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, RunError
from launch import report
from scaling.experiments.board import write_board
from scaling.report.page import render, write_report
from scaling.report.sources import Run, read_source
from scaling.runs.folder import RunFolder
from tests.sweep_rows import cell, known_fits, known_rows, run_config, run_rows, write_folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two runs and a sweep with fits."""
    first, second = (
        write_folder(tmp_path / name, run_rows(), run_config(name)) for name in ("a", "b")
    )
    return first, second, write_folder(tmp_path / "known", known_rows(), fits=known_fits())


def words(page: str) -> str:
    """The text that a reader sees."""
    page = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_everything_is_in_one_file_that_asks_for_nothing(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report.main([*map(str, folders), f"{folders[0]}/"])
    assert capsys.readouterr().out == "report    report.html\n"
    page = (tmp_path / "report.html").read_text()
    said = words(page)
    assert page.count("<svg") == 2 + 5 and page.count("</svg>") == 7
    # Names of XML's vocabularies are no addresses that a browser asks for.
    outside = re.sub(r' xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", outside)
    assert "Which of these runs learns best" in said and "How do time, memory and loss" in said
    assert "a se3_hyena recall finished 4 0.25 0.5 1e-06 200 64" in said
    assert "b = 1.08 (1.01 to 1.15)" in said and "0.33 (0.3 to 0.4) -3.0% yes" in said
    assert "refused: g: two scales of P, five are needed" in said
    assert "Not measured: egnn_N2048_sp1: out of memory" in said
    assert "python -m launch plan" in said  # there is no prediction yet
    assert "python -m launch sweep sweep=known" in said and "0123abc" in said
    assert "torch 2.13.0" in said and "channels: 16" in said
    assert "25% 0% 20%" in said  # where the time of a step goes
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_what_has_not_been_made_is_said_and_what_has_been_is_shown(tmp_path):
    folder = write_folder(tmp_path / "known", known_rows())
    page = words(render([read_source(folder)]))
    assert f"Nothing has been fitted yet: python -m launch fit {folder}" in page
    (folder / "plan.json").write_text(json.dumps({"text": "1,024 ranks: <b>31 GiB</b>"}))
    page = render([read_source(folder)], question="How <large>?")
    assert "1,024 ranks: &lt;b&gt;31 GiB" in page and "<h1>How &lt;large&gt;?</h1>" in page
    assert write_report([str(folder)], None, None) == folder / "report.html"


def test_a_report_of_the_same_rows_is_the_same_file(folders):
    assert render([read_source(folders[2])]) == render([read_source(folders[2])])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "No step has been recorded yet"),
        ([{"step": 1, "split": "train", "loss": 0.5}], "1 of 1 rows were left out"),
        ([*run_rows(), {"step": 5}], "1 of 9 rows were left out"),
        ([*run_rows(), run_rows()[0] | {"loss": float("nan")}], "1 of 9 rows were left out"),
    ],
    ids=["empty", "no columns", "no split", "not finite"],
)
def test_runs_that_lack_rows_or_columns_are_shown_with_a_note(tmp_path, rows, said):
    folder = write_folder(tmp_path / "a", rows, run_config("a"))
    (folder / "status.json").write_text(json.dumps({"state": "failed", "error": "full disk"}))
    run = read_source(folder)
    assert isinstance(run, Run)
    page = words(render([run]))
    assert said in page and "The run is failed: full disk." in page


@pytest.mark.parametrize(
    ("rows", "said", "figures"),
    [
        ([], "No point has been measured yet", 0),
        ([{"point": "x", "status": "out of memory"}], "No row has the columns", 0),
        ([{"point": "x", "status": "ok", "kind": "step"}], "No row has the columns", 0),
        ([cell()], "1,024", 2),
    ],
    ids=["empty", "only failed", "no columns", "one point"],
)
def test_sweeps_of_nothing_or_of_one_point(tmp_path, rows, said, figures):
    folder = write_folder(tmp_path / "known", rows)
    page = render([read_source(folder)])
    assert said in words(page) and page.count("<svg") == figures
    write_board(RunFolder(folder))


def test_half_a_last_line_is_no_row_and_a_damaged_one_is_named(tmp_path):
    folder = write_folder(tmp_path / "a", run_rows(), run_config("a"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')
    assert len(read_source(folder).rows) == 8
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RunError, match=r"metrics.jsonl, line 9 is no row: '\{\"step.*remove"):
        read_source(folder)


@pytest.mark.parametrize("name", ["fits.json", "plan.json"])
def test_damaged_files_are_named_with_what_writes_them_again(tmp_path, name):
    folder = write_folder(tmp_path / "known", known_rows())
    (folder / name).write_text("{")
    with pytest.raises(RunError, match=rf"{name} cannot be read .*python -m launch"):
        render([read_source(folder)])


def test_what_is_no_run_or_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="report takes folders before the first key=value"):
        report.main([])
    with pytest.raises(RunError, match="there is no such folder"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(RunError, match=r"is no run \(has no config.yaml\)"):
        report.main([str(tmp_path)])
    bench = write_folder(tmp_path / "bench", [], {"bench": {"name": "models"}})
    with pytest.raises(RunError, match=r"is a bench: .*summary"):
        report.main([str(bench)])
    folder = write_folder(tmp_path / "known", [cell()])
    with pytest.raises(RunError, match=r"cannot be written .*output="):
        report.main([str(folder), f"output={tmp_path}/nowhere/report.html"])
