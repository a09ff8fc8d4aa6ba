"""Power laws of sweeps: known exponents come back, intervals hold them, the rest is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from data_pipeline.errors import ConfigError, RunError
from launch import fit as command
from scaling.experiments.cases.fits import REFUSED, TRUTHS, Fits, Truth
from scaling.experiments.experiment import Point
from scaling.experiments.fits import checks
from scaling.experiments.fits.entries import Refused, entry
from scaling.experiments.fits.intervals import Estimate
from scaling.experiments.fits.power_law import Data, Form, fit
from scaling.experiments.fits.select import fits_of
from scaling.runs.rows import Row, as_lines

LENGTHS = [2**k for k in range(10, 21, 2)]


def describe(form: Form, data: Data) -> dict[str, Any]:
    return entry(form, data, form.variables, draws=1000, seed=0)


def sample(truth: Truth, seed: int = 0) -> tuple[Form, Data]:
    form = Form(truth.form)
    return form, truth.measure(form, np.random.default_rng(seed))


def exact(truth: Truth) -> Truth:
    return Truth(truth.form, truth.values, truth.axes, truth.runs, noise=0.0)


@pytest.mark.parametrize("name", TRUTHS)
def test_exact_data_give_the_law_back(name: str):
    """Every parameter, the law beyond the data, and nothing to remark."""
    truth = exact(TRUTHS[name])
    form, data = sample(truth)
    found = describe(form, data)
    for parameter, value in zip(form.parameters, truth.values, strict=True):
        for number in found["parameters"][parameter].values():
            assert number == pytest.approx(value, rel=1e-4)
    last = found["curve"][-1]
    at = np.array([[last[variable] for variable in form.variables]])
    assert last["value"] == pytest.approx(truth.law(form, at)[0], rel=1e-5)
    assert found["held_out"]["error"] == pytest.approx(0, abs=1e-4)
    assert found["residuals"]["remark"] is None and found["residuals"]["rms"] < 1e-6


@pytest.mark.parametrize("name", ["time over length", "loss over size and tokens"])
def test_the_minimum_is_that_of_scipy(name: str):
    """Huber's loss with a stalled run, by another algorithm from the truth's neighbourhood."""
    form, data = sample(TRUTHS[name])
    data = Data(data.x, data.y * np.where(np.arange(len(data.y)) == 7, 3.0, 1.0))
    theta, bound = fit(form, data)
    other = least_squares(
        lambda t: form.predict(t, data.z)[0] - data.log_y, theta * 1.01, loss="huber",
        f_scale=bound, x_scale="jac", xtol=1e-14, ftol=1e-14, gtol=1e-14,
    )  # fmt: skip
    assert theta == pytest.approx(other.x, rel=1e-4)


def test_a_stalled_run_hardly_moves_the_exponent():
    form, data = sample(TRUTHS["time over length"])
    stalled = Data(data.x, data.y * np.where(np.arange(len(data.y)) == 10, 5.0, 1.0))
    clean, robust = (describe(form, each)["parameters"]["b"] for each in (data, stalled))
    assert abs(robust["value"] - clean["value"]) < (clean["high"] - clean["low"]) / 2
    assert robust["low"] < 1.1 < robust["high"]


def test_intervals_hold_the_truth_in_nine_of_ten_repeats():
    """Exponent, law beyond the data and the held-out scale, of 200 sweeps with 1,000 draws each;
    docs/fits.md has 1,000 sweeps of every truth."""
    rows = Fits(repeats=200).measure(Point("time over length"), torch.device("cpu"))
    shares = {row["case"].rpartition(": ")[2]: row["value"] for row in rows}
    assert shares.pop(REFUSED) == 0.0
    assert len(shares) == 3 and min(shares.values()) >= 0.9, shares


def test_a_wrong_form_is_noticed_and_a_right_one_is_not():
    """A law whose slope changes from 1 to 2 half-way, with repeats and without; and noise alone."""
    form, noticed = Form("c + a N^b"), []
    for seed in range(10):
        random = np.random.default_rng(seed)
        for runs, noise in ((3, 0.03), (1, 0.003)):
            n = np.repeat(2.0 ** np.arange(8, 20), runs)
            kinked = (n / 2**13) ** np.where(n > 2**13, 2.0, 1.0)
            straight = 0.1 + (n / 2**13) ** 1.2
            for y in (kinked, straight):
                data = Data(n[:, None], y * np.exp(noise * random.standard_normal(len(n))))
                estimate = Estimate(form, data, draws=20, random=random)
                scatter = checks.scatter_chance(estimate)
                said = checks.remark(scatter, checks.pattern_chance(estimate, random))
                noticed.append(said is not None)
    wrong, right = np.array(noticed).reshape(-1, 2).mean(0)
    assert wrong == 1.0 and right < 0.1


def test_a_wrong_form_is_remarked_upon():
    n = np.repeat(2.0 ** np.arange(8, 20, 2), 3)
    y = (n / 2**13) ** np.where(n > 2**13, 2.0, 1.0)
    data = Data(n[:, None], y * np.exp(0.03 * np.random.default_rng(0).standard_normal(18)))
    found = describe(Form("c + a N^b"), data)
    assert found["residuals"]["remark"].startswith("scales lie off the law by more than their rep")
    assert found["method"]["intervals"].endswith("1000 draws of scales")


def test_held_out_and_dropped_scales_are_fits_of_the_rest():
    form, data = sample(TRUTHS["time over length and ranks"])
    found = describe(form, data)
    rest = data.x[:, 0] < data.x[:, 0].max()
    alone = describe(form, Data(data.x[rest], data.y[rest]))
    dropped = {(*each["at"].items(),): each for each in found["dropped"]}
    assert len(dropped) == 12
    for exponent in ("b", "g"):
        expected = alone["parameters"][exponent]["value"]
        assert dropped[("N", 2**20),][exponent] == pytest.approx(expected, rel=1e-3)
    held = found["held_out"]
    assert held["at"] == {"N": 2**20, "P": 32} and held["beyond"] == 4
    assert held["measured"] == pytest.approx(data.y[-1])
    assert held["error"] == pytest.approx(held["predicted"] / held["measured"] - 1)
    (same,) = (c for c in alone["curve"] if c["P"] == 32 and c["N"] == pytest.approx(2**20))
    assert held["predicted"] == pytest.approx(same["value"], rel=1e-6)


def test_budgets_of_equal_compute_check_the_joint_law():
    """Parabolas give nearly the exponent of the law, and only where budgets are equal."""
    form, truth = Form("E + A N^-a + B D^-b"), TRUTHS["loss over size and tokens"]
    sizes = np.geomspace(1e4, 1e8, 9)
    x = np.array([(n, c / n) for c in np.geomspace(1e12, 1e15, 5) for n in sizes])
    found = describe(form, Data(x, truth.law(form, x)))
    assert found["isoflop"]["of_fit"] == pytest.approx(0.37 / 0.72, rel=1e-3)
    assert found["isoflop"]["exponent"] == pytest.approx(0.37 / 0.72, rel=0.1)
    form, grid = sample(truth)
    assert checks.isoflop(grid, form, np.ones(5)) is None


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([1, 2, 4, 8], [1, 2, 3, 4], "exponent b of N needs 5 scales, and N has 1, 2, 4, 8"),
        ([4, 4, 4], [1, 2, 3], "the exponent b of N needs 5 scales, and N has 4"),
        ([], [], "needs 5 scales, and N has none"),
        (
            range(1, 13),
            1 + 0.1 * np.sin(np.arange(12) ** 2),
            r"do not determine the exponent b: its 95% interval, \S+ to \S+ around \S+, (is|holds)",
        ),
    ],
)
def test_what_the_data_do_not_say_is_refused(x, y, reason):
    with pytest.raises(Refused, match=reason):
        describe(Form("c + a N^b"), Data(np.array(x, float).reshape(-1, 1), np.array(y, float)))


def test_weak_scaling_alone_does_not_tell_length_from_ranks():
    ranks = np.repeat([1.0, 2, 4, 8, 16, 32], 3)
    x = np.stack([1024 * ranks, ranks], -1)
    y = (0.1 + ranks**0.1) * np.exp(0.02 * np.random.default_rng(0).standard_normal(18))
    with pytest.raises(Refused, match="N and P change only together"):
        describe(Form("c + a N^b P^-g"), Data(x, y))


def step(length: int, sp: int = 1, repeat: int = 0, **changes: Any) -> Row:
    random = np.random.default_rng([length, sp, repeat])
    seconds = (0.05 + 1e-6 * length**1.1 / sp**0.9) * np.exp(0.02 * random.standard_normal())
    return {
        "point": f"N{length}_sp{sp}_{repeat}", "status": "ok", "kind": "step", "model": "se3_hyena",
        "parameters": 1234, "length": length, "rows": 1, "dp": 1, "sp": sp, "ranks": sp,
        "zero_stage": 0, "seed": 0, "repeat": repeat, "hardware": "2 cores of X",
        "versions": "torch 2.13.0", "threads": 1, "oversubscribed": sp > 2,
        "step_s": float(seconds), "peak_bytes": 3 * 10**8 + 600 * length // sp,
    } | changes  # fmt: skip


def steps(*sp: int, **changes: Any) -> list[Row]:
    return [step(n, p, r, **changes) for p in sp or (1,) for n in LENGTHS for r in range(3)]


def fitted(rows: list[Row], target: str = "step_s") -> list[dict[str, Any]]:
    return fits_of(rows, [target], draws=1000, seed=0)


def refusals(rows: list[Row], target: str = "step_s") -> list[str]:
    return [each.get("refused", "") for each in fitted(rows, target)]


def test_oversubscribed_points_never_enter_a_fit():
    """N's exponent is given for each P, P's is refused by name; the rest does not feel them."""
    entries = fitted(steps(1, 2, 4))
    by_sp = {e["group"]["sp"]: e for e in entries if e["form"] == "c + a N^b"}
    assert [by_sp[sp]["points"] for sp in (1, 2)] == [18, 18]
    assert by_sp[4]["refused"].endswith("length has none; left out: 18 oversubscribed on 4 ranks")
    others = [e for e in entries if "P" in e["form"]]
    assert len(others) == len(LENGTHS) + 1
    for each in others:
        assert each["refused"].startswith("the exponent g of P needs 5 scales, and ranks has 1, 2;")
    (alone,) = fitted(steps(1))
    assert alone["parameters"] == by_sp[1]["parameters"]


def test_time_over_length_and_ranks_is_fitted_where_cores_are_enough():
    rows = steps(1, 2, 4, 8, 16, oversubscribed=False)
    (joint,) = (e for e in fitted(rows) if e["form"] == "c + a N^b P^-g")
    assert joint["variables"] == ["length", "ranks"] and joint["points"] == 90
    assert joint["parameters"]["b"]["value"] == pytest.approx(1.1, abs=0.02)
    assert joint["parameters"]["g"]["value"] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("column", ["hardware", "versions"])
def test_mixed_circumstances_are_refused(column: str):
    rows = steps()
    rows[4] |= {column: "another"}
    (reason,) = refusals(rows)
    values = "; ".join(sorted([rows[0][column], "another"]))
    assert reason == f"{column} is mixed ({values}): fit them apart"


@pytest.mark.parametrize("column", ["step_s", "hardware", "oversubscribed"])
def test_a_missing_column_is_named(column: str):
    rows = [{key: x for key, x in row.items() if key != column} for row in steps()]
    assert refusals(rows) == [f"the rows have no column {column}"]


def test_failed_and_non_finite_rows_are_left_out_and_counted():
    rows = steps()
    rows[0] = {k: v for k, v in rows[0].items() if k != "step_s"} | {"status": "out of memory"}
    rows[4] |= {"step_s": float("nan")}
    rows[8] |= {"step_s": None}
    del rows[12]["status"]  # killed while it wrote
    (found,) = fitted(rows)
    assert found["points"] == 14 and sum(found["left_out"].values()) == 4
    assert found["left_out"]["failed or unfinished"] == 2
    (reason,) = refusals([row | {"status": "out of memory"} for row in rows])
    assert reason.endswith("and length has none; left out: 18 failed or unfinished")


def test_different_settings_are_fits_of_their_own():
    """Also those that only the grid names; what the variables imply is none."""
    rows = [row | {"model.hidden": hidden, "threads": 1} for hidden in (8, 16) for row in steps()]
    rows = [row | {"task.length": row["length"]} for row in rows]
    assert [each["group"]["model.hidden"] for each in fitted(rows)] == [8, 16]
    assert all("task.length" not in each["group"] for each in fitted(rows))
    (memory, _) = fitted(rows, "peak_bytes")
    assert memory["parameters"]["b"]["value"] == pytest.approx(1, abs=1e-3)


def test_the_longest_sequence_that_a_memory_holds():
    rows = [row | {"peak_bytes": int(row["peak_bytes"] * 1.01 ** (n % 3 - 1))}
            for n, row in enumerate(steps())]  # fmt: skip
    (memory,) = fitted(rows, "peak_bytes")
    for each, gib in zip(memory["reaches"], (16, 40, 80), strict=True):
        longest = (gib * 2**30 - 3e8) / 600
        assert each["low"] < longest < each["high"] < 1.5 * each["low"]
        assert each["beyond"] == pytest.approx(each["value"] / LENGTHS[-1])
    (time,) = fitted(rows)
    assert time["reaches"] == []


def run(size: int, tokens: float, seed: int = 0) -> Row:
    random = np.random.default_rng([size, int(tokens), seed])
    loss = (0.05 + 5 * size**-0.35 + 30 * tokens**-0.37) * np.exp(0.005 * random.normal())
    return step(128, kind="train", parameters=size, tokens=tokens, loss=float(loss),
                train_flops=6.0 * size * tokens, steps=int(tokens) // 512, repeat=0,
                **{"train.seed": seed, "model.hidden": size // 100})  # fmt: skip


SIZES, BUDGETS = np.geomspace(1e4, 3e6, 6).astype(int).tolist(), np.geomspace(1e11, 1e15, 6)


def test_a_ladder_of_sizes_gives_both_laws_of_loss():
    rows = [run(n, float(c) / 6 / n, s) for n in SIZES for c in BUDGETS for s in range(2)]
    joint, compute = fitted([*rows, *rows], "loss")  # repeats of a seed are one run
    assert (joint["points"], joint["variables"]) == (72, ["parameters", "tokens"])
    for name, value in {"a": 0.35, "b": 0.37, "E": 0.05}.items():
        assert joint["parameters"][name]["low"] < value < joint["parameters"][name]["high"]
    assert joint["isoflop"]["exponent"] == pytest.approx(joint["isoflop"]["of_fit"], abs=0.1)
    # Of every budget the size that is best there.
    assert (compute["points"], compute["left_out"]) == (12, {"beaten at equal compute": 60})
    assert compute["scales"] == pytest.approx([float(c) for c in BUDGETS])


def test_loss_over_length():
    rows = [
        step(length, kind="train", loss=0.2 + 5 * length**-0.5, tokens=1e6, seed=seed)
        for length in (64, 128, 256, 512, 1024, 2048) for seed in range(2)
    ]  # fmt: skip
    (found,) = fitted(rows, "loss")
    assert found["form"] == "c + a N^b"
    assert found["parameters"]["b"]["value"] == pytest.approx(-0.5, abs=1e-3)


def written(folder: Path, rows: list[Row]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(as_lines(rows))
    return str(folder)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Rows of several sweeps count together."""
    first = written(tmp_path / "a", steps(1)[:9])
    second = written(tmp_path / "b", [*steps(1)[9:], *steps(4)])
    command.main([first, second, "target=step_s", "draws=1000"])
    entries = json.loads((tmp_path / "a" / "fits.json").read_text())
    assert not (tmp_path / "b" / "fits.json").exists()
    found = entries[0]
    assert found["target"] == "step_s" and found["points"] == 18 and len(found["curve"]) > 20
    assert {"parameters", "held_out", "dropped", "residuals", "method", "group"} <= found.keys()
    said = capsys.readouterr().out
    b = found["parameters"]["b"]
    assert f"b    {b['value']:.4g}  (95 %: {b['low']:.4g} to {b['high']:.4g})" in said
    assert "held out, 4 times the largest fitted: length 1,048,576" in said
    assert "refused: the exponent g of P needs 5 scales" in said
    command.main([first, second, first, "target=step_s", "draws=1000"])
    assert json.loads((tmp_path / "a" / "fits.json").read_text()) == entries


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "is no folder: name the folder of a sweep; python -m launch sweep makes one"),
        ("", "has no rows: name the folder of a sweep"),
        ('{"kind": "step", "le', "has no rows"),
        ('{"kind": "st\n{}\n', "metrics.jsonl, line 1 is no row"),
        ('{"kind": "bench"}\n', "has kind=step or kind=train"),
        (
            as_lines([step(1024)]),
            "nothing could be fitted: the exponent b of N needs 5 scales, and",
        ),
    ],
)
def test_sweeps_of_nothing_are_one_line(tmp_path: Path, content: str | None, named: str):
    folder = tmp_path / "sweep"
    if content is not None:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError) as error:
        command.main([str(folder)])
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["target=step"], "target='step': must be 'step_s', 'peak_bytes' or 'loss'"),
        (["draws=10"], "draws=10: must be greater than or equal to 1000"),
        ([], "fit takes folders before the first key=value"),
    ],
)
def test_options_are_checked(tmp_path: Path, arguments: list[str], named: str):
    with pytest.raises(ConfigError) as error:
        command.main([*[str(tmp_path)][: len(arguments)], *arguments])
    assert named in str(error.value)
