"""Show runs and sweeps in one HTML file: python -m launch report runs/a sweeps/b [output=...] ...

The folders are read, and left alone: a run may be going on. The file needs nothing else.
"""

from dataclasses import dataclass

from launch.config.compose import command_line


@dataclass
class ReportConfig:
    paths: list[str]
    """Folders of runs and sweeps."""
    output: str | None = None
    """The file; null: report.html in the only folder, or here for several."""
    question: str | None = None
    """That the report answers; null: what such folders can answer."""


def main(arguments: list[str]) -> None:
    """Write the report, and say where it is."""
    config, _ = command_line(arguments, "report", ReportConfig)
    from scaling.report.page import write_report

    print(f"report    {write_report(config.paths, config.output, config.question)}")
