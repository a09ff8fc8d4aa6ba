"""Figures of runs, and figures as SVG inside a page."""

import io
import re
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scaling.experiments.figures import INK
from scaling.experiments.views import COLOURS, styles_of
from scaling.observe.metrics import TIME_SHARES
from scaling.report.sources import Run
from scaling.runs.rows import of_split

HATCHES = ("", "//", "..", "\\\\", "xx", "++")


def curves(runs: Sequence[Run]) -> Figure:
    """Losses over steps: every training row a thin line, every validation a point."""
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = styles_of(run.name for run in runs)
    for run in runs:
        colour, marker = styles[run.name]["color"], styles[run.name]["marker"]
        train, validation = (of_split(run.rows, split) for split in ("train", "validation"))
        axes.plot(*_losses(train), color=colour, linewidth=0.8, alpha=0.7)
        axes.plot(*_losses(validation), color=colour, marker=marker, label=run.name)
    axes.set_title("loss while training", fontsize=10)
    axes.set(xlabel="optimiser steps", ylabel="loss / that of the trivial answer", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=2,
                  title="validation (thin lines: training)", title_fontsize=8)  # fmt: skip
    return figure


def _losses(rows: Sequence[dict]) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def time_shares(runs: Sequence[Run]) -> Figure:
    """Where a step's time goes, in percent."""
    figure = Figure(figsize=(4.8, 1.9 + 0.35 * len(runs)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(runs)
    for name, colour, hatch in zip(TIME_SHARES, COLOURS, HATCHES, strict=True):
        part = name.removesuffix("_s")
        widths = [100 * run.summary.time_shares.get(part, 0.0) for run in runs]
        axes.barh([run.name for run in runs], widths, left=left, color=colour, hatch=hatch,
                  edgecolor=INK, linewidth=0.5, label=part.replace("_", " "))  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_title("where a step's time goes", fontsize=10)
    axes.set(xlabel="share of the mean rank's step, %", xlim=(0, 100))
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=3)
    return figure


def as_svg(figure: Figure, about: str) -> str:
    """For a page of any background: black is the colour of the page's text, texts stay texts.

    Args:
        about: says what it shows to who cannot see it; also keeps ids of figures apart.
    """
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": about}):
        # No metadata: a report of the same rows is the same file.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nobody refers to them, and figures share them
    for black in ("#000000", INK):
        text = text.replace(black, "currentColor")
    label = re.sub(r"[^\w ,.:/^-]", "", about)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
