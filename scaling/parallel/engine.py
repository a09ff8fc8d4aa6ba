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

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
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
        norm = _clip(self.parameters.values(), self.clipping)
        if norm.isfinite():
            _set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def state(self) -> tuple[dict[str, Tensor], OptimizerState]:
        parameters = {name: _on_cpu(p) for name, p in self.parameters.items()}
        return parameters, _plain_state(self.parameters, self.optimizer)

    def load_state(self, parameters: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        _copy_parameters(self.parameters, parameters)
        _load_plain_state(self.parameters, self.optimizer, optimizer)


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO stage 0 to 3, float32 parameters."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, config: dict[str, Any], group: Group = None
    ) -> None:
        super().__init__(module, config["gradient_clipping"], group)
        if not dist.is_initialized() or self.world != dist.get_world_size():
            raise ConfigError(
                "DeepSpeed needs torch.distributed and all of its ranks; start by torchrun, "
                "accelerate launch, deepspeed or srun, or say engine=ddp"
            )
        scalars = [name for name, p in self.parameters.items() if p.ndim == 0]
        if scalars:
            raise ConfigError(
                f"DeepSpeed cannot partition the parameter {scalars[0]}, which has no axis; "
                "give it the shape (1,), or say engine=ddp"
            )
        _quieten_deepspeed()
        import deepspeed  # slow, and needs a compiler at first use: only who chooses it pays

        with redirect_stdout(StringIO()):  # every rank would print that its extension is built
            self._deepspeed: Any = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
        self.stage: int = config["zero_optimization"]["stage"]
        self._wrapped = self._deepspeed.optimizer
        # Under ZeRO the client optimizer lives on inside, over this rank's flat partitions.
        self._inner: Optimizer = self._wrapped.optimizer if self.stage else self._wrapped

    def __call__(self, *arguments: Any) -> Any:
        return self._deepspeed(*arguments)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        yield
        if not last:
            self._deepspeed.step()  # counts the micro-batch, moves nothing

    def backward(self, loss: Tensor) -> None:
        # Our loss is over the whole window already; by default it would be divided again.
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        _set_learning_rate(self._inner, learning_rate)
        if self.stage > 0:
            self._deepspeed.step()  # ZeRO skips the step by itself if the norm is not finite
            return float(self._deepspeed.get_global_grad_norm())
        norm = _clip(self.parameters.values(), 0.0)
        if norm.isfinite():
            self._deepspeed.step()
        return norm.item()

    def state(self) -> tuple[dict[str, Tensor], OptimizerState]:
        if self.stage == 0:
            parameters = {name: _on_cpu(p) for name, p in self.parameters.items()}
            return parameters, _plain_state(self.parameters, self._inner)
        from deepspeed.utils import safe_get_full_optimizer_state

        kinds = next((state for state in self._inner.state.values() if state), {})
        if not kinds:  # no step yet, or an optimiser without memory
            return {name: self._whole(p) for name, p in self.parameters.items()}, {}
        scalars = {key: _on_cpu(value) for key, value in kinds.items() if value.ndim == 0}
        parameters, optimizer = {}, {}
        for name, parameter in self.parameters.items():
            # Gathering is collective; only the first rank keeps what it gathered.
            value, state = self._whole(parameter), {}
            for key in sorted(kinds.keys() - scalars.keys()) if parameter.requires_grad else ():
                state[key] = safe_get_full_optimizer_state(parameter, key)
            if self._first:
                parameters[name] = value
                optimizer[name] = {key: _on_cpu(x) for key, x in state.items()} | scalars
        return parameters, optimizer

    def load_state(self, parameters: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        if self.stage < 3:
            _copy_parameters(self.parameters, parameters)
        else:
            self._scatter_parameters(parameters)
        if self.stage == 0:
            _load_plain_state(self.parameters, self._inner, optimizer)
            return
        self._wrapped.refresh_fp32_params()  # the optimiser's flat copy follows the parameters
        if optimizer:
            self._load_partitioned_state(optimizer)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return _on_cpu(parameter)
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return _on_cpu(parameter)

    def _scatter_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.parameters.items():
            with GatheredParameters([parameter], modifier_rank=0):
                _copy_parameters({name: parameter}, parameters)

    def _load_partitioned_state(self, optimizer: OptimizerState) -> None:
        """Builds the state that the first step would build, then fills it by parameter."""
        sample = next(iter(optimizer.values()))
        per_element = [key for key, value in sample.items() if value.ndim > 0]
        flats = (
            self._wrapped.fp32_partitioned_groups_flat
            if self.stage == 3
            else self._wrapped.single_partition_of_fp32_groups
        )
        for flat in flats:
            self._inner.state[flat] = {
                key: torch.zeros_like(flat) if key in per_element else value.clone()
                for key, value in sample.items()
            }
        if self.stage < 3:
            self._wrapped._lazy_init_hp_params_optimizer_state()  # names the parts of the flats
        for name, state in optimizer.items():
            parameter = self.parameters[name]
            for key in per_element:
                self._set_optimizer_state(parameter, state[key].to(parameter.device), key)

    def _set_optimizer_state(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Its whole-tensor setter fails on a size that the ranks do not divide: cut it ourselves.
        share = -(-value.numel() // self.world)
        padded = nn.functional.pad(value.flatten(), (0, share * self.world - value.numel()))
        mine = padded[share * group_rank(self.group) :][:share]
        safe_set_local_optimizer_state(parameter, mine, key)


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


def _quieten_deepspeed() -> None:
    """Silences what DeepSpeed says in any case: that it does not know torch's SGD (our tests do),
    that stage 3 does not look into a GeometricBatch (modules that own parameters pass tensors),
    and that it calls collectives by names which PyTorch has replaced."""
    known = ("untested optimizer", "unknown inputs or outputs type")
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: not any(text in record.getMessage() for text in known)
    )
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning
    )


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


def _clip(parameters: Iterable[nn.Parameter], clipping: float) -> Tensor:
    """Scales gradients to a global norm of at most `clipping` (0: leaves them); the norm before."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return nn.utils.clip_grad_norm_(trained, clipping or float("inf"))


def _set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _on_cpu(x: Tensor) -> Tensor:
    """A copy that later steps do not change."""
    return x.detach().to("cpu", copy=True)


@torch.no_grad()
def _copy_parameters(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _plain_state(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> OptimizerState:
    return {
        name: {key: _on_cpu(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
        if optimizer.state.get(parameter)
    }


def _load_plain_state(
    parameters: Mapping[str, Tensor], optimizer: Optimizer, state: OptimizerState
) -> None:
    for name, entries in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            # Adam keeps its step on the CPU.
            key: value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
            for key, value in entries.items()
        }
