"""Invisible parallelism: outputs, every gradient and training do not depend on the ranks."""

from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from data_pipeline.batch import GeometricBatch
from scaling.execution import Execution
from scaling.models import MODELS
from scaling.ops.tiles import set_execution
from scaling.parallel.shard import SequenceShard
from tests.small_models import small_batch, small_model
from tests.threaded_ranks import run_threaded


def loss_of(out: GeometricBatch, given: GeometricBatch) -> Tensor:
    """Sum over valid tokens; touches points, vectors and scalars."""
    mask = given.mask
    terms = [
        (out.points - given.points.nan_to_num()).square() * mask[:, None],
        (out.vectors * 0.7 - given.vectors).square() * mask[:, None, None],
        (out.scalars - 0.3).square() * mask[:, None],
    ]
    return torch.stack([t.sum() for t in terms]).sum() / 100


def run(name, lengths, dtype, options, steps, group=None, sharded=False) -> list[Tensor]:
    """Outputs and their inputs' gradients (gathered), every parameter's gradient, and the
    parameters after `steps` of SGD."""
    options = dict(options)
    execution = options.pop("execution", Execution())
    bodies = options.pop("bodies", None)
    model, batch = small_model(name, dtype, **options), small_batch(lengths, dtype, bodies)
    set_execution(model, execution)
    shard = SequenceShard(max(lengths), group) if sharded else None
    given = batch.map(shard.scatter) if shard else batch
    fields = ("points", "vectors", "scalars")
    leaves = [getattr(given, field).requires_grad_() for field in fields]
    kept: list[Tensor] = []
    for step in range(max(steps, 1)):
        model.zero_grad()
        out = model(given, shard)
        loss_of(out, given).backward()
        sums = parameters_to_vector([p.grad for p in model.parameters() if p.grad is not None])
        if shard:
            dist.all_reduce(sums, group=group)
        if step == 0:
            tokens = [getattr(out, field).detach() for field in fields]
            tokens += [leaf.grad.clone() for leaf in leaves]
            kept = [shard.gather(t) if shard else t for t in tokens]
            kept += sums.split([p.numel() for p in model.parameters()])
        moved = parameters_to_vector(model.parameters()).detach() - 1e-3 * sums
        vector_to_parameters(moved, model.parameters())
    return kept + [p.detach() for p in model.parameters()]


@lru_cache
def one_process(case: int) -> list[np.ndarray]:
    return [t.detach().numpy() for t in run(*CASES[case][:-1])]


def relative_errors(ours: list[Tensor], expected: list[Tensor]) -> list[float]:
    """norm(a - b) / norm(b) of each tensor, with a floor of 1e-3 of the whole's norm."""
    floor = 1e-3 * torch.stack([b.norm() for b in expected]).norm()
    return [
        ((a - b).norm() / b.norm().maximum(floor)).item()
        for a, b in zip(ours, expected, strict=True)
    ]


def compare_with_one_process(group, case, expected):
    ours = run(*CASES[case][:-1], group=group, sharded=True)
    return max(relative_errors(ours, [torch.from_numpy(e) for e in expected]))


THREE = ("se3_hyena", "equivariant_transformer", "egnn")
"""In real processes, too: one of convolutions, one of pairs, one of neighbours."""
AGAIN = Execution(tile_bytes=1, recompute_operators=True, workspace_bytes=1, offload="file")
PACKED = {"bodies": ((6, 1, 9), (5,), (4, 5))}
BRANCHES = {"local": 8, "messages": "pairs", "context": 2}
CASES = [
    # unequal rows with a missing token and NaN in the padding; rows shorter than the group
    *[(name, [13, 5, 9], torch.float64, {}, 0, 1e-10) for name in MODELS],
    *[(name, [2, 1], torch.float64, {}, 0, 1e-10) for name in MODELS],
    *[(name, [16, 5, 9], torch.float64, PACKED, 0, 1e-10) for name in MODELS],
    *[(name, [16, 11], torch.float64, {}, 20, 1e-10) for name in MODELS],
    *[(name, [16, 11], torch.float32, {}, 20, 1e-5) for name in MODELS],
    ("se3_hyena", [11, 11], torch.float64, {"padding": "causal", "chiral": True}, 0, 1e-10),
    ("se3_hyena", [13, 5, 9], torch.float64, {"layers": 2, "local": 8}, 0, 1e-10),
    ("se3_hyena", [2, 1], torch.float64, {"layers": 2, "local": 8}, 0, 1e-10),
    ("se3_hyena", [16, 5, 9], torch.float64, PACKED | BRANCHES, 0, 1e-10),
    ("clifford_mlp", [13, 5, 9], torch.float64, {"layers": 1, "local": 8}, 0, 1e-10),
    # tiles of 16 tokens where a rank has more than 64, operators and their exchanges run again
    *[(name, [134, 91], torch.float64, {"execution": AGAIN}, 0, 1e-10) for name in MODELS],
    ("se3_hyena", [134, 91], torch.float64, {"execution": AGAIN, "salience": True}, 0, 1e-10),
]


def takes_long(case) -> bool:
    """Training, and tiles."""
    _, _, _, options, steps, _ = case
    return steps > 0 or "execution" in options


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_outputs_and_gradients_equal_one_process(world, name, request):
    """And training and recomputation, on 2 ranks. Shapes are checked on 3."""
    if world != 3:
        request.getfixturevalue("without_annotations")
    for number, case in enumerate(CASES):
        again = world == 2 and name not in THREE and case[2] == torch.float64
        if case[0] == name and (again or not takes_long(case)):
            for error in run_threaded(compare_with_one_process, world, number, one_process(number)):
                assert error < case[-1], case


@pytest.mark.slow  # some minutes; the ordinary tests have 2 ranks
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_one_process(name):
    trained = [(case[0], case[2]) if case[4] else None for case in CASES]
    number = trained.index((name, torch.float64))
    for world in (1, 2, 3, 4, 8):
        for error in run_threaded(compare_with_one_process, world, number, one_process(number)):
            assert error < CASES[number][-1]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_training_and_recomputation_equal_one_process(distributed, world):
    """In real processes, in a group that does not begin at rank 0."""
    names = THREE if world in (2, 3) else THREE[:1]
    for number, case in enumerate(CASES):
        if case[0] in names and takes_long(case):
            expected = one_process(number)
            for error in distributed(compare_with_one_process, world, number, expected):
                assert error < case[-1], case
