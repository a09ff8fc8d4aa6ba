"""A sweep shown: its figure, and TensorBoard with the same as images and lines as scalars."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard.summary import image

from data_pipeline.errors import RunError
from scaling.experiments.curves import Chart, Fit, charts
from scaling.experiments.figures import draw
from scaling.observe.sinks import Summary, TensorBoardSink, about_folder, pages
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row

FITS, FIGURE = "fits.json", "figure.png"
DPI = 150


def read_fits(folder: Path) -> list[Fit]:
    """What `fit` wrote into a sweep's folder; empty before that.

    Raises:
        RunError: it cannot be read.
    """
    path = folder / FITS
    try:
        fits = json.loads(path.read_text())
        if not isinstance(fits, list) or not all(isinstance(fit, dict) for fit in fits):
            raise ValueError("no list of fits")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); python -m launch fit {folder} writes it "
                       "again") from error  # fmt: skip
    return fits


def write_board(run: RunFolder) -> None:
    """Writes the folder's figure.png and tensorboard/ anew, from its rows and fits."""
    shown = charts(run.rows(), read_fits(run.path))
    if shown:
        draw(*shown).savefig(run.path / FIGURE, dpi=DPI)
    layout = {"scaling": {f"{each.name}: {each.y}": [f"{each.name}/.*"] for each in shown}}
    images = [_image(f"scaling/{each.name}", draw(each)) for each in shown]
    sink = TensorBoardSink(run.tensorboard)
    sink.start([row for each in shown for row in _points(each)],
               [*about_folder(run), *images, *([pages(layout)] if shown else [])])  # fmt: skip
    sink.close()


def _points(chart: Chart) -> Iterator[Row]:
    """What is measured as rows: a step is a length, a number of ranks or of FLOP."""
    for line in chart.lines:
        for spot in line.spots:
            if math.isfinite(spot.y):
                yield {"step": round(spot.x), "split": chart.name, line.label: spot.y}


def _image(tag: str, figure: Figure) -> Summary:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    return image(tag, np.asarray(canvas.buffer_rgba())[..., :3], dataformats="HWC")
