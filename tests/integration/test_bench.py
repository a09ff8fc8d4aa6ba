"""A small bench of the long convolution: every case runs, and its numbers are what they say."""

import csv
import math

import pytest
import torch

from data_pipeline.errors import OptionError
from launch import bench
from scaling.experiments.cases import machine
from scaling.experiments.cases.long_conv import LongConv, awkward_length, memory_fit
from scaling.experiments.rivals import CROSS, channel_all_to_all_conv, expanded_conv
from scaling.experiments.views import table
from scaling.ops import vector_long_conv
from scaling.parallel import SequenceShard
from scaling.parallel.shard import redistribute


def test_bench_measures_every_case_and_writes_both_tables(tmp_path, capsys):
    bench.main([f"benches={tmp_path}", "bench.lengths=[512]", "bench.seconds=0.01", "device=cpu"])
    printed = capsys.readouterr().out
    summary = (tmp_path / "long_conv" / "summary.md").read_text()
    assert all(f"| {case} |" in summary for case in LongConv.goals)
    assert summary.split("\n\n")[1] in printed
    with (tmp_path / "long_conv" / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["sp"] for row in rows} == {"1", "2"}
    (sent,) = (row for row in rows if row["case"] == "exchange: bytes / formula")
    assert float(sent["value"]) == 18 * 8 * (256 // 2 + 1) * 8 / 2
    with pytest.raises(OptionError, match=r"bench.lengths=513: is no multiple of sp=2.* try 512"):
        bench.main([f"benches={tmp_path}", "bench.lengths=[513]", "bench.sp=[2]"])


def test_means_goals_and_the_line_through_memory():
    case = "vector, forward: speed-up over the listing"
    ratios = [
        {"case": case, "sp": 1, "length": n, "value": 1.0, "ratio": r, "unit": "s"}
        for n, r in ((1, 2.0), (2, 8.0))
    ]
    assert table(ratios, LongConv.goals).splitlines()[2:] == [
        f"| {case} | 1 | 2 | 8 | 4 | >= 4.5 | no |"
    ]
    line = [
        {"case": "memory", "sp": sp, "length": n, "value": 1e6 + 30 * n / sp}
        for n in (1000, 100_000)
        for sp in (1, 2)
    ]
    fit = memory_fit(line)
    assert (fit["base"], fit["per_token"]) == (pytest.approx(1e6), pytest.approx(30))
    assert fit["value"] < 1e-6
    line[0]["value"] *= 2
    assert memory_fit(line)["value"] > 0.1


def by_channels(group):
    whole = torch.randn(2, 4, 3, 24, generator=torch.Generator().manual_seed(0)).double()
    natural, cyclic = (SequenceShard(24, group, kind) for kind in ("contiguous", "cyclic"))
    q, k = natural.scatter(whole)
    u = redistribute(channel_all_to_all_conv(q, k, group), natural, cyclic)
    assert torch.allclose(u, cyclic.scatter(vector_long_conv(whole[0], whole[1])), atol=1e-12)


def test_rivals_compute_the_same(distributed):
    distributed(by_channels, 2)
    q, k = torch.randn(2, 4, 3, 30, dtype=torch.float64)
    assert torch.allclose(expanded_conv(CROSS, q, k), vector_long_conv(q, k), atol=1e-12)


def test_awkward_lengths_are_awkward():
    assert [awkward_length(n) for n in (1 << 14, 1000, 16)] == [(1 << 14) - 1, 999, 13]


def measure_exchange(_group, case, point) -> list[dict]:
    return list(case.measure(point, torch.device("cpu")))


def test_the_machine_bench_sets_a_step_against_the_peaks(distributed, monkeypatch):
    """Every part runs; shares of a step sum to 1; a least time is work over the best peak."""
    for name, size in (("IN_MEMORY", 1 << 10), ("SQUARE", 32), ("COLUMNS", 64)):
        monkeypatch.setattr(machine, name, size)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # for good
    model = {"name": "se3_hyena", "channels": 2, "hidden": 3, "operators": 1}
    case = machine.Machine(
        models={"tiny": model}, lengths=[512], transforms=[64, 256], seconds=0.001
    )
    rows = []
    for point in case.points():
        if point.part == "exchange":  # among the whole world of the tests
            found = distributed(measure_exchange, 8, case, point)[0]
        else:
            found = case.measure(point, torch.device("cpu"))
        rows += [point.labels | each for each in found]
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)
    assert {row["case"].partition(":")[0] for row in rows} == {
        "1 thread", "all cores", "all-to-all", "tiny",
    }  # fmt: skip
    more, _ = case.conclude(rows)
    ratio = {row["case"]: row["ratio"] for row in more}
    shares = [share for title, share in ratio.items() if title.endswith("/ step")]
    assert len(shares) == 3 and sum(shares) == pytest.approx(1)
    value = {(row["case"], row["length"]): row["value"] for row in rows}
    products = [x for (case, _), x in value.items() if case.startswith("1 thread: (")]
    bests = {
        "matrix_flops at the peak of matrix products / projection": max(products[:3]),  # float32
        "transform_flops at the peak of transforms / transforms": value[
            "1 thread: real transform", 256
        ],
    }
    for title, best in bests.items():
        work, place = title.split()[0], title.split()[-1]
        least = value[f"tiny: {work}", 512] / best / value[f"tiny: {place}", 512]
        assert ratio[f"tiny: {title}"] == pytest.approx(least)
