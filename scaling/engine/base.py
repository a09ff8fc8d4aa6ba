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

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling.parallel.collectives import Group, group_rank, group_size

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
