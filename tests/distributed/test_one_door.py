"""The door of a micro-batch: contiguous slices in, the model's layout out, by two exchanges."""

from typing import Any, get_args

import pytest
import torch

from data_pipeline.batch import GeometricBatch, Sample
from data_pipeline.stream.order import DataSlot
from data_pipeline.tasks.registry import build_task
from scaling.engine.build import build_engine
from scaling.parallel import Mesh, SequenceShard
from scaling.parallel.shard import Layout
from scaling.parallel.telemetry import measuring
from scaling.train.evaluate import Evaluation
from scaling.train.objective import Objective
from scaling.train.settings import TrainSettings
from tests.small_models import PlainModel


class Still(PlainModel):
    """Moves points along the vectors; `layout` as asked."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, batch: GeometricBatch, shard: SequenceShard) -> GeometricBatch:
        assert shard.layout == self.layout
        vectors = batch.vectors * self.weight
        return batch.replace(points=batch.points + vectors[:, 0], vectors=vectors)


def sample_of(length: int, per_token: bool) -> Sample:
    """Every number names its place."""
    random = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=random, dtype=torch.float64)

    inputs = GeometricBatch(
        normal(3, length), normal(2, 3, length), normal(0, length),
        mask=normal(length) > -1, segment=torch.arange(2 * length).reshape(2, length),
        lengths=(length, length), bodies=((length,), (length - 1, 1)),
    )  # fmt: skip
    if per_token:
        return Sample(inputs, normal(3, length), normal(length).square())
    marked = normal(length) > 0
    return Sample(inputs, normal(3), torch.ones(2).double(), "vectors", marked)


def mesh_of(group: Any, rank: int, ranks: int) -> Mesh:
    """One sequence on all ranks of a group, which need not be the whole world."""
    mesh = Mesh.__new__(Mesh)
    mesh.sequence_group, mesh.slot = group, DataSlot(0, 1, rank, ranks)
    return mesh


def sliced(sample: Sample, shard: SequenceShard) -> Sample:
    tokens = {name: shard.scatter(x) for name, x in sample.token_tensors.items()}
    own = {"target": sample.target, "weight": sample.weight} | tokens
    return Sample(sample.inputs.map(shard.scatter), **own, answer=sample.answer)


def door(group: Any, rank: int, ranks: int) -> None:
    """What enters is the layout's share of everything; loss and gradient are one process's."""
    mesh = mesh_of(group, rank, ranks)
    for layout in get_args(Layout):
        for length in (1, 5, 8, 23):
            for per_token in (True, False):
                whole = sample_of(length, per_token)
                natural = SequenceShard(length, group, "contiguous")
                objective = Objective(Still(layout).double(), mesh)
                with measuring() as measured:
                    entered, shard = objective.enter(sliced(whole, natural))
                calls = {name: count.calls for name, count in measured.exchanges.items()}
                moves = layout == "cyclic" and ranks > 1
                assert calls == ({"redistribute": 2} if moves else {})
                expected = sliced(whole, SequenceShard(length, group, layout))
                assert (entered.inputs.lengths, entered.inputs.bodies, entered.answer) == (
                    expected.inputs.lengths, expected.inputs.bodies, expected.answer
                )  # fmt: skip
                for name, x in expected.inputs.tensors.items() | expected.token_tensors.items():
                    y = (entered.inputs.tensors | entered.token_tensors)[name]
                    assert x.dtype == y.dtype and torch.equal(x, y), name
                assert torch.equal(entered.target, expected.target)
                loss, errors, _ = objective(entered, shard)
                assert loss == errors.sum()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_two_exchanges_bring_everything_in(distributed, world):
    distributed(door_of_world, world, world)


def door_of_world(group: Any, ranks: int) -> None:
    door(group, torch.distributed.get_rank(group), ranks)


def loss_and_gradient(group: Any, ranks: int) -> list[tuple[float, float]]:
    """Of per-token targets, of marked tokens and of the mean of a row, summed over the ranks."""
    rank = 0 if group is None else torch.distributed.get_rank(group)
    mesh = mesh_of(group, rank, ranks)
    found = []
    for per_token, marks in ((True, False), (False, True), (False, False)):
        whole = sample_of(23, per_token)
        whole.marked = whole.marked if marks else None
        model = Still("cyclic").double()
        objective = Objective(model, mesh)
        natural = SequenceShard(23, group, "contiguous")
        loss, *_ = objective(*objective.enter(sliced(whole, natural)))
        (gradient,) = torch.autograd.grad(loss, model.weight)
        numbers = torch.stack([loss.detach(), gradient])
        if group is not None:
            torch.distributed.all_reduce(numbers, group=group)
        found.append(tuple(numbers.tolist()))
    return found


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_read_outs_do_not_show_the_ranks(distributed, world):
    (expected, *_) = distributed(loss_and_gradient, 1, 1)
    for found in distributed(loss_and_gradient, world, world):
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-12)


def exchanges_of_an_evaluation(group: Any, name: str) -> dict[str, int]:
    sizes = {"tokens": 40, "held_out_size": 6}
    task = build_task(name, **sizes, **({"pairs": 4} if name == "needles" else {}))
    objective = Objective(Still("cyclic"), Mesh(2, 4))
    engine = build_engine(
        "ddp", objective, lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        gradient_clipping=0.0, micro_batch_size=1, accumulation=1, environment={},
    )  # fmt: skip
    with measuring() as measured:
        row = Evaluation(engine, objective, task, TrainSettings(micro_batch_size=1)).row(1)
    assert row["tokens"] == 240
    return {key: count.calls for key, count in measured.exchanges.items()}


def test_an_evaluation_brings_each_micro_batch_in_once(distributed):
    """Six sequences on two data-parallel ranks: three micro-batches. The sums are read-outs: two
    for each, and two for the turned one that shows how equivariant the model is."""
    for calls in distributed(exchanges_of_an_evaluation, 8, "needles"):
        assert calls == {"redistribute": 6, "error_by_position": 3}
    for calls in distributed(exchanges_of_an_evaluation, 8, "recall"):
        assert calls == {"redistribute": 6, "sum": 8}
