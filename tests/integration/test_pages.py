"""TensorBoard and the report in headless Chromium: what is drawn is what the rows hold."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from scaling.experiments.board import write_board
from scaling.observe.sinks import PAGES, TensorBoardSink, about_run
from scaling.report.page import write_report
from scaling.runs.folder import RunFolder
from tests.browser import PATIENCE_S, Browser, browser
from tests.sweep_rows import known_fits, known_rows, run_config, run_rows, write_folder

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

FIND = """
const all = (root, name) => [...root.querySelectorAll('*')].flatMap(each => [
  ...(each.matches(name) ? [each] : []), ...(each.shadowRoot ? all(each.shadowRoot, name) : [])]);
const points = card => all(card.shadowRoot, 'path.line').map(
  line => (line.getAttribute('d') || '').match(/[ML]/g)?.length || 0).sort();
const open = () => all(document, 'tf-category-paginated-view').forEach(each => {
  if (!each.opened) all(each.shadowRoot, 'button.heading').forEach(button => button.click());
});
"""
"""Elements of a page, those in shadow roots too; how many points each line of a card has; and what
opens every section."""
OF_RUNS = {
    "train/loss": [4, 4], "validation/loss": [4, 4], "memory/peak_bytes": [4, 4],
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
    """Address of one that shows a run, one whose loss is gone, and a sweep."""
    folder = tmp_path_factory.mktemp("logs")
    record(folder / "whole", run_rows())
    lacking = [{k: v for k, v in row.items() if k != "grad_norm"} for row in run_rows()]
    record(folder / "lacking", lacking)
    write_board(RunFolder(write_folder(folder / "known", known_rows(), fits=known_fits())))
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0",
               "--load_fast", "false", "--reload_interval", "0"]  # fmt: skip
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
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


def cards(page: Browser, address: str, dashboard: str, kind: str, title: str) -> dict[str, Any]:
    """Title -> points of each line of the cards of a dashboard, when all have been drawn."""
    page.resize(1600, 9000)
    page.call("Page.navigate", url="about:blank")
    page.open(f"{address}#{dashboard}&_smoothingWeight=0")
    script = f"""(() => {{ {FIND}
      open();
      const seen = all(document, '{kind}').map(card => [{title}, points(card)]);
      return seen.length && seen.every(([_, n]) => n.length && n[0] > 0) ? seen : null;
    }})()"""
    drawn, before = None, {}
    while drawn != before:  # sections open one after another
        before = drawn
        drawn = dict(page.wait_for(script))
        sleep(3)
    return drawn or {}


def test_scalars_are_the_rows_and_a_tag_that_is_gone_is_noticed(page: Browser, tensorboard: str):
    drawn = cards(page, tensorboard, "scalars", "tf-scalar-card", "card.tag")
    of_sweep = {f"{name}/{line}": [points] for name, lines in OF_SWEEP.items()
                for line, points in lines.items()}  # fmt: skip
    assert drawn == OF_RUNS | of_sweep
    # Two runs with all their tags would be another page: the one taken away is seen.
    whole = {tag: [4, 4] for tag in OF_RUNS}
    assert {tag for tag in whole if drawn.get(tag) != whole[tag]} == {"train/grad_norm"}


def test_custom_scalars_are_pages_of_the_same_points(page: Browser, tensorboard: str):
    kind = "tf-custom-scalar-multi-line-chart-card"
    drawn = cards(
        page, tensorboard, "custom_scalars", kind, "card.title || card._titleDisplayString"
    )
    of_runs = {
        chart: sorted(n for tag in tags for n in OF_RUNS.get(tag, []))
        for charts in PAGES.values()
        for chart, tags in charts.items()
    }
    of_sweep = {name: sorted(lines.values()) for name, lines in OF_SWEEP.items()}
    assert {title.partition(": ")[0]: points for title, points in drawn.items()} == (
        of_runs | of_sweep
    )


def test_images_texts_and_hyperparameters_are_there(page: Browser, tensorboard: str):
    page.call("Page.navigate", url="about:blank")
    page.open(f"{tensorboard}#images")
    script = f"""(() => {{ {FIND}
      open();
      const seen = all(document, 'tf-image-loader');
      const drawn = seen.filter(each => all(each.shadowRoot, 'img').some(i => i.naturalWidth > 99));
      return drawn.length >= {len(OF_SWEEP)} ? seen.map(each => each.tag) : null;
    }})()"""
    assert sorted(page.wait_for(script)) == sorted(f"scaling/{name}" for name in OF_SWEEP)
    page.call("Page.navigate", url="about:blank")
    page.open(f"{tensorboard}#text")
    said = page.wait_for(f"""(() => {{ {FIND}
      open();
      const seen = all(document, 'tf-text-loader').map(e => e.tag + all(e.shadowRoot, 'pre').map(
        each => each.textContent).join(''));
      return seen.length == 6 && seen.every(each => each.includes(' ')) ? seen.join('') : null;
    }})()""")
    assert said.count("python -m launch sweep sweep=known") == 3 and "channels: 16" in said
    page.call("Page.navigate", url="about:blank")
    page.open(f"{tensorboard}#hparams")
    table = page.wait_for(f"""(() => {{ {FIND}
      const seen = all(document, 'vaadin-grid, tf-hparams-table-view');
      const words = seen.map(each => each.textContent + all(each, 'vaadin-grid-cell-content').map(
        cell => cell.textContent).join(' ')).join(' ');
      return words.includes('whole') && words.includes('validation/loss') ? words : null;
    }})()""")
    assert "model.channels" in table and "lacking" in table and "0.5" in table


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
