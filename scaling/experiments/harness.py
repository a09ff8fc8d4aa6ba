"""Runs an experiment: measures what is missing, concludes, and writes it all into a run folder.

points/<name>/      what a point's processes were told, found and said
rows.csv            all rows        summary.md      the table, what it was measured on and how
figure.png          the concluded rows over N
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from scaling.experiments import ranks
from scaling.experiments.experiment import Experiment
from scaling.experiments.options import Running
from scaling.experiments.views import as_csv, plot, table
from scaling.observe.memory import hardware
from scaling.runs.environment import describe_environment
from scaling.runs.folder import RunWriter, claimed
from scaling.runs.identity import Identity
from scaling.runs.rows import Row

TABLE, SUMMARY, FIGURE = "rows.csv", "summary.md", "figure.png"


def run_experiment(
    name: str,
    experiment: Any,
    running: Running,
    identity: Identity,
    parent: str,
    command: Sequence[str],
    entry: Sequence[str],
) -> None:
    """Measures the points that the folder lacks or that failed, then shows all.

    Args:
        name: of the experiment in EXPERIMENTS.
        experiment: one of these, with its options.
        running: the whole configuration.
        parent: the key of the configuration that says where folders of results lie.
        command: what the user typed.
        entry: see `ranks.measure`.

    Raises:
        RunError: the folder is of other options or cannot be written, or a point failed (the
            others are measured first).
    """
    config = asdict(running)
    folder = Path(config[parent]) / running.name
    environment = describe_environment(
        **hardware() | {"threads": running.threads, "command": shlex.join(command)}
    )
    with claimed(folder, identity, config, environment, parent) as run:
        for view in (TABLE, SUMMARY, FIGURE):
            (folder / view).unlink(missing_ok=True)  # they may be of other points
        rows = _measure(run, name, experiment, running, entry)
        run.write(TABLE, as_csv(rows))
        statuses = {row["point"]: row["status"] for row in rows if "status" in row}
        failed = {point: status for point, status in statuses.items() if status != "ok"}
        if not failed or (experiment.independent and "ok" in statuses.values()):
            _present(run, experiment, rows, failed, environment)
        if failed:
            point, status = next(iter(failed.items()))
            raise RunError(
                f"{len(failed)} of {len(statuses)} points failed, {point}: {status}; what its ranks"
                f" said: {folder / 'points' / point / 'log.txt'}; the same command tries again"
            )
        run.set_status("finished")


def _measure(
    run: RunWriter, name: str, experiment: Any, running: Running, entry: Sequence[str]
) -> list[Row]:
    """The rows of all points; of an experiment with independent points, earlier ones too."""
    complete = {row["point"] for row in run.rows() if row.get("status") == "ok"}
    # A point whose rows a killed process left incomplete, or that failed, is measured again.
    rows = run.keep(lambda row: row["point"] in complete)
    points = list(experiment.points())
    for number, point in enumerate(points, 1):
        title = f"point {number}/{len(points)}: {point.name}"
        run.step = number
        if point.name in complete:
            print(f"{title}: measured before, kept", flush=True)
            continue
        run.set_status("running")
        print(f"{title} ...", end=" ", flush=True)
        place = run.path / "points" / point.name
        with run.writing():
            status, found = ranks.measure(name, asdict(experiment), point, place, running, entry)
        print(status, flush=True)
        found = [point.labels | row for row in found or [{}]]
        found[-1]["status"] = status
        rows += run.append(*found)
    names = {point.name for point in points}
    return [row for row in rows if experiment.independent or row["point"] in names]


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
    text = "\n\n".join(filter(None, [table(concluded, experiment.goals), remarks, missing]))
    run.write(SUMMARY, f"`{environment['command']}`\n\n{text}\n\n{_circumstances(environment)}\n")
    with run.writing():
        plot(concluded, run.path / FIGURE, run.path.name, missing)
    print("", text, "", f"numbers   {run.path / TABLE}", sep="\n")
    print(f"table     {run.path / SUMMARY}\nfigure    {run.path / FIGURE}")


def _circumstances(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    device = environment["gpu"] or f"{environment['cores']} cores of {environment['cpu']}"
    commit = environment["git"] or "unknown"
    return (
        f"Measured on {device}, {environment['threads']} thread(s) a rank; commit {commit}; python"
        f" {environment['python']}, {versions}."
    )
