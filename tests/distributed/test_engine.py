"""Whatever averages the gradients, the parameters move as one process would move them.

The model is small, but has all that can go wrong: a sum over the sequence inside, weights that
differ by rank, a row without weight, a parameter that is never used.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.errors import RunError
from scaling.engine.base import Engine
from scaling.engine.build import build_engine
from scaling.engine.loss import engine_loss
from scaling.engine.shards import PARAMETER, SavedState, Shards
from scaling.parallel.collectives import all_reduce_sum, global_sums
from tests.states import whole_parameters, whole_state

ROWS, FEATURES, TOKENS = 8, 5, 13
RATE = 0.2


class Toy(nn.Module):
    """(b, f, n) -> local weighted sum of squares, and the outputs."""

    def __init__(self, group=None) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 7)
        self.second = nn.Linear(7, FEATURES)
        self.gain = nn.Parameter(torch.tensor([0.7]))
        self.spare = nn.Parameter(torch.ones(3))
        self.group = group

    def forward(self, x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x.mT))
        total = hidden.sum(1, keepdim=True)
        if self.group is not None:
            total = all_reduce_sum(total, self.group, "test")
        out = self.second(hidden + self.gain * total / TOKENS).mT
        return (weight * (out - target).square().sum(1)).sum(), out


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    x, target = torch.randn(2, ROWS, FEATURES, TOKENS, generator=random, dtype=torch.float64)
    weight = torch.rand(ROWS, TOKENS, generator=random, dtype=torch.float64)
    weight[step % ROWS] = 0
    weight[:, 9:] *= 0.1
    return x.to(dtype), target.to(dtype), weight.to(dtype)


def make_optimizer(name: str):
    if name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=RATE)
    return lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)


def toy(dtype: torch.dtype, group=None) -> Toy:
    torch.manual_seed(3)
    return Toy(group).to(dtype)


def one_process(steps: range, dtype: torch.dtype, optimizer: str, clipping: float):
    """The plain loop that everybody knows. Returns the parameters and the gradient norms."""
    model, norms = toy(dtype), []
    torch_optimizer = make_optimizer(optimizer)(model.parameters())
    for step in steps:
        x, target, weight = batch(step, dtype)
        model.spare.grad = torch.zeros_like(model.spare)
        (model(x, target, weight)[0] / weight.sum()).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clipping or 1e9).item())
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, norms


class Share:
    """A rank's rows and tokens. The last dp · sp ranks of the world train, the others look on;
    sequence ranks are neighbours. Collective over the world."""

    def __init__(self, dp: int, sp: int) -> None:
        self.dp, self.sp = dp, sp
        first = dist.get_world_size() - dp * sp
        rows = [list(range(first + d * sp, first + (d + 1) * sp)) for d in range(dp)]
        self.group = dist.new_group([rank for row in rows for rank in row])
        sequence_groups = [dist.new_group(row) for row in rows]
        self.dp_rank, self.sp_rank = divmod(dist.get_rank() - first, sp)
        self.trains = self.dp_rank >= 0
        self.sequence_group = sequence_groups[max(self.dp_rank, 0)]

    def micro_batches(self, tensors: tuple[Tensor, ...], accumulation: int):
        size = ROWS // (self.dp * accumulation)
        tokens = slice(TOKENS * self.sp_rank // self.sp, TOKENS * (self.sp_rank + 1) // self.sp)
        for number in range(accumulation):
            start = (number * self.dp + self.dp_rank) * size
            yield [x[start : start + size][..., tokens] for x in tensors]


def train(
    engine: Engine,
    share: Share,
    steps: range,
    dtype: torch.dtype,
    accumulation: int,
    factor=1.0,
    move=True,
):
    """Gradient norms. The last rank's loss has that factor."""
    factor = factor if share.sp_rank == share.sp - 1 else 1.0
    norms = []
    for step in steps:
        window = list(share.micro_batches(batch(step, dtype), accumulation))
        (weight,) = global_sums(sum(w.sum() for *_, w in window), group=engine.group)
        for number, micro_batch in enumerate(window):
            with engine.accumulate(last=number == accumulation - 1):
                local_sum, _ = engine(*micro_batch)
                engine.backward(engine_loss(local_sum, weight, engine.world) * factor)
        norms.append(engine.step(RATE, move))
    return norms


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative difference of a tensor, with a floor of 1e-3 of the whole state's norm."""
    floor = 1e-3 * torch.cat([x.flatten() for x in b.values()]).norm()
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=floor)) for k in b)


def compare_trajectories(
    share: Share,
    dtype: torch.dtype,
    tolerance: float,
    cases: list[tuple[int, float]],
    name: Any = "ddp",
    zero_stage=0,
    group=None,
) -> None:
    """20 steps equal the plain loop, and so does every gradient norm. Clipping hides a wrong scale
    from the parameters, so a case is how often to accumulate and the largest norm (0: any)."""
    for accumulation, clipping in cases:
        engine = build_engine(
            name,
            toy(dtype, share.sequence_group),
            make_optimizer("sgd"),
            zero_stage=zero_stage,
            gradient_clipping=clipping,
            micro_batch_size=ROWS // (share.dp * accumulation),
            accumulation=accumulation,
            environment={},
            group=group,
        )
        norms = train(engine, share, range(20), dtype, accumulation)
        expected, expected_norms = one_process(range(20), dtype, "sgd", clipping)
        values = whole_parameters(engine)
        assert relative(values, expected) <= tolerance, (name, zero_stage, accumulation)
        assert torch.allclose(torch.tensor(norms), torch.tensor(expected_norms), rtol=1e-5)


@pytest.mark.parametrize("dp, sp", [(1, 1), (1, 3), (2, 2)])
def test_ddp_moves_parameters_as_one_process_does(distributed, dp, sp):
    distributed(compare_ddp, 8, dp, sp)


def compare_ddp(world, dp: int, sp: int) -> None:
    share = Share(dp, sp)
    if share.trains:
        cases = [(1, 0.0), (2, 0.05)]
        compare_trajectories(share, torch.float64, 1e-10, cases, group=share.group)
        compare_trajectories(share, torch.float32, 1e-5, cases[1:], group=share.group)


@pytest.mark.parametrize("world", [2, 4])
def test_deepspeed_moves_parameters_as_one_process_does(deepspeed_worlds, world):
    """ZeRO 0 to 3 on sp 2, 0 and 1 on dp 2 x sp 2."""
    for stage in STAGES[world]:
        deepspeed_worlds[world](compare_deepspeed, world, stage)


STAGES = {2: (0, 1, 2, 3), 4: (0, 1)}


def compare_deepspeed(_group, stage: int) -> None:
    with silent():
        share = Share(dist.get_world_size() // 2, 2)
        cases = [(2, 0.05)] if share.dp == 1 else [(1, 0.0)]
        compare_trajectories(share, torch.float32, 1e-5, cases, "deepspeed", stage)


@pytest.mark.parametrize("world", [2, 4])
def test_deepspeed_hands_its_state_over(deepspeed_worlds, world):
    """Every state goes on in one DDP process, one process's state goes on in every stage."""
    expected, _ = one_process(range(6), torch.float32, "adamw", 0.0)
    given = state_of_one_process(range(3))
    for stage in STAGES[world]:
        shards = deepspeed_worlds[world](hand_state_over, world, stage, given)
        state = SavedState(shards)
        check_shards(shards, state, given)
        engine = one_process_engine()
        engine.load_state(state)
        again = whole_state(engine)
        for name in state.names():
            for kind in [PARAMETER, *state.kinds(name)]:
                assert torch.equal(again.read(name, kind), state.read(name, kind)), (name, kind)
        train_alone(engine, range(3, 6))
        assert relative(whole_parameters(engine), expected) <= 1e-5, stage


def check_shards(shards: list[Shards], state: SavedState, one_process: SavedState) -> None:
    """Every element of one process's state is there once, and no rank has more than its part of
    the elements, one tensor's worth aside."""
    assert set(state.names()) == set(one_process.names())
    total, largest = 0, 0
    for name in state.names():
        assert set(state.kinds(name)) == set(one_process.kinds(name))
        for kind in [PARAMETER, *state.kinds(name)]:
            assert state.numel(name, kind) == one_process.numel(name, kind), (name, kind)
            total += state.numel(name, kind)
            largest = max(largest, state.numel(name, kind))
    for each in shards:
        own = sum(x.values.numel() for kinds in each.values() for x in kinds.values())
        assert own <= total / len(shards) + largest


@contextmanager
def silent() -> Iterator[None]:
    """DeepSpeed announces itself on no rank: it neither prints, nor logs, nor warns."""
    said: SimpleQueue[logging.LogRecord] = SimpleQueue()
    logger, handler = logging.getLogger("DeepSpeed"), QueueHandler(said)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned, redirect_stdout(StringIO()) as out:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # as Python itself does
            yield
    finally:
        logger.removeHandler(handler)
    assert ([str(each) for each in warned], out.getvalue()) == ([], "")
    assert said.empty(), said.get().getMessage()


def one_process_engine() -> Engine:
    return build_engine(
        "ddp",
        toy(torch.float32),
        make_optimizer("adamw"),
        gradient_clipping=0.0,
        micro_batch_size=ROWS,
        accumulation=1,
        environment={},
    )


def train_alone(engine: Engine, steps: range) -> None:
    for step in steps:
        x, target, weight = batch(step, torch.float32)
        with engine.accumulate(last=True):
            engine.backward(engine_loss(engine(x, target, weight)[0], weight.sum().item(), 1))
        engine.step(RATE)


def state_of_one_process(steps: range) -> SavedState:
    engine = one_process_engine()
    train_alone(engine, steps)
    return whole_state(engine)


def test_a_rank_without_weight_keeps_the_graph_and_no_weight_at_all_is_an_error():
    local_sum = torch.ones(3, requires_grad=True)
    engine_loss((local_sum * torch.zeros(3)).sum(), 2.0, 4).backward()
    assert local_sum.grad is not None and local_sum.grad.tolist() == [0.0] * 3
    assert engine_loss(torch.tensor(3.0), 2.0, 4).item() == 6.0
    with pytest.raises(RunError, match="loss weights sum to 0"):
        engine_loss(local_sum.sum(), 0.0, 4)


def test_a_gradient_that_is_not_finite_moves_nothing():
    engine = one_process_engine()
    before = whole_parameters(engine)
    engine.backward(engine.parameters["gain"].sum() * float("inf"))
    assert engine.step(RATE) == float("inf")
    engine.backward(engine.parameters["gain"].sum())
    assert engine.step(RATE, move=False) == 1
    assert relative(whole_parameters(engine), before) == 0 and not engine.optimizer.state


def test_deepspeed_forgets_a_step_that_may_not_move(deepspeed_worlds):
    """Not finite on one rank, or only its loss was: the state is bitwise that of before, and the
    steps that follow are as if it had not been. It may be the first of all, too."""
    for stage in STAGES[2]:
        deepspeed_worlds[2](leave_steps_out, 2, stage)


def leave_steps_out(_group, stage: int) -> None:
    share, float32 = Share(1, 2), torch.float32
    with silent():
        engine = build_engine(
            "deepspeed",
            toy(float32, share.sequence_group),
            make_optimizer("adamw"),
            gradient_clipping=0.5,
            micro_batch_size=ROWS // 2,
            accumulation=2,
            zero_stage=stage,
            environment={},
        )
        for step in range(3):
            before = engine.state()
            (norm,) = train(engine, share, range(9, 10), float32, 2, factor=float("nan"))
            assert not math.isfinite(norm)
            assert 0 < train(engine, share, range(9, 10), float32, 2, move=False)[0] < 100
            for name, kinds in engine.state().items():
                assert kinds.keys() == before[name].keys()
                for kind, shard in kinds.items():
                    assert torch.equal(shard.values, before[name][kind].values), (stage, name, kind)
            train(engine, share, range(step, step + 1), float32, 2)
        values = whole_parameters(engine)
    expected, _ = one_process(range(3), float32, "adamw", 0.5)
    assert relative(values, expected) <= 1e-5, stage


def hand_state_over(_group, stage: int, given: SavedState) -> Shards:
    """This rank's shards after three steps; and three steps more from one process's state."""
    share = Share(dist.get_world_size() // 2, 2)

    def fresh() -> Engine:
        return build_engine(
            "deepspeed",
            toy(torch.float32, share.sequence_group),
            make_optimizer("adamw"),
            gradient_clipping=0.0,
            micro_batch_size=ROWS // share.dp,
            accumulation=1,
            zero_stage=stage,
            # Stage 3 would keep parameters this small whole on every rank.
            deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
            environment={},
        )

    with silent():
        engine = fresh()
        before = engine.state()  # before the first step there is nothing to remember
        assert {kind for own in before.values() for kind in own} <= {PARAMETER}
        train(engine, share, range(3), torch.float32, 1)
        state = engine.state()
        engine = fresh()
        engine.load_state(given)
        train(engine, share, range(3, 6), torch.float32, 1)
        values = whole_parameters(engine)
    expected, _ = one_process(range(6), torch.float32, "adamw", 0.0)
    assert relative(values, expected) <= 1e-5, stage
    return state
