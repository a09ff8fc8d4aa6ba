"""Foreseen memory, exchanges and time against what is counted, measured and known."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.tasks.needles import Needles
from launch.bench import BenchConfig
from launch.config.compose import compose
from launch.plan import main
from scaling.cost.machine import (
    MACHINES,
    NETWORKS,
    Machine,
    Network,
    between,
    measured_machine,
    measured_rates,
)
from scaling.cost.planner import Job, memory_by_part, process_bytes, sample_bytes
from scaling.cost.time import budget, step_seconds
from scaling.cost.trace import Operator, _Operators, trace_step
from scaling.execution import Execution
from scaling.experiments.cases.plan import Plan
from scaling.experiments.experiment import Point
from scaling.models import MODELS, build
from scaling.ops.pairs import block_tokens
from scaling.ops.tiles import most_kept_per_token
from tests.small_models import small_model

SMALL = ["experiment=million", "task.tokens=8192", "engine=ddp"]


def job(length: int, **changes) -> Job:
    torch.manual_seed(0)
    model = build("se3_hyena", 1, 3, channels=4, hidden=4, gate_hidden=4, operators=2)
    task = Needles(tokens=length, pairs=length // 16)
    data = sample_bytes(task, length, 1, 1, 2)
    run = Execution(tile_bytes=length << 9, workspace_bytes=length << 5)
    return replace(Job(model, run, length, 1, 1, 2, 2, 1, data), **changes)


@pytest.mark.parametrize("rank", [0, 1023])
def test_one_rank_of_1024_sends_what_the_formulas_say(rank):
    """The paper's operator convolves S scalars and 1 + V vectors of 3 components: twice as many
    operands as results. All bins but the own slice leave a rank with its operands; with results
    its slice of everybody's does; for the gradients, results and operands change roles."""
    length, ranks, scalars, vectors = 1 << 21, 1024, 2, 1
    model = build("se3_hyena_paper", vectors, scalars, operators=1, hidden=2, gate_hidden=2)
    trace = trace_step(model, Execution(), length, ranks=ranks, rank=rank)
    bins = length // ranks // 2 + 1
    own = bins * (rank + 1) // ranks - bins * rank // ranks
    streams = 3 * (scalars + 3 * (1 + vectors))
    convolutions = trace.exchanges["long_conv"]
    assert convolutions.bytes == 8 * streams * ((bins - own) + own * (ranks - 1))
    assert convolutions.calls == 2 * (2 + 2)
    assert trace.exchanges["redistribute"].calls == 2  # the data, at the door


def test_every_rank_together_sends_the_work_of_the_model():
    """Over all ranks, the exchanges of one step are those that `Model.work` states; the door's are
    the data's."""
    length, ranks = 53, 3
    for name in ("se3_hyena", "hyena", "transformer"):
        model = small_model(name, torch.float32)
        sent = 0
        for rank in range(ranks):
            exchanges = trace_step(model, Execution(), length, ranks=ranks, rank=rank).exchanges
            sent += sum(x.bytes for key, x in exchanges.items() if key != "redistribute")
        assert sent == round(model.work(length, ranks).exchange_bytes * length), name


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_planned(name):
    """Work, memory and time of one of three ranks; the model stays as it was."""
    model = small_model(name, torch.float32)
    before = [p.clone() for p in model.parameters()]
    shared = Job(model, Execution(), 600, 1, 1, 3, 3, 0, 0, device="cuda")
    trace = shared.trace()
    assert sum(memory_by_part(shared, trace).values()) > 0
    seconds = step_seconds(shared, trace, MACHINES["h100"])
    assert all(x > 0 and math.isfinite(x) for x in seconds.values())
    assert {"other", "optimizer", "exchange"} <= seconds.keys()
    assert all(map(torch.equal, before, model.parameters()))


def test_more_ranks_hold_less_and_one_exchanges_nothing():
    model = small_model("hyena", torch.float32)
    jobs = [Job(model, Execution(), 600, 1, 1, ranks, ranks, 0, 0, device="cuda")
            for ranks in (1, 3)]  # fmt: skip
    traces = [each.trace() for each in jobs]
    alone, shared = (sum(memory_by_part(*each).values()) for each in zip(jobs, traces, strict=True))
    assert alone > shared
    assert "exchange" not in step_seconds(jobs[0], traces[0], MACHINES["h100"])


def test_pairs_are_computed_in_the_blocks_of_the_device():
    """An operator on pairs counts once a block; nothing else does."""
    length, heads = 1 << 14, 2
    model = build("transformer", 1, 3, channels=4, heads=heads, blocks=1)
    most = {}
    for device in ("cpu", "cuda"):
        trace = trace_step(model, Execution(), length, device=device)
        most[device] = max(n for (part, _), n in trace.operators.items() if part == "pairs")
    assert most["cpu"] / most["cuda"] == pytest.approx((block_tokens("cuda", heads) / 256) ** 2)


def test_results_of_tiles_that_wait_to_be_joined_lie_on_the_heap():
    """All of them, also where a tile that runs here stands for four; what they become is large, and
    lies elsewhere."""

    def heap(tiles: float) -> int:
        operators = _Operators(1 << 20, tiles, "cpu")
        with operators:
            torch.cat([torch.empty(1 << 17, device="meta") for _ in range(8)], -1)
        return operators.heap

    assert (heap(1.0), heap(4.0)) == (4 << 20, 7 << 20)


def test_coarse_tiles_weigh_and_count_like_real_ones(monkeypatch):
    """13 tiles, and 4 in their place."""
    from scaling.cost import trace as module

    length = 1 << 13
    run = Execution(tile_bytes=length << 7, workspace_bytes=length << 5)
    one = job(length, sp=1, world=1, execution=run)
    monkeypatch.setattr(module, "MOST_TILES", 1000)
    real = one.trace()
    monkeypatch.setattr(module, "MOST_TILES", 4)
    coarse = one.trace()

    def total(traced, what):
        return sum(getattr(op, what) * n for (_, op), n in traced.operators.items())

    assert 10 < most_kept_per_token(one.model) / 128 < 15
    assert total(coarse, "matrix_flops") == pytest.approx(total(real, "matrix_flops"), rel=0.02)
    assert total(coarse, "transform_flops") == total(real, "transform_flops")
    calls, peaks, heaps = zip(*((sum(x.operators.values()), sum(x.held.values()), x.heap)
                                for x in (coarse, real)), strict=True)  # fmt: skip
    assert calls[0] == pytest.approx(calls[1], rel=0.05)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.15)
    assert heaps[0] == pytest.approx(heaps[1], rel=0.15)


def test_matrix_products_of_a_trace_are_those_that_are_executed():
    model = small_model("transformer", torch.float32)
    trace, work = trace_step(model, Execution(), 100), model.work(100)
    traced = sum(op.matrix_flops * n for (_, op), n in trace.operators.items())
    assert traced == pytest.approx(100 * (work.matrix_flops + 4 / 3 * work.pair_flops))


def test_time_follows_from_rates():
    machine = Machine("m", "cpu", {16: 1e9, 256: 4e9}, {64: 1e9}, 1e9, 1e-3)
    assert between(machine.products, 64) == pytest.approx(2e9)
    assert between(machine.products, 1) == 1e9 and between(machine.products, 999) == 4e9
    assert machine.seconds(Operator(1000)) == pytest.approx(1e-6 + 1e-3)
    assert machine.seconds(Operator(8, 1e9, 256)) == pytest.approx(0.25 + 8e-9 + 1e-3)
    slower = replace(machine, factors={"bytes": 3.0, "pairs": 2.0})
    assert slower.seconds(Operator(1e9)) == pytest.approx(3 + 1e-3)
    assert replace(machine, device="cuda").seconds(Operator(1000)) == pytest.approx(1e-3)
    network = Network("n", 1e-3, 1e6)
    assert network.seconds(3, 2e6, 8) == pytest.approx(3 * 3e-3 + 2)
    assert network.seconds(3, 2e6, 1) == 0
    one = job(1 << 12, world=4, micro_batches=3)  # two data-parallel ranks
    takes = budget(one, {"projection": 3.0, "exchange": 1.0}, 1e9)
    assert takes.tokens_per_s == 2 * 3 * (1 << 12) / 4 and takes.exchange_share == 0.25
    assert takes.rank_hours == 4 * takes.hours == takes.steps * 16 / 3600


def test_states_are_partitioned_by_stage():
    one = job(1 << 10)
    trace, size = one.trace(), one.parameter_bytes
    held = [memory_by_part(replace(one, world=4, zero_stage=stage), trace) for stage in range(4)]
    assert [each["optimiser"] for each in held] == [2 * size] + 3 * [2 * (size // 4)]
    assert held[3]["parameters and gradients"] < held[2]["parameters and gradients"]
    assert process_bytes(one)[0] > 50 << 20
    assert most_kept_per_token(one.model) > 0


def test_the_command_prints_parts_that_sum_up(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*SMALL, "ranks=3", "output=here"])
    text = capsys.readouterr().out
    assert "a rank of 3 on a CPU, dp 1, sp 3, 1 x 8,192 tokens" in text
    rows = [line.split() for line in text.splitlines() if " MiB" in line]
    sizes = [float(row[-3].replace(",", "")) for row in rows]
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=len(sizes))
    assert "no times: machine=this: benches/machine holds no measurements" in text
    assert "python -m launch bench bench=machine" in text
    written = json.loads((tmp_path / "here" / "plan.json").read_text())
    assert written["text"] in text and written["peak_bytes"] == sum(written["memory"].values())


@pytest.mark.parametrize("machine", MACHINES)
def test_presets_foresee_times_and_say_that_they_are_not_measured(machine, capsys):
    main([*SMALL, "gpus=16", f"machine={machine}", "tokens=1e9"])
    text = capsys.readouterr().out
    assert f"{MACHINES[machine].name} (not measured)" in text
    assert "sequence over InfiniBand NDR (not measured)" in text
    assert "GPU-hours" in text and "process" not in text and " ms" in text


def test_the_best_of_a_search_fits_and_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["experiment=recall", "task.tokens=16", "task.held_out_size=8", "train.batch_size=4",
             "train.micro_batch_size=2", "model.channels=4", "model.hidden=4"]  # fmt: skip
    main([*small, "machine=h100", "search=true", "gpus=1", "memory_gib=1", "output=found"])
    text = capsys.readouterr().out
    assert "the fastest first" in text
    found = json.loads((tmp_path / "found" / "plan.json").read_text())
    steps = [each["step_s"] for each in found["ranking"]]
    assert steps == sorted(steps) and found["ranking"][0]["memory"] <= 1 << 30
    told = (tmp_path / "found" / "train.args").read_text().splitlines()
    assert told[: len(small)] == small
    command = [sys.executable, "-m", "launch.train", *told, "train.steps=2", "device=cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "runs/recall/status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ranks=0"], "ranks=0: must be greater than or equal to 1"),
        (["ranks=4", "gpus=8"], "ranks=4 and gpus=8 are one number: give one"),
        (["parallel.sp=3"], r"dp\(1\) \* sp\(3\) = 3"),
        (["parallel.dp=2"], r"batch_size=1: must be a multiple of dp\(2\)"),
        (["device=cuda", "machine=this"], "device=cuda: name the GPU"),
        (["train.precision=float64"], "plan foresees float32 and bf16"),
        (["task.tokens=9999999999"], r"max_length=4194304: sequence 0 of train has 9999999999"),
        (["length=1"], r"length=1: must lie in 2 .* 4194304 \(train.max_length\)"),
        (["machine=h1000"], "machine=h1000: no preset and no folder; presets: this, a100, h100"),
        (["network=smoke", "machine=h100"], f"presets: {', '.join(NETWORKS)}"),
        (["search=true"], "benches/machine holds no measurements of a machine"),
        (["search=true", "machine=h100", "ranks=8", "memory_gib=1e-6"],
         r"memory_gib=1e-06: nothing fits; dp 1, sp 8 .* needs .* GiB a rank, .* GiB more"),
        (["tokens=0"], "tokens=0"),
    ],
)  # fmt: skip
def test_impossible_jobs_are_refused(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        main(["experiment=million", "task.tokens=8192", "engine=ddp", *arguments])


def bench_rows(factors: dict[str, float]) -> list[dict]:
    """Of a machine on which parts take what its rates and these factors say."""
    rates = {"(1024 x 1024) @ (1024 x 1024), float32": 100.0, "(16 x 16) @ (16 x 9), float32": 40.0,
             "(16 x 16) @ (16 x 9), bfloat16": 20.0, "copy": 15.0, "triad": 16.0,
             "real transform": 12.0, "an operator of one number": 2.0}  # fmt: skip
    rows = [{"case": f"1 thread: {key}", "value": x, "length": 0} for key, x in rates.items()]
    rows += [{"case": "all-to-all: latency", "value": 200.0, "length": 0},
             {"case": "all-to-all: sent by a rank", "value": 1.5, "length": 0}]  # fmt: skip
    machine = measured_machine(rows, OPTIONS, "known")
    assert machine.factors == {} and machine.network
    assert machine.network.latency_s == pytest.approx(2e-4)
    for name, section in OPTIONS["models"].items():
        for n in (128, 512):
            trace = trace_step(build(**section, vectors=1, scalars=4), Execution(), n)
            for part, seconds in replace(machine, factors=factors).seconds_by_part(trace).items():
                rows.append({"case": f"{name}: {part}", "value": seconds, "length": n})
    return rows


OPTIONS: dict[str, Any] = {
    "models": {"a": {"name": "hyena"}, "b": {"name": "transformer"}},
    "vectors": 1,
    "scalars": 4,
    "execution": {},
}


def test_calibration_finds_the_factors_that_steps_were_made_with():
    factors = {"products": 1.5, "spectra": 1.2, "bytes": 1.7, "calls": 2.5}
    found = measured_machine(bench_rows(factors), OPTIONS, "known").factors
    for key in ("bytes", "calls", "products"):
        assert found[key] == pytest.approx(factors[key], rel=0.02), key
    for part in ("projection", "pairs", "transforms"):
        assert found[part] == pytest.approx(1, abs=0.01), part


def test_a_bench_that_lacks_peaks_is_no_machine():
    with pytest.raises(ConfigError, match="lacks some of a machine's peaks"):
        measured_machine(bench_rows({})[3:], OPTIONS, "half")


def test_a_lone_gpu_is_measured_without_an_exchange():
    """Times of one rank follow; several need a network to be named."""
    rows = [row | {"device": "cuda"} for row in bench_rows({}) if "all-to-all" not in row["case"]]
    machine = measured_rates(rows, "mine")
    assert (machine.device, machine.network) == ("cuda", None)
    model = build("hyena", vectors=1, scalars=4)
    one, two = (Job(model, Execution(), 64, 1, 1, sp, sp, 0, 0, "cuda") for sp in (1, 2))
    assert step_seconds(one, one.trace(), machine)
    with pytest.raises(ConfigError, match="mine: measured without an exchange"):
        step_seconds(two, two.trace(), machine)
    assert step_seconds(two, two.trace(), machine, NETWORKS["nvlink4"])["exchange"] > 0


def test_the_bench_sets_foreseen_beside_measured():
    """Small, in this process; a point that is foreseen exactly and one that is not."""
    bench = Plan(machine={}, models={"tiny": {"name": "hyena", "channels": 4}}, lengths=[256],
                 longest={}, sp=[1], seconds=0.01)  # fmt: skip
    rows = []
    for part in ("foreseen", "measured"):
        point = Point(part, "tiny", 256)
        rows += [point.labels | each for each in bench.measure(point, torch.device("cpu"))]
    value = {row["case"]: row["value"] for row in rows}
    assert 0.5 < value["tiny: memory, foreseen"] / value["tiny: memory, measured"] < 1.5
    assert value["tiny: step, measured"] > 0 and value["tiny: spread"] >= 0


def test_a_configured_bench_has_each_prediction_before_its_measurements():
    config = compose("bench", ["bench=plan"], BenchConfig)
    points = [(p.part, p.side, p.length, p.ranks) for p in config.options().points()]
    assert ("step", "attention", 1 << 14, 1) in points
    first = points.index(("foreseen", "transformer", 1 << 16, 1))
    measured = [("measured", "transformer", 1 << 16, sp) for sp in (1, 2)]
    assert points[first + 1 : first + 3] == measured
    assert ("foreseen", "transformer", 1 << 18, 1) not in points


def test_the_bench_concludes_with_its_errors():
    """On a machine that does what its rates say, times are foreseen; memory as stated."""
    machine = OPTIONS | {"lengths": [128], "transforms": [128]}
    bench = Plan(machine=machine, models={"tiny": {"name": "hyena", "channels": 8}},
                 lengths=[256, 512], longest={}, sp=[1], seconds=0.01)  # fmt: skip
    rows = [each | {"sp": 1} for each in bench_rows({"bytes": 1.7, "calls": 2.5})]
    known = measured_machine(rows, OPTIONS, "known")
    for n, memory, slower in ((256, 97, 1.0), (512, 104, 1.25)):
        one = bench._job("tiny", n, 1, "cpu")
        one.trace()  # the first makes tables that are kept
        seconds = slower * sum(step_seconds(one, one.trace(), known).values())
        values = {"memory, foreseen": memory, "memory, measured": 100, "step, measured": seconds,
                  "spread": 0.01 if n == 256 else 0.2}  # fmt: skip
        rows += [{"case": f"tiny: {key}", "length": n, "sp": 1, "value": float(x)}
                 for key, x in values.items()]  # fmt: skip
    found, said = bench.conclude(rows)
    errors = {row["case"]: row["value"] for row in found if row["unit"] == "relative"}
    assert errors == pytest.approx({
        "memory, worst error": 0.04, "memory, most too low": 0.03,
        "step, median error": 0.1, "step, worst error": 0.2,
    }, abs=1e-6)  # fmt: skip
    assert "Worst step: tiny, N = 512, sp = 1: -" in said
    assert "Spread above 5%: tiny at 512 on 1 (20%)." in said
