"""The benches behind `python -m launch bench bench=<name>`, each run small, in this process."""

import csv
import os
import sys
from pathlib import Path

import psutil
import pytest
import torch
from pydantic import TypeAdapter

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError, LongfoldError, RunError
from launch import bench
from launch.config.compose import compose, config_folder
from scaling.algebra import clifford
from scaling.execution import Execution
from scaling.experiments import ranks
from scaling.experiments.cases import startup
from scaling.experiments.cases.attention import (
    BLOCKED,
    CONVOLUTION,
    NUMBERS,
    PLAIN,
    Attention,
)
from scaling.experiments.cases.scaling import CROWDED, Scaling
from scaling.experiments.experiment import Point, row
from scaling.experiments.naive import straightforward
from scaling.experiments.registry import BENCHES
from scaling.long_conv import operators as long_conv
from scaling.models import build
from scaling.observe.memory import reset_peak
from scaling.ops import tiles
from scaling.runs.folder import RunFolder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Runs a bench without starting processes; its rows by (case, length), and its summary."""

    def measure(name, options, point, *_place, **_settings):
        experiment = TypeAdapter(BENCHES[name]).validate_python(options)
        return "ok", list(experiment.measure(point, torch.device("cpu")))

    def run(name: str, *overrides: str) -> tuple[dict[tuple[str, int], float], str]:
        monkeypatch.setattr(ranks, "measure", measure)
        bench.main([f"bench={name}", f"benches={tmp_path}", *overrides])
        folder: Path = tmp_path / name
        with (folder / "rows.csv").open(newline="") as file:
            rows = {(r["case"], int(r["length"])): float(r["value"]) for r in csv.DictReader(file)}
        return rows, (folder / "summary.md").read_text()

    return run


def test_every_configuration_is_that_of_a_bench():
    names = sorted(file.stem for file in (config_folder() / "bench").glob("*.yaml"))
    assert names == sorted(BENCHES)
    for name in names:
        config = compose("bench", [f"bench={name}"], bench.BenchConfig)
        assert config.name == config.bench["name"] == name
        points = list(config.options().points())
        assert points and len({point.name for point in points}) == len(points)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench.long=1", "unknown key bench.long for bench=attention, did you mean"),
        ("bench.lengths=[0]", r"bench.lengths=\[0\]: must be greater than or equal to 1"),
        (
            "bench=scaling +bench.execution.tiles=1",
            "unknown key bench.execution.tiles, did",
        ),
        ("bench=scaling +bench.execution.offload=disk", "bench.execution.offload='disk': must be"),
        ("bench=scaling +bench.execution.tile_bytes=0", "tile_bytes=0: must be greater"),
        ("bench=scaling bench.model.hiden=8", "unknown key bench.model.hiden for .*, did you mean"),
        ("bench=train_step +bench.models.mine.hidden=8", "unknown bench.models.mine.name=None"),
        (
            "bench=scaling bench.weak_tokens=1",
            "bench.weak_tokens=1: must be greater than or equal to",
        ),
        ("bench.memory_bytes=0", "bench.memory_bytes=0: must be greater than or equal to 1"),
        ("bench.channels=many", "bench.channels='many': must be a valid integer"),
    ],
)
def test_options_are_those_of_the_case(override, message):
    with pytest.raises(ConfigError, match=message):
        bench.main(["bench=attention", *override.split()])


def test_points_that_failed_are_measured_again_and_no_others(tmp_path, monkeypatch):
    """What is shown is of all points, or nothing is."""
    lacking = {"memory_plain_attention_N16_sp1"}
    asked: list[str] = []

    def measure(_experiment, _options, point, *_place, **_settings):
        asked.append(point.name)
        rows = [row(f"{side}: memory", 1.0, "B") for side in NUMBERS]
        return ("no memory", []) if point.name in lacking else ("ok", rows)

    monkeypatch.setattr(ranks, "measure", measure)
    command = ["bench=attention", "bench.lengths=[16]", f"benches={tmp_path}"]
    folder = tmp_path / "attention"
    for name in ("summary.md", "figure.png"):  # of other points
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    with pytest.raises(RunError, match=r"1 of 4 points failed, memory_plain_\S+: no memory"):
        bench.main(command)
    assert len(asked) == 4 and not (folder / "summary.md").exists()
    with (folder / "metrics.jsonl").open("a") as file:  # killed while it wrote a fifth
        file.write('{"point": "memory_plain_attention_N16_sp1", "value": 1}\n')
    lacking.clear()
    bench.main(command)
    assert asked[4:] == ["memory_plain_attention_N16_sp1"]
    rows = RunFolder(folder).rows()
    assert len(rows) == 12 and sum(each.get("status") == "ok" for each in rows) == 4
    assert "commit" in (folder / "summary.md").read_text() and (folder / "figure.png").exists()
    with pytest.raises(RunError, match=r"another configuration: bench.channels was 1, is 2; "):
        bench.main([*command, "bench.channels=2"])


def test_data_and_convert_are_benches(small, tmp_path):
    rows, summary = small("convert", "bench.residues=2000", "bench.turns=1")
    assert rows["synthetic backbones", 0] > 0
    assert "| conversion: time / unpickling | 1 | " in summary and "| <= 2 |" in summary
    assert (tmp_path / "convert" / "figure.png").stat().st_size > 10_000
    rows, summary = small("data", "bench.chains=1300", "bench.tokens=4096", "bench.sp=2")
    assert rows["write", 0] > 0
    assert "600 random chains of 650, beside a slice for each" in summary


@pytest.mark.parametrize("name", ["se3_hyena", "se3_hyena_paper"])
def test_the_straightforward_step_computes_the_same(name):
    """Outputs and every gradient, where our products, convolutions and tiles are not found."""
    torch.manual_seed(0)
    n = 100  # tiles are cut of more than 64 tokens
    model = build(name, vectors=1, scalars=3, hidden=4, gate_hidden=3, operators=2).double()
    batch = GeometricBatch(
        torch.randn(2, 3, n, dtype=torch.float64),
        torch.randn(2, 1, 3, n, dtype=torch.float64),
        torch.randn(2, 3, n, dtype=torch.float64),
        torch.arange(n).expand(2, -1).contiguous(),
    )

    def outputs_and_gradients() -> list[torch.Tensor]:
        out = model(batch)
        parts = [out.points, out.vectors, out.scalars]
        loss = torch.cat([part.flatten() for part in parts]).sin().sum()
        return [*parts, *torch.autograd.grad(loss, parameters)]

    parameters = list(model.parameters())
    tiles.set_execution(model, Execution(tile_bytes=1 << 14, recompute_operators=True))
    ours = outputs_and_gradients()
    straightforward(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(clifford.GeometricProduct, "forward")
        patch.delattr(long_conv, "Convolution")
        patch.delattr(tiles.Tiled, "_by_tiles")
        theirs = outputs_and_gradients()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm().clamp(min=1e-3)


def test_train_step_compares_time_and_memory(small):
    sizes = [
        f"bench.models.{name}.{size}"
        for name in ("paper", "default")
        for size in ("hidden=2", "operators=1")
    ]
    rows, summary = small("train_step", "bench.lengths=[32]", "bench.seconds=0.01", *sizes)
    for name in ("paper", "default"):
        assert rows[f"{name}: speed-up over the straightforward step", 32] > 0
        assert rows[f"{name}: step, straightforward", 32] > 0
        assert rows[f"{name}: memory, ours", 32] > 1e7
        assert f"| {name}: memory, straightforward / ours | 1 | " in summary
        assert f"| {name}: speed-up over the straightforward step | 1 | " in summary
    assert summary.count("| >= 3 |") == 2


TINY = {"name": "se3_hyena", "channels": 2, "hidden": 2, "operators": 1}


def test_scaling_derives_speed_up_efficiency_and_share():
    case = Scaling(
        model=TINY, strong_lengths=[1024], strong_sp=[2], weak_tokens=256, weak_sp=[2, 4]
    )
    points = [(1024, 1), (256, 1), (1024, 2), (512, 2), (1024, 4)]
    assert [(point.length, point.ranks) for point in case.points()] == 3 * points
    rows = []
    for (n, sp), seconds in zip(points, (8.0, 2.0, 5.0, 2.5, 4.0), strict=True):
        mark = CROWDED if sp == 4 else ""
        for noise in (0.9, 1.0, 30.0):  # the median is what counts
            rows.append(row(f"step{mark}", seconds * noise, sp=sp, length=n))
            waiting = 0.5 * noise * (sp > 1)
            rows.append(row(f"exposed communication{mark}", waiting, sp=sp, length=n))
    found, _ = case.conclude(rows)
    assert {(r["case"], r["sp"], r["length"]): pytest.approx(r["ratio"]) for r in found} == {
        ("strong: 2 ranks, speed-up over one", 2, 1024): 1.6,
        ("weak: efficiency", 2, 512): 0.8,
        ("weak: efficiency, log-corrected", 2, 512): 0.8 * 9 / 8,
        (f"weak: efficiency{CROWDED}", 4, 1024): 0.5,
        (f"weak: efficiency, log-corrected{CROWDED}", 4, 1024): 0.5 * 10 / 8,
        ("exposed communication / step", 2, 1024): 0.1,
        ("exposed communication / step", 2, 512): 0.2,
        (f"exposed communication / step{CROWDED}", 4, 1024): 0.125,
    }


def test_scaling_measures_a_point():
    case = Scaling(
        model=TINY, strong_lengths=[64], strong_sp=[2], weak_tokens=64, weak_sp=[2], steps=1
    )
    step, waiting = case.measure(Point(length=64), torch.device("cpu"))
    assert step["value"] > 0 and waiting["value"] == 0


def test_attention_runs_beside_the_convolution_until_it_does_not_fit(small, tmp_path):
    tiny = ("bench.lengths=[16,64]", "bench.seconds=0.01")
    rows, summary = small("attention", *tiny)
    for n in (16, 64):
        assert rows[f"{CONVOLUTION}: time", n] > 0
        for side in (PLAIN, BLOCKED):
            assert rows[f"{side}: time / {CONVOLUTION}", n] > 0
        assert all(rows[f"{side}: memory", n] > 1e7 for side in NUMBERS)
    assert f"- {PLAIN.capitalize()}: " in summary
    assert (tmp_path / "attention" / "figure.png").stat().st_size > 20_000


def test_attention_stops_before_what_is_too_much():
    """Memory and time are foreseen, and not tried."""
    case = Attention([256, 1 << 20])
    for side, unit in ((PLAIN, "GiB"), (BLOCKED, "seconds")):
        fits, stops = (
            each
            for n in case.lengths
            for each in case.measure(Point("memory", side, n), torch.device("cpu"))
        )
        assert fits["case"] == f"{side}: memory"
        assert stops["case"] == f"{side}: would take" and stops["unit"] == unit
        assert stops["value"] > (case.longest_s if side == BLOCKED else 4)


def test_memory_is_about_what_was_foreseen():
    """Sure of the magnitude alone: what small tensors free is not given back at once."""
    before = reset_peak(cpu := torch.device("cpu"))
    (found,) = Attention([1 << 11]).measure(Point("memory", PLAIN, 1 << 11), cpu)
    assert found["value"] - before < 2.5 * 4 * NUMBERS[PLAIN][1] * 2**22


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({10: 0.5, 1000: 50.0, 20: 2.0}, "slower than the long convolution from N = 20 on"),
        ({1: 0.5, 2: 0.9}, "as fast as the long convolution, or faster, at the longest N"),
        ({1: 1.0, 2: 4.0}, "slower than the long convolution from N = 1 on"),
        ({1: 2.0, 2: 0.9}, "as fast as the long convolution, or faster, at the longest N"),
    ],
)
def test_attention_says_from_which_length_on_it_is_slower(ratios, said):
    case = f"{PLAIN}: time / {CONVOLUTION}"
    rows = [row(case, 1.0, "s", ratio, length=n) for n, ratio in ratios.items()]
    rows.append(row(f"{PLAIN}: would take", 5.0, "GiB", length=2000))
    concluded, remarks = Attention([1]).conclude(rows)
    assert f"- Plain attention: {said}; N = 2,000 would take 5 GiB.\n" in remarks
    assert concluded == rows[:-1]


TWO_MODELS = (
    "bench.names=[clifford_mlp,transformer]",
    "bench.lengths=[16,64]",
    "bench.sp=[1]",
    "bench.steps=1",
    "bench.parameters=5000",
)


def test_models_are_measured_beside_the_first(small):
    rows, summary = small("models", *TWO_MODELS)
    for name in ("clifford_mlp", "transformer"):
        assert rows[f"{name}: step", 16] > 0 and rows[f"{name}: memory", 64] > 0
        assert f"{name}: step / clifford_mlp's" in summary


def test_models_stop_where_a_step_would_take_too_long(small):
    rows, summary = small("models", *TWO_MODELS, "bench.limit_s=1e-9")
    assert {length for case, length in rows if "would take" not in case} == {16}
    assert "- transformer: would take" in summary and "N = 64" in summary


def test_equivariance_is_measured_in_every_precision(small):
    rows, _ = small(
        "equivariance",
        "bench.names=[clifford_mlp,transformer]",
        "bench.lengths=[20]",
        "bench.sp=[1]",
    )
    assert rows["clifford_mlp: turned, float64", 20] < 1e-12
    assert 1e-12 < rows["clifford_mlp: mirrored, float32", 20] < 1e-5
    assert 1e-5 < rows["clifford_mlp: turned, bf16", 20] < 0.1
    assert rows["transformer: turned, float64", 20] > 0.1


def test_the_search_for_neighbours_is_set_against_its_goals(small):
    rows, summary = small("neighbours", "bench.lengths=[64,256]", "bench.neighbours=4")
    for kind in ("chain", "uniform"):
        assert 4 * 64 < rows[f"{kind}: distances / (N k)", 64] < 50 * 4 * 64
        assert f"| {kind}: longest / shortest |" in summary and "<= 12" in summary


SPAWN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
with open(sys.argv[1], "w") as mark:
    mark.write(f"{child.pid} {time.time()}.")
child.wait()
"""


def test_a_start_is_timed_until_something_has_happened_and_leaves_no_process(tmp_path):
    mark, starts = tmp_path / "mark", []

    def happens(began: float) -> float | None:
        starts.append(began)
        text = mark.read_text() if mark.exists() else ""
        return float(text.split()[1][:-1]) if text.endswith(".") else None

    command = [sys.executable, "-c", SPAWN, str(mark)]
    seconds = startup.seconds_until(command, happens, dict(os.environ))
    child, at = mark.read_text().split()
    assert seconds == float(at[:-1]) - starts[-1] > 0
    assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == "zombie"
    with pytest.raises(LongfoldError, match=r"ended too early, exit code 3: oh"):
        early = [sys.executable, "-c", "print('oh'); raise SystemExit(3)"]
        startup.seconds_until(early, happens=lambda _: None, environ=dict(os.environ))
