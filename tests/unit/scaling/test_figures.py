"""The figures of sweeps and benches draw what the rows say, and nothing where they say nothing."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from scaling.experiments.curves import Chart, charts
from scaling.experiments.experiment import row
from scaling.experiments.figures import draw, sweep_figures
from scaling.experiments.views import plot
from tests.sweep_rows import GIB, cell, known_fits, known_rows, trained


def chart(name: str, rows: list[dict], fits: list[dict] = []) -> Chart:  # noqa: B006
    (found,) = [each for each in charts(rows, fits) if each.name == name]
    return found


def points(chart: Chart, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in chart.lines + chart.ideals if line.label == label]
    return [(spot.x, spot.y) for spot in line.spots]


def test_every_figure_of_a_sweep_has_units_and_is_drawn_without_a_warning():
    figures = sweep_figures(known_rows(), known_fits())
    assert [*figures] == ["strong scaling", "weak scaling", "step time over length",
                          "memory frontier", "loss against compute"]  # fmt: skip
    for name, figure in figures.items():
        (axes,) = figure.axes
        figure.canvas.draw()
        assert axes.get_title() == name
        assert axes.get_xlabel() and axes.get_ylabel()


def test_strong_scaling_is_a_speed_up_beside_the_ideal():
    strong = chart("strong scaling", known_rows())
    assert points(strong, "N 4,096") == [(1, 1), (2, 2), (4, 4)]
    for p, ideal in points(strong, "ideal"):
        assert ideal == pytest.approx(p)


def test_weak_scaling_of_an_fft_is_not_flat():
    """Steps of N log N / P seconds are ideal, and take log(N P) / log(N) times as long."""
    weak = chart("weak scaling", known_rows())
    label = "tokens of a rank 2,048"
    assert dict(points(weak, label)) == pytest.approx({1: 1, 2: 12 / 11, 4: 13 / 11})
    ideal = dict(points(weak, "ideal of an FFT from N = 2,048"))
    assert ideal[1] == 1 and ideal[4] == pytest.approx(13 / 11)


def test_sequences_on_more_data_parallel_ranks_are_weak_scaling_with_a_flat_ideal():
    rows = [cell(dp=dp, rows=dp, ranks=dp) for dp in (1, 2, 4)]
    weak = chart("weak scaling", rows)
    assert [points(weak, line.label) for line in weak.lines] == [[(1, 1), (2, 1), (4, 1)]]
    assert {y for _, y in points(weak, "ideal")} == {1.0}
    assert "strong scaling" not in [each.name for each in charts(rows)]


def test_a_failed_or_endless_cell_is_a_gap_in_its_line():
    rows = [cell(length=2**k) for k in range(10, 15)]
    rows[1]["status"] = "out of memory"
    rows[3]["step_s"] = math.inf
    del rows[2]["peak_bytes"]
    (line,) = chart("step time over length", rows).lines
    assert [math.isfinite(spot.y) for spot in line.spots] == [True, False, True, False, True]
    figure = draw(chart("step time over length", rows))
    drawn = [each for each in figure.axes[0].lines if each.get_linestyle() == "-"]
    assert [np.isnan(each.get_ydata()).tolist() for each in drawn] == [
        [False, True, False, True, False]
    ]
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert "nothing measured" in labels


def test_points_are_medians_over_repeats_with_their_spread():
    rows = [cell(repeat=i, step_s=s) for i, s in enumerate((3.0, 1.0, 2.0))]
    ((spot,),) = [line.spots for line in chart("step time over length", rows).lines]
    assert (spot.x, spot.y, spot.low, spot.high) == (1024, 2.0, 1.0, 3.0)
    (alone,) = chart("step time over length", [cell(step_s=1.0)]).lines
    assert (alone.spots[0].low, alone.spots[0].high) == pytest.approx(
        (cell()["step_low_s"], cell()["step_high_s"])
    )


def test_more_ranks_than_cores_are_hollow():
    figure = draw(chart("strong scaling", known_rows()))
    hollow = [each for each in figure.axes[0].lines if each.get_markerfacecolor() == "none"]
    assert [np.asarray(each.get_xdata()).tolist() for each in hollow] == [[4], [4]]
    assert "more ranks than cores" in [
        t.get_text() for t in figure.subfigs[0].legends[0].get_texts()
    ]


def test_the_memory_frontier_is_read_from_memory_to_length():
    frontier = chart("memory frontier", known_rows())
    (line,) = [line for line in frontier.lines if line.label == "se3_hyena, sp 1"]
    assert line.spots[0][:2] == (1024, 1.25)
    (axes,) = draw(frontier).axes
    assert axes.get_xlabel() == "memory of a rank, GiB"
    assert np.asarray(axes.lines[0].get_xdata())[0] == 1.25
    assert cell()["peak_bytes"] == GIB / 4 + GIB


def test_fits_are_drawn_with_interval_and_the_scale_held_out():
    length = chart("step time over length", known_rows(), known_fits())
    (fit,) = length.fits  # the refused one has no curve
    assert fit.held_out and fit.held_out[:4] == (2**15, 0.33, 0.3, 0.4)
    figure = draw(length)
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert {"fit, 95 % interval", "predicted without that scale"} <= set(labels)
    broken = known_fits()
    broken[0]["curve"][3]["value"] = math.nan
    broken[0]["held_out"] = None
    (fit,) = chart("step time over length", known_rows(), broken).fits
    assert math.isnan(fit.spots[3].y) and fit.held_out is None


def test_sizes_with_a_budget_each_are_one_line_and_budgets_of_a_size_another():
    (line,) = chart("loss against compute", known_rows()).lines
    assert [spot[:2] for spot in line.spots] == [(10.0 ** (k + 6), 2.0 / k) for k in (3, 4, 5)]
    rows = [trained(10**k, 10.0 ** (k + c), 1.0) for k in (3, 4) for c in (5, 6)]
    assert [line.label for line in chart("loss against compute", rows).lines] == [
        "parameters 1,000", "parameters 10,000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"point": "x", "status": "failed without a word"}],
        [{"kind": "step", "length": 8}],
        [cell(status="time-out after 300 s")],
        [cell(step_s=math.nan, peak_bytes=None)],
        [trained(1000, math.inf, 0.5)],
    ],
    ids=["none", "only failed", "no columns", "not ok", "not finite", "endless"],
)
def test_nothing_is_drawn_of_nothing(rows: list[dict]):
    assert sweep_figures(rows) == {}


def test_one_point_is_a_point(tmp_path):
    figures = sweep_figures([cell()])
    assert [*figures] == ["step time over length", "memory frontier"]
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.svg")


def test_a_bench_of_many_models_has_a_panel_a_quantity(tmp_path, monkeypatch):
    shown: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: shown.append(self))
    models = [f"model_{i}" for i in range(12)]
    rows = [
        row(f"{model}: {case}", 1.0 + i, unit, length=n, sp=sp)
        for i, model in enumerate(models)
        for case, unit in (("step", "s"), ("memory", "B"))
        for n in (64, 128)
        for sp in (1, 2)
    ]
    ratios = [each | {"case": f"{each['case']} / model_0's", "ratio": 2.0} for each in rows]
    plot([*rows, *ratios], tmp_path / "figure.png", "models")
    (figure,) = shown
    panels = {axes.get_ylabel(): axes for axes in figure.axes if axes.lines}
    assert [*panels] == ["step, s", "memory, MB", "step / model_0's, ratio",
                         "memory / model_0's, ratio"]  # fmt: skip
    for axes in panels.values():
        assert len(axes.lines) == 24
        looks = {(each.get_color(), each.get_marker()) for each in axes.lines}
        assert len(looks) == 12 and {each.get_linestyle() for each in axes.lines} == {"-", "--"}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*models, "sp = 1", "sp = 2"]
    shown.clear()
    plot(rows[:8], tmp_path / "figure.png", "two models")
    assert [axes.get_ylabel() for axes in shown[0].axes] == ["s", "MB"]
