"""The page: one HTML file that needs nothing else, from run folders and their files alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from data_pipeline.disk import write_atomically
from data_pipeline.errors import RunError
from scaling.experiments.figures import sweep_figures
from scaling.report import tables
from scaling.report.figures import as_svg, curves, time_shares
from scaling.report.sources import Run, Source, Sweep, read_source
from scaling.runs.rows import Row


@dataclass
class Drawn:
    """A sweep as the page shows it."""

    sweep: Sweep
    figures: list[str]
    """SVG."""
    shares: tables.Table
    fits: tables.Table
    cells: list[tables.Table]
    """Of steps, and of trained models."""
    rows: tables.Table


def write_report(paths: Sequence[str], output: str | None, question: str | None) -> Path:
    """Writes the page; the file.

    Args:
        paths: folders of runs and sweeps.
        output: the file; None: report.html in the only folder, or here for several.
        question: that the page answers; None: what folders like these can answer.

    Raises:
        RunError: a folder cannot be read, or the file not written.
    """
    # A folder that is named twice is shown once.
    sources = [read_source(path) for path in dict.fromkeys(map(Path, paths))]
    if len({source.name for source in sources}) < len(sources):
        for source in sources:
            source.name = str(source.folder.path)
    only = sources[0].folder.path if len(sources) == 1 else Path()
    file = Path(output) if output else only / "report.html"
    text = render(sources, question)
    try:
        write_atomically(file, text)
    except OSError as error:
        raise RunError(f"the report {file} cannot be written ({error.strerror}); choose another "
                       "file by output=...") from error  # fmt: skip
    return file


def render(sources: Sequence[Source], question: str | None = None) -> str:
    """The page's text."""
    runs = [source for source in sources if isinstance(source, Run)]
    sweeps = [source for source in sources if isinstance(source, Sweep)]
    told = [run for run in runs if run.rows]
    figures = [as_svg(curves(told), "losses of the runs")] if told else []
    if any(run.summary.time_shares for run in told):
        figures.append(as_svg(time_shares(told), "where the time of the runs goes"))
    environment = Environment(
        loader=PackageLoader("scaling.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        question=question or _question(runs, sweeps),
        sources=sources,
        runs=runs,
        run_figures=figures,
        run_table=tables.of_runs(runs),
        evaluations=tables.of_evaluations(runs),
        sweeps=[_drawn(sweep) for sweep in sweeps],
    )


def _question(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> str:
    asked = [sweep.config["question"] for sweep in sweeps if sweep.config.get("question")]
    if asked:
        return " ".join(asked)
    learns = "How well did it learn, and at what cost?" if len(runs) == 1 else ""
    if len(runs) > 1:
        learns = "Which of these runs learns best, and at what cost?"
    grows = "How do time, memory and loss grow with length, ranks and compute?" if sweeps else ""
    return " ".join(filter(None, [learns, grows]))


def _drawn(sweep: Sweep) -> Drawn:
    figures = sweep_figures(sweep.rows, sweep.fits).items()
    kinds: dict[str, list[Row]] = {}
    for row in sweep.rows:
        kinds.setdefault(row.get("kind", "step"), []).append(row)
    return Drawn(
        sweep,
        [as_svg(figure, f"{sweep.name}: {name}") for name, figure in figures],
        tables.of_shares(sweep.rows),
        tables.of_fits(sweep.fits),
        [tables.of_cells(rows) for rows in kinds.values()],
        tables.of_rows(sweep.rows),
    )
