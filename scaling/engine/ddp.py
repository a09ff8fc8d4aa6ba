"""PyTorch's own data parallelism behind the engine's interface."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaling.engine.base import (
    Engine,
    OptimizerState,
    clip,
    copy_parameters,
    load_plain_state,
    on_cpu,
    plain_state,
    set_learning_rate,
)
from scaling.parallel.collectives import Group


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
