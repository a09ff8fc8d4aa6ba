"""PyTorch's own data parallelism behind the engine's interface."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling.engine.base import Engine
from scaling.parallel.collectives import Group


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

    def step(self, learning_rate: float) -> float:
        norm = self._clip_gradients(self.clipping)
        if norm.isfinite():
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
