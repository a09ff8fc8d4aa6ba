"""The run at a million tokens in short: 2^14 tokens, 10 steps, and what its gradients reach."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tasks.registry import build_task
from launch.config.check import options_of
from launch.config.compose import compose
from launch.config.settings import Config
from scaling.models import build
from tests.processes import run

TOKENS = 1 << 14
SHORT = ["experiment=million", f"task.tokens={TOKENS}", "task.pairs=1024"]


def test_two_ranks_learn_at_every_depth(tmp_path: Path):
    """Better than answering zero in every eighth of the sequence, by three standard errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "launch.train", *SHORT, "train.steps=10", "optim.warmup_steps=2",
               "engine=ddp", "device=cpu", f"runs={tmp_path}"]  # fmt: skip
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = run(command, cwd=Path(__file__).parents[2], env=environ)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    text = (tmp_path / "million" / "metrics.jsonl").read_text()
    *train, validation = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in train] == list(range(1, 11))
    samples = compose("train", SHORT, Config).task["held_out_size"]
    assert validation["tokens"] == samples * TOKENS and validation["equivariance_error"] < 1e-4
    assert len(validation["error_by_position"]) == 8
    for part in validation["error_by_position"]:
        assert part["loss"] + 3 * part["standard_error"] < 1, part


def test_an_answer_hears_the_question_half_a_sequence_away():
    """By gradients; they are zero once the convolutions' results are left out."""
    config = compose("train", SHORT, Config)
    task = build_task(config.task["name"], **options_of(config.task))
    model: Any = build("se3_hyena", task.vectors, task.scalars, **options_of(config.model))
    inputs = task.sample("train", [0], [0], 0, TOKENS).inputs
    reached = {}
    for name in ("with", "without"):
        inputs.vectors = inputs.vectors.detach().requires_grad_()
        model(inputs).points[0, :, TOKENS // 2].sum().backward()
        assert inputs.vectors.grad is not None
        reached[name] = inputs.vectors.grad.square().sum((0, 1, 2)).sqrt()
        for operator in model.operators:
            torch.nn.init.zeros_(operator.w)
    own = reached["with"][TOKENS // 2]
    assert reached["with"][0] > 1e-3 * own > 0
    assert reached["without"][TOKENS // 2] > 0 and reached["without"][0] == 0
