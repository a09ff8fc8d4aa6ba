"""Runs an experiment: measures what is missing, concludes, and writes it all into a run folder.

points/<name>/      what a point's processes were told, found and said
rows.csv            all rows        summary.md      the table, what it was measured on and how
figure.png          a bench: the concluded rows over N; a sweep: what it says about scaling
tensorboard/        of a sweep: the same
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from data_pipeline.disk import locked
from data_pipeline.errors import RunError
from scaling.experiments.board import FIGURE, write_board
from scaling.experiments.experiment import Experiment, Point
from scaling.experiments.figures import draw
from scaling.experiments.options import Running
from scaling.experiments.views import as_csv, plot, table
from scaling.observe.memory import hardware
from scaling.runs.environment import describe_environment
from scaling.runs.folder import RunFolder, RunWriter, claimed, tensorboard_command
from scaling.runs.identity import Identity
from scaling.runs.rows import Row

TABLE, SUMMARY = "rows.csv", "summary.md"


Measure = Callable[[Point, Path], tuple[str, list[Row]]]
"""Measures a point in a folder of its own: "ok" and its rows, or why there are none."""


def run_experiment(
    experiment: Experiment,
    measure: Measure,
    running: Running,
    identity: Identity,
    parent: str,
    command: Sequence[str],
    only: int | None = None,
) -> None:
    """Measures the points that the folder lacks or that failed, then shows all.

    Several processes may share a folder: each point is measured by one of them, and the last to
    end shows all.

    Args:
        running: the whole configuration.
        parent: the key of the configuration that says where folders of results lie.
        command: what the user typed.
        only: measure this point alone, counted from 0.

    Raises:
        RunError: the folder is of other options or cannot be written, or a point failed (the
            others are measured first).
    """
    config = asdict(running)
    folder = Path(config[parent]) / running.name
    environment = describe_environment(
        **hardware() | {"threads": running.threads, "command": shlex.join(command)}
    )
    points = list(experiment.points())

    def claim() -> AbstractContextManager[RunWriter]:
        return claimed(folder, identity, config, environment, parent, wait=True)

    with claim() as run:
        run.set_status("running")
        # A point whose rows a killed process left incomplete, or that failed, is measured again.
        complete = _complete(run)
        run.keep(lambda row: row["point"] in complete)
    elsewhere = False
    for number, point in enumerate(points, 1):
        if only is None or number == only + 1:
            title = f"point {number}/{len(points)}: {point.name}"
            elsewhere |= not _measure_once(title, point, measure, run, claim)
    with claim() as run:
        run.step = len(_complete(run))
        _conclude(run, experiment, points, environment, elsewhere, running.name)


def _complete(run: RunFolder) -> set[str]:
    """The names of points whose rows are all there."""
    return {row["point"] for row in run.rows() if row.get("status") == "ok"}


def _measure_once(
    title: str,
    point: Point,
    measure: Measure,
    run: RunWriter,
    claim: Callable[[], AbstractContextManager[RunWriter]],
) -> bool:
    """Measures a point unless it has been; False where another process is at it."""
    place = run.path / "points" / point.name
    with run.writing():
        place.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(place, wait=False))
        except BlockingIOError:
            print(f"{title}: another process measures it", flush=True)
            return False
        if point.name in _complete(run):
            print(f"{title}: measured before, kept", flush=True)
            return True
        print(f"{title} ...", end=" ", flush=True)
        began = perf_counter()
        try:
            with run.writing():
                status, rows = measure(point, place)
        except BaseException:
            with claim():
                raise  # there its folder says so
        took = perf_counter() - began
        print(f"{status}, {took:.0f} s", flush=True)
        rows = [point.labels | row for row in rows or [{}]]
        rows[-1] |= {"status": status, "took_s": took}
        with claim() as writer:
            writer.append(*rows)
    return True


def _conclude(
    run: RunWriter,
    experiment: Experiment,
    points: Sequence[Point],
    environment: Mapping[str, Any],
    elsewhere: bool,
    name: str,
) -> None:
    """Table, figure and state, from what has been measured."""
    names = [point.name for point in points]
    rows = [row for row in run.rows() if experiment.independent or row["point"] in names]
    for view in (TABLE, SUMMARY, FIGURE):
        (run.path / view).unlink(missing_ok=True)  # they may be of other points
    run.write(TABLE, as_csv(rows))
    statuses = {row["point"]: row["status"] for row in rows if "status" in row}
    failed = {point: status for point, status in statuses.items() if status != "ok"}
    left = [name for name in names if name not in statuses]
    if not failed | dict.fromkeys(left) or (experiment.independent and "ok" in statuses.values()):
        _present(run, experiment, rows, failed, environment)
    if failed:
        point, status = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {len(statuses)} points failed, {point}: {status}; what its ranks"
            f" said: {run.path / 'points' / point / 'log.txt'}; the same command tries again"
        )
    run.set_status("finished" if not left else "running" if elsewhere else "interrupted")
    if left:
        print(f"{len(left)} of {len(names)} points of {name} are not measured yet")


def _present(
    run: RunWriter,
    experiment: Experiment,
    rows: list[Row],
    failed: Mapping[str, str],
    environment: Mapping[str, Any],
) -> None:
    """Table, figure and where they are, written and printed."""
    concluded, remarks = experiment.conclude([row for row in rows if row["point"] not in failed])
    missing = "\n".join(f"- Not measured: {point}: {why}." for point, why in failed.items())
    took = f"Its points took {sum(row.get('took_s', 0.0) for row in rows) / 60:.1f} minutes."
    text = "\n\n".join(filter(None, [table(concluded, experiment.goals), remarks, missing, took]))
    run.write(SUMMARY, f"`{environment['command']}`\n\n{text}\n\n{_circumstances(environment)}\n")
    with run.writing():
        if experiment.independent:
            write_board(run)
        elif chart := experiment.chart(concluded):
            draw(chart).savefig(run.path / FIGURE, dpi=150)
        else:
            plot(concluded, run.path / FIGURE, run.path.name, missing)
    print("", text, "", f"numbers   {run.path / TABLE}", sep="\n")
    print(f"table     {run.path / SUMMARY}")
    if (run.path / FIGURE).exists():  # runs without an evaluation have nothing to draw
        print(f"figure    {run.path / FIGURE}")
    if experiment.independent:
        print(f"curves    {tensorboard_command(run.path.parent)}")


def _circumstances(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    device = environment["gpu"] or f"{environment['cores']} cores of {environment['cpu']}"
    commit = environment["git"] or "unknown"
    return (
        f"Measured on {device}, {environment['threads']} thread(s) a rank; commit {commit}; python"
        f" {environment['python']}, {versions}."
    )
