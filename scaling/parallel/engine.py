"""One small interface over plain DDP and DeepSpeed.

    for number, micro_batch in enumerate(window):
        with engine.accumulate(last=number == len(window) - 1):
            local_sum, *_ = engine(micro_batch)
            engine.backward(engine_loss(local_sum, global_weight, engine.world))
    gradient_norm = engine.step(learning_rate)

Every engine averages gradients over all its ranks, sequence ranks included, and divides by nothing
else: see loss.py for the loss that makes this the gradient of the objective. A parameter that a
step leaves unused has a zero gradient, with every engine. DeepSpeed is told nothing of sequence
parallelism. `state` and `load_state` speak of whole tensors by parameter name, so that any engine
reads what any other wrote.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data_pipeline.errors import ConfigError
from scaling.parallel.collectives import Group, group_rank, group_size
from scaling.parallel.deepspeed_config import check_launcher, deepspeed_config

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> state name -> whole tensor (scalars, as Adam's step, have no axes)."""


class Engine(ABC):
    """Trains one module over all ranks of a group."""

    def __init__(self, module: nn.Module, clipping: float, group: Group) -> None:
        self.module = module
        self.clipping = clipping
        self.group = group
        self.world = group_size(group)
        self.parameters = dict(module.named_parameters())
        # Before an engine cuts them in pieces.
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}

    @abstractmethod
    def __call__(self, *arguments: Any) -> Any:
        """The module's outputs; every parameter is there while it runs."""

    @abstractmethod
    def accumulate(self, last: bool) -> Any:
        """Context of one micro-batch's forward and backward; gradients travel in the last one."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the average over ranks of `loss`."""

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clips, moves the parameters, forgets the gradients. Returns the global gradient norm
        before clipping; if that is not finite, nothing has moved."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], OptimizerState]:
        """Parameters and optimiser state, whole, on the CPU; meaningful on the group's first rank.
        Collective."""

    @abstractmethod
    def load_state(self, parameters: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        """Takes over what `state` gave, on every rank. Collective."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, evaluation mode."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    @property
    def _first(self) -> bool:
        return group_rank(self.group) == 0


class DistributedDataParallelEngine(Engine):
    """PyTorch's own data parallelism; the bare module in one process."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, clipping: float, group: Group = None
    ) -> None:
        super().__init__(module, clipping, group)
        self.optimizer = optimizer
        self._ddp = None
        if self.world > 1:
            self._ddp = nn.parallel.DistributedDataParallel(
                _TouchesAllParameters(module),
                process_group=group,
                gradient_as_bucket_view=True,
            )

    def __call__(self, *arguments: Any) -> Any:
        if self._ddp is None or not torch.is_grad_enabled():
            return self.module(*arguments)
        return self._ddp(*arguments)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        if self._ddp is None or last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        norm = clip(self.parameters.values(), self.clipping)
        if norm.isfinite():
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def state(self) -> tuple[dict[str, Tensor], OptimizerState]:
        parameters = {name: on_cpu(p) for name, p in self.parameters.items()}
        return parameters, plain_state(self.parameters, self.optimizer)

    def load_state(self, parameters: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        copy_parameters(self.parameters, parameters)
        load_plain_state(self.parameters, self.optimizer, optimizer)


def build_engine(
    name: str,
    module: nn.Module,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    gradient_clipping: float,
    micro_batch_size: int,
    accumulation: int,
    precision: str = "float32",
    zero_stage: int = 1,
    deepspeed: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
    group: Group = None,
) -> Engine:
    """The engine of that name around a module whose parameters are the same on every rank.

    Args:
        gradient_clipping: largest global gradient norm; 0 does not clip.
        micro_batch_size, accumulation: rows a rank holds at once, and how often it does before a
            step; DeepSpeed wants to know.
        precision: float64 works with ddp alone.
        deepspeed: further DeepSpeed keys.
        environment: where `accelerate launch` leaves its choices.
        group: the ranks that train together; None is the world.

    Raises:
        ConfigError: a combination that cannot work, or a launcher that was told otherwise.
    """
    check_launcher(name, precision, environment)
    optimizer = make_optimizer(module.parameters())
    if name == "ddp":
        return DistributedDataParallelEngine(module, optimizer, gradient_clipping, group)
    if name != "deepspeed":
        raise ConfigError(f"unknown engine {name!r}; use 'ddp' or 'deepspeed'")
    if precision == "float64":
        raise ConfigError(
            "engine.name = 'deepspeed' keeps float32 master weights, so train.precision = "
            "'float64' would be a lie; say engine=ddp"
        )
    if zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"engine.zero_stage = {zero_stage}; ZeRO has the stages 0, 1, 2, 3")
    from scaling.parallel.deepspeed_engine import DeepSpeedEngine

    config = deepspeed_config(
        deepspeed or {},
        zero_stage=zero_stage,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        gradient_clipping=gradient_clipping,
        world=group_size(group),
        bucket_size=min(2 * sum(p.numel() for p in module.parameters()), 50_000_000),  # even
        environment=environment,
    )
    return DeepSpeedEngine(module, optimizer, config, group)


class _TouchesAllParameters(nn.Module):
    """Hangs every parameter on the outputs with a zero gradient: DDP waits for all of them, and a
    parameter that one step leaves unused would make it wait forever."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        first, *others = (
            outputs if isinstance(outputs := self.module(*arguments), tuple) else (outputs,)
        )
        first = _Touch.apply(first, *self.module.parameters())
        return (first, *others) if isinstance(outputs, tuple) else first


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *(None for _ in range(ctx.count))


def clip(parameters: Iterable[nn.Parameter], clipping: float) -> Tensor:
    """Scales gradients to a global norm of at most `clipping` (0: leaves them); the norm before."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return nn.utils.clip_grad_norm_(trained, clipping or float("inf"))


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def on_cpu(x: Tensor) -> Tensor:
    """A copy that later steps do not change."""
    return x.detach().to("cpu", copy=True)


@torch.no_grad()
def copy_parameters(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def plain_state(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> OptimizerState:
    return {
        name: {key: on_cpu(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
        if optimizer.state.get(parameter)
    }


def load_plain_state(
    parameters: Mapping[str, Tensor], optimizer: Optimizer, state: OptimizerState
) -> None:
    for name, entries in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            # Adam keeps its step on the CPU.
            key: value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
            for key, value in entries.items()
        }
