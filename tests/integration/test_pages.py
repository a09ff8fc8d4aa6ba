"""TensorBoard and the report in headless Chromium: what is drawn is what the rows hold."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import quote

import pytest

from scaling.experiments.board import write_board
from scaling.observe.sinks import PAGES, TensorBoardSink, about_run
from scaling.report.page import write_report
from scaling.runs.folder import RunFolder
from scaling.runs.rows import of_split, read_rows
from tests.browser import PATIENCE_S, Browser, browser
from tests.sweep_rows import known_fits, known_rows, run_config, run_rows, write_folder

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

DOCS = Path(__file__).parents[2] / "docs"
DRAWN = """
(() => {
  const all = (root, name) => [...root.querySelectorAll('*')].flatMap(each => [
    ...(each.matches(name) ? [each] : []), ...(each.shadowRoot ? all(each.shadowRoot, name) : [])]);
  all(document, 'tf-category-paginated-view').forEach(each => {
    if (!each.opened) all(each.shadowRoot, 'button.heading').forEach(button => button.click());
  });
  const cards = all(document, 'tf-scalar-card').map(card => [card.tag, all(card.shadowRoot,
    'path.line').map(line => (line.getAttribute('d') || '').match(/[ML]/g)?.length || 0).sort()]);
  const drawn = cards.filter(([_, lines]) => lines.length && lines[0] > 0);
  return drawn.length ? drawn : null;
})()
"""
"""Of the cards that are drawn by now (those in sight): tag, and how many points each line has."""
OF_RUNS = {
    "loss/train": [4, 4], "loss/validation": [4, 4], "memory/peak_bytes": [4, 4],
    "speed/tokens": [4, 4], "speed/tokens_per_s": [4, 4], "time/step_s": [4, 4],
    "time/projection_s": [4, 4], "time/transforms_s": [4, 4], "time/comm_s": [4, 4],
    "time/other_s": [4, 4], "exchange/comm_bytes": [4, 4], "train/grad_norm": [4],
    "train/lr": [4, 4], "validation/tokens": [4, 4], "validation/equivariance_error": [4, 4],
}  # fmt: skip
"""Tag -> points of each line: two runs of four steps, the second without its gradient norm."""
OF_SWEEP = {
    "strong scaling": {"N 4,096": 3, "N 8,192": 2},
    "weak scaling": {"tokens of a rank 1,024": 2, "tokens of a rank 2,048": 3},
    "step time over length": {"se3_hyena, sp 1": 6, "egnn, sp 1": 2, "se3_hyena, sp 2": 1,
                              "se3_hyena, sp 4": 2},
    "memory frontier": {"se3_hyena, sp 1": 6, "egnn, sp 1": 2, "se3_hyena, sp 2": 1,
                        "se3_hyena, sp 4": 2},
    "loss against compute": {"se3_hyena": 3},
}  # fmt: skip
"""Figure -> line -> points, of `known_rows`: the cell that failed is in none."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


def record(folder: Path, rows: list[dict]) -> None:
    """A run's folder, and its TensorBoard."""
    run = RunFolder(write_folder(folder, rows, run_config(folder.name)))
    (run.path / "identity.json").write_text(json.dumps({"model": run.config()["model"]}))
    sink = TensorBoardSink(run.tensorboard)
    sink.start(run.rows(), about_run(run))
    sink.close()


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of one that shows a run, one that lacks a tag, and a sweep."""
    folder = tmp_path_factory.mktemp("logs")
    record(folder / "whole", run_rows())
    lacking = [{k: v for k, v in row.items() if k != "grad_norm"} for row in run_rows()]
    record(folder / "lacking", lacking)
    write_board(RunFolder(write_folder(folder / "known", known_rows(), fits=known_fits())))
    with serving(folder) as address:
        yield address


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """TensorBoard on a folder, until the end."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.name, "--port", "0",
               "--load_fast", "false", "--reload_interval", "0"]  # fmt: skip
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder.parent, stdout=output, stderr=output)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen, log: Path) -> str:
    deadline = monotonic() + PATIENCE_S
    while "http://" not in (said := log.read_text()):
        assert process.poll() is None and monotonic() < deadline, said
        sleep(0.2)
    return "http://" + said.partition("http://")[2].split()[0]


def asked(page: Browser, address: str) -> Any:
    """What a page of TensorBoard gets to draw from."""
    return page.evaluate(f"fetch('data/plugin/{address}').then(answer => answer.json())")


def test_scalars_are_the_rows_and_a_tag_that_is_gone_is_noticed(page: Browser, tensorboard: str):
    page.resize(1600, 3000)
    page.open(f"{tensorboard}#scalars&_smoothingWeight=0")
    found: dict[str, list[int]] = {}
    for run, tags in sorted(asked(page, "scalars/tags").items(), reverse=True):
        for tag in tags:
            points = asked(page, f"scalars/scalars?run={quote(run)}&tag={quote(tag)}")
            found.setdefault(tag, []).append(len(points))
    of_sweep = {f"{name}/{line}": [points] for name, lines in OF_SWEEP.items()
                for line, points in lines.items()}  # fmt: skip
    assert found == OF_RUNS | of_sweep
    # Two runs with all their tags would be another page: the one taken away is seen.
    assert [tag for tag in OF_RUNS if found[tag] != [4, 4]] == ["train/grad_norm"]
    for tag, lines in page.wait_for(DRAWN):
        assert lines == sorted(found[tag]), tag


def test_the_readmes_picture_shows_the_recorded_runs(page: Browser, tmp_path: Path):
    """LONGFOLD_PICTURES=docs puts it where the README has it."""
    shown = "loss|tokens_per_s|equivariance|comm_bytes|peak"
    rows = {name: read_rows(DOCS / f"runs/{name}.jsonl") for name in ("first_light", "recall")}
    for name, of_run in rows.items():
        record(tmp_path / "runs" / name, of_run)
    with serving(tmp_path / "runs") as address:
        page.resize(1500, 770)
        page.open(f"{address}#scalars&_smoothingWeight=0&tagFilter={quote(shown)}")
        drawn = page.wait_for(f"(drawn => drawn && drawn.length >= 6 && drawn)({DRAWN.strip()})")
        for name, of_run in rows.items():
            for split in ("train", "validation"):
                tag = f"run={name}/tensorboard&tag=loss/{split}"
                losses = [value for *_, value in asked(page, f"scalars/scalars?{tag}")]
                assert losses == pytest.approx([row["loss"] for row in of_split(of_run, split)])
    assert {"exchange/comm_bytes", "loss/train", "memory/peak_bytes"} <= {tag for tag, _ in drawn}
    assert all(len(lines) == 2 for _, lines in drawn)
    page.screenshot(Path(os.environ.get("LONGFOLD_PICTURES", tmp_path)) / "tensorboard.png")


def test_custom_scalars_images_and_texts_are_there(page: Browser, tensorboard: str):
    page.open(f"{tensorboard}#custom_scalars")
    layouts = asked(page, "custom_scalars/layout")
    titles = {chart["title"].partition(": ")[0]: chart["multiline"]["tag"]
              for page_ in layouts["category"] for chart in page_["chart"]}  # fmt: skip
    assert set(titles) == {chart for charts in PAGES.values() for chart in charts} | set(OF_SWEEP)
    for name, lines in OF_SWEEP.items():
        (tag,) = titles[name]
        got = asked(page, f"custom_scalars/scalars?run=known/tensorboard&tag={quote(tag)}")
        assert {each: len(points) for each, points in got["tag_to_events"].items()} == {
            f"{name}/{line}": points for line, points in lines.items()
        }
    images = asked(page, "images/tags")["known/tensorboard"]
    assert sorted(images) == sorted(f"scaling/{name}" for name in OF_SWEEP)
    text = asked(page, "text/text?run=known/tensorboard&tag=command/text_summary")
    assert "python -m launch sweep sweep=known" in text[0]["text"]


GROUPS = """
(() => fetch('data/plugin/hparams/session_groups', {method: 'POST', body: JSON.stringify({
  experimentName: '', allowedStatuses: ['STATUS_UNKNOWN', 'STATUS_SUCCESS', 'STATUS_RUNNING'],
  colParams: [], startIndex: 0, sliceSize: 100})}).then(answer => answer.json()))()
"""
"""What the page of hyperparameters gets to draw from."""


SHOWN = """
(() => {
  const text = root => [...root.childNodes].map(each => each.nodeType === 3 ? each.data :
    ['STYLE', 'SCRIPT'].includes(each.tagName) ? '' :
    text(each) + (each.shadowRoot ? text(each.shadowRoot) : '')).join(' ');
  const shown = text(document.body);
  return shown.includes('whole/tensorboard') ? shown : null;
})()
"""
"""All text of the page, once it names the first run."""


def test_hyperparameters_stand_beside_the_final_loss(page: Browser, tensorboard: str):
    """As the page gets them, and as its table shows them."""
    page.open(f"{tensorboard}#hparams")
    runs = {each["name"].partition("/")[0]: each for each in page.evaluate(GROUPS)["sessionGroups"]}
    assert set(runs) == {"whole", "lacking"}
    expected = {row["split"]: row["loss"] for row in run_rows()}  # the last of each
    for name, each in runs.items():
        assert each["hparams"] == {"model.name": "se3_hyena", "model.channels": 16}
        final = {metric["name"]["tag"]: metric["value"] for metric in each["metricValues"]}
        assert ("train/grad_norm" in final) == (name == "whole")
        for split, loss in expected.items():
            assert final[f"loss/{split}"] == pytest.approx(loss)
    texts = ["model.name", "se3_hyena", "model.channels", "loss/validation",
             f"{expected['validation']:.5f}"]  # fmt: skip
    # The table comes in pieces: names before numbers.
    page.wait_for(f"(all => {json.dumps(texts)}.every(text => all && all.includes(text)))({SHOWN})")


@pytest.mark.parametrize(
    ("width", "media", "dark"),
    [(1200, "", False), (375, "", False), (1200, "", True), (794, "print", False)],
    ids=["wide", "phone", "dark", "print"],
)
def test_the_report_fits_every_page_and_the_console_is_silent(
    page: Browser, tmp_path: Path, width: int, media: str, dark: bool
):
    run = write_folder(tmp_path / "whole", run_rows(), run_config("whole"))
    sweep = write_folder(tmp_path / "known", known_rows(), fits=known_fits())
    file = write_report([str(run), str(sweep)], str(tmp_path / "report.html"), None)
    page.resize(width, 900)
    page.emulate(media, dark)
    page.open(f"file://{file}")
    assert page.said == []
    assert page.requested == [f"file://{file}"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('svg path').length") > 100
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('svg text')).fill,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    light = [int(colour.partition("(")[2].partition(",")[0]) > 127 for colour in (ink, paper)]
    assert light == ([True, False] if dark else [False, True])
    page.emulate()
