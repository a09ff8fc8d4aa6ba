"""Foreseen memory against counted memory."""

import json

import pytest
import torch

from data_pipeline.tasks.needles import Needles
from launch.plan import main
from scaling.cost import planner
from scaling.cost.planner import Job, memory_by_part
from scaling.execution import Execution
from scaling.models import build


def job(length: int) -> Job:
    task = Needles(tokens=length, pairs=length // 16)
    torch.manual_seed(0)
    model = build("se3_hyena", 1, 3, channels=4, hidden=4, gate_hidden=4, operators=2)
    cut = Execution(tile_bytes=length << 9, workspace_bytes=length << 5)
    return Job(model, task, cut, length, rows=1, micro_batches=1, sp=2, world=2, zero_stage=1)


def test_a_small_step_foresees_a_large_one(monkeypatch):
    """Budgets that cut parts and channels alike, at either size."""
    large = memory_by_part(job(1 << 14))
    monkeypatch.setattr(planner, "MOST_TOKENS", 1 << 11)
    small = memory_by_part(job(1 << 14))
    for part in ("kept activations", "FFT workspace and spectra", "data"):
        assert small[part] == pytest.approx(large[part], rel=0.08), part
    assert large["process"] > 50 << 20
    shards = job(1 << 12)
    shards.world, shards.zero_stage = 4, 3
    assert memory_by_part(shards)["parameters and gradients"] < large["parameters and gradients"]


def test_the_command_prints_parts_that_sum_up(capsys, tmp_path):
    arguments = ["experiment=million", "task.tokens=8192", "engine=ddp", "ranks=3"]
    main([*arguments, f"output={tmp_path / 'sweep'}"])
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "sweep" / "plan.json").read_text())["text"] == said.rstrip()
    first, *rows = said.splitlines()
    assert first == "a rank of 3 on a CPU (dp 1, sp 3), 1 x 8,192 tokens:"
    sizes = [float(row.split()[-2].replace(",", "")) for row in rows]
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=len(sizes))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("ranks=0", "ranks=0: must be greater than or equal to 1"),
        ("parallel.sp=3", r"dp\(1\) \* sp\(3\) = 3"),
        ("parallel.dp=2", r"batch_size=1: must be a multiple of dp\(2\)"),
        ("device=cuda", "plan foresees ranks on CPUs"),
        ("train.precision=float64", "plan foresees float32 and bf16"),
        ("task.tokens=9999999999", r"max_length=4194304: sequence 0 of train has 9999999999"),
        ("length=1", r"length=1: must lie in 2 .* 4194304 \(train.max_length\)"),
    ],
)
def test_impossible_jobs_are_refused(argument, said):
    from data_pipeline.errors import ConfigError

    with pytest.raises(ConfigError, match=said):
        main(["experiment=million", "task.tokens=8192", argument])
