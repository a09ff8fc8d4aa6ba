"""Runs an experiment: measures what is missing, concludes, and writes it all into a run folder.

points/<name>/      what a point's processes were told, found and said
rows.csv            all rows        summary.md      the table, what it was measured on and how
figure.png          the concluded rows over N
"""

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from scaling.experiments import ranks
from scaling.experiments.experiment import Experiment, Point
from scaling.experiments.options import Running
from scaling.experiments.plots import plot
from scaling.experiments.registry import EXPERIMENTS
from scaling.experiments.summary import summarise, table
from scaling.observe.memory import hardware
from scaling.runs.environment import describe_environment
from scaling.runs.folder import RunWriter, claimed
from scaling.runs.identity import Identity
from scaling.runs.rows import Row

SUMMARY = "summary.md"


def run_experiment(
    name: str,
    options: Any,
    running: Running,
    identity: Identity,
    config: Mapping[str, Any],
    parent: str,
    command: Sequence[str],
    entry: Sequence[str],
) -> None:
    """Measures the points that the folder lacks or that failed, then shows all.

    Args:
        name: of an experiment in EXPERIMENTS.
        parent: the key of the configuration that says where folders of results lie.
        command: what the user typed.
        entry: see `ranks.measure`.

    Raises:
        RunError: the folder is of other options or cannot be written, or a point failed (the
            others are measured first).
    """
    experiment, folder = EXPERIMENTS[name], Path(config[parent]) / running.name
    environment = describe_environment(**hardware() | {"threads": running.threads})
    environment["command"] = shlex.join(command)
    with claimed(folder, identity, config, environment, parent) as run:
        for view in (experiment.table, SUMMARY, experiment.figure):
            (folder / view).unlink(missing_ok=True)  # they may be of other points
        points = experiment.points(options)
        rows = _measure(run, name, points, running, entry)
        wanted = None if experiment.independent else {point.name for point in points}
        rows = [row for row in rows if wanted is None or row["point"] in wanted]
        run.write(experiment.table, _as_csv(rows))
        statuses = {row["point"]: row["status"] for row in rows if row.get("status")}
        failed = {point: status for point, status in statuses.items() if status != "ok"}
        if "ok" in statuses.values() and (experiment.independent or not failed):
            _present(run, experiment, options, rows, failed, environment)
        if failed:
            point, status = next(iter(failed.items()))
            raise RunError(
                f"{len(failed)} of {len(statuses)} points failed, {point}: {status}; what its ranks"
                f" said: {folder / 'points' / point / 'log.txt'}; the same command tries again"
            )
        run.set_status("finished")


def _measure(
    run: RunWriter, name: str, points: list[Point], running: Running, entry: Sequence[str]
) -> list[Row]:
    """The rows of all points, earlier ones too."""
    complete = {row["point"] for row in run.rows() if row.get("status") == "ok"}
    # A point whose rows a killed process left incomplete, or that failed, is measured again.
    rows = run.keep(lambda row: row["point"] in complete)
    for number, point in enumerate(points, 1):
        title = f"point {number}/{len(points)}: {point.name}"
        run.step = number
        if point.name in complete:
            print(f"{title}: measured before, kept", flush=True)
            continue
        run.set_status("running")
        print(f"{title} ...", end=" ", flush=True)
        with run.writing():
            status, found = ranks.measure(
                name,
                asdict(point.options),
                run.path / "points" / point.name,
                point.ranks,
                entry=entry,
                threads=running.threads,
                timeout_s=running.timeout_s,
                device=running.device,
            )
        print(status, flush=True)
        found = [{"point": point.name} | point.labels | row for row in found or [{}]]
        found[-1]["status"] = status
        rows += run.append(*found)
    return rows


def _as_csv(rows: list[Row]) -> str:
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _present(
    run: RunWriter,
    experiment: Experiment,
    options: Any,
    rows: list[Row],
    failed: Mapping[str, str],
    environment: Mapping[str, Any],
) -> None:
    """Table, figure and where they are, written and printed."""
    measured = [row for row in rows if row["point"] not in failed]
    concluded, remarks = experiment.conclude(options, measured)
    missing = "\n".join(f"- Not measured: {point}: {why}." for point, why in failed.items())
    lines = table(summarise(concluded, experiment.goals))
    text = "\n\n".join(filter(None, [lines, remarks, missing]))
    run.write(SUMMARY, f"`{environment['command']}`\n\n{text}\n\n{_circumstances(environment)}\n")
    with run.writing():
        plot(concluded, run.path / experiment.figure, run.path.name, missing)
        shown = experiment.show(measured, run.path)
    print("", text, "", f"numbers   {run.path / experiment.table}", sep="\n")
    print(f"table     {run.path / SUMMARY}\nfigure    {run.path / experiment.figure}")
    if shown:
        print(shown)


def _circumstances(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    device = environment["gpu"] or f"{environment['cores']} cores of {environment['cpu']}"
    commit = environment["git"] or "unknown"
    return (
        f"Measured on {device}, {environment['threads']} thread(s) a rank; commit {commit}; python"
        f" {environment['python']}, {versions}."
    )
