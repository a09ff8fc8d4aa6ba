"""One small interface over plain DDP and DeepSpeed.

    for number, micro_batch in enumerate(window):
        with engine.accumulate(last=number == len(window) - 1):
            local_sum, *_ = engine(micro_batch)
            engine.backward(engine_loss(local_sum, global_weight, engine.world))
    gradient_norm = engine.step(learning_rate)

Every engine averages gradients over all its ranks, sequence ranks included, and divides by nothing
else: see loss.py for the loss that makes this the gradient of the objective. A parameter that a
step leaves unused has a zero gradient, with every engine. DeepSpeed is told nothing of sequence
parallelism. `state` gives what a rank owns in shards by parameter name, so that any engine on any
number of ranks reads what any other wrote.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling.engine.shards import PARAMETER, SavedState, Shards, shard_of
from scaling.parallel.collectives import Group, group_rank, group_size


class Engine(ABC):
    """Trains one module over all ranks of a group; parameters and optimiser are whole on each,
    where a subclass says nothing else."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, clipping: float, group: Group = None
    ) -> None:
        self.module = module
        self.optimizer = optimizer
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
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch's forward and backward; gradients travel in the last one."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the average over ranks of `loss`."""

    @abstractmethod
    def step(self, learning_rate: float, move: bool = True) -> float:
        """Clips, moves the parameters, forgets the gradients. Returns the global gradient norm
        before clipping; if that is not finite, or not `move`, nothing has moved."""

    def state(self) -> Shards:
        """Copies of this rank's shards of parameters and optimiser state, on the CPU: an equal part
        of every tensor, where all ranks have it whole."""
        rank = group_rank(self.group)
        return {
            name: {
                kind: shard_of(value, rank, self.world)
                for kind, value in {PARAMETER: p, **self.optimizer.state.get(p, {})}.items()
            }
            for name, p in self.parameters.items()
        }

    def load_state(self, saved: SavedState) -> None:
        """Takes over what all ranks of a run gave by `state`. Collective."""
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(saved.read(name, PARAMETER).view(self.shapes[name]))
            if kinds := saved.kinds(name):
                self.optimizer.state[parameter] = {
                    kind: self._like(parameter, saved.read(name, kind)) for kind in kinds
                }

    @staticmethod
    def _like(parameter: Tensor, values: Tensor) -> Tensor:
        """A copy where the optimiser wants it: Adam keeps its step, without axes, on the CPU."""
        if not values.ndim:
            return values.clone()
        return values.view(parameter.shape).to(parameter.device, copy=True)

    def _clip_gradients(self, clipping: float) -> Tensor:
        """Scales gradients to a global norm of at most `clipping` (0: leaves them); the norm
        before."""
        trained = [p for p in self.parameters.values() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return nn.utils.clip_grad_norm_(trained, clipping or float("inf"))

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


class DistributedDataParallelEngine(Engine):
    """PyTorch's own data parallelism; the bare module in one process."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, clipping: float, group: Group = None
    ) -> None:
        super().__init__(module, optimizer, clipping, group)
        self._ddp = None
        if self.world > 1:
            self._ddp = nn.parallel.DistributedDataParallel(
                module, process_group=group, gradient_as_bucket_view=True
            )

    def __call__(self, *arguments: Any) -> Any:
        trained = self._ddp if torch.is_grad_enabled() else None
        return (trained or self.module)(*arguments)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if self._ddp is None or last else self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        # DDP waits for all parameters: one that a step leaves unused would make it wait forever.
        _Touch.apply(loss, *self.parameters.values()).backward()

    def step(self, learning_rate: float, move: bool = True) -> float:
        norm = self._clip_gradients(self.clipping)
        if move and norm.isfinite():
            self._set_learning_rate(learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()


class _Touch(torch.autograd.Function):
    """The same number, on which every parameter hangs with a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *(None for _ in range(ctx.count))
