"""DeepSpeed behind the engine's interface."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from data_pipeline.errors import ConfigError
from scaling.engine.base import Engine, OptimizerState, on_cpu
from scaling.parallel.collectives import Group, group_rank


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO stage 0 to 3, float32 parameters."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, config: dict[str, Any], group: Group = None
    ) -> None:
        super().__init__(module, optimizer, config["gradient_clipping"], group)
        if not dist.is_initialized() or self.world != dist.get_world_size():
            raise ConfigError(
                "DeepSpeed needs torch.distributed and all of its ranks; start by torchrun, "
                "accelerate launch, deepspeed or srun, or say engine=ddp"
            )
        _quieten_deepspeed()
        import deepspeed  # slow: only who chooses it pays

        # Its all-reduce in shared memory serves inference alone, and would first be compiled.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        self.stage: int = config["zero_optimization"]["stage"]
        for part in module.modules() if self.stage == 3 else ():
            if getattr(part, "gathers_whole", False):
                deepspeed.utils.set_z3_leaf_module(part, True)
                part.register_forward_pre_hook(_ask_for_a_gradient)
            elif hasattr(part, "gathers_whole"):
                vars(part)["runs_whole"] = True
        self._deepspeed: Any = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
        self._wrapped = self._deepspeed.optimizer
        # Under ZeRO the client optimizer lives on inside, over this rank's flat partitions.
        self.optimizer = self._wrapped.optimizer if self.stage else self._wrapped

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
        self._set_learning_rate(learning_rate)
        if self.stage > 0:
            self._deepspeed.step()  # ZeRO skips the step by itself if the norm is not finite
            return float(self._deepspeed.get_global_grad_norm())
        norm = self._clip_gradients(0.0)  # DeepSpeed will
        if norm.isfinite():
            self._deepspeed.step()
        return norm.item()

    def state(self) -> tuple[dict[str, Tensor], OptimizerState]:
        if self.stage == 0:
            return super().state()
        from deepspeed.utils import safe_get_full_optimizer_state

        # Without any: no step yet, or an optimiser without memory.
        kinds = next((state for state in self.optimizer.state.values() if state), {})
        scalars = {key: on_cpu(value) for key, value in kinds.items() if value.ndim == 0}
        parameters, optimizer = {}, {}
        for name, parameter in self.parameters.items():
            # Gathering is collective; only the first rank keeps what it gathered.
            with self._gathered(parameter):
                value = on_cpu(parameter)
            state = {}
            for key in sorted(kinds.keys() - scalars.keys()) if parameter.requires_grad else ():
                state[key] = safe_get_full_optimizer_state(parameter, key)
            if group_rank(self.group) == 0:
                parameters[name] = value
                optimizer[name] = {key: on_cpu(x) for key, x in state.items()} | scalars
        return parameters, optimizer if kinds else {}

    def load_state(self, parameters: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        if self.stage == 0:
            super().load_state(parameters, optimizer)
            return
        kinds = next(iter(optimizer.values()), {})
        flats = (
            self._wrapped.fp32_partitioned_groups_flat
            if self.stage == 3
            else self._wrapped.single_partition_of_fp32_groups
        )
        for flat in flats:
            self.optimizer.state[flat] = {k: x.clone() for k, x in kinds.items() if x.ndim == 0}
        for key in (key for key, value in kinds.items() if value.ndim):
            # By way of the parameters: DeepSpeed cuts these, whatever their size.
            self._set_parameters({name: state[key] for name, state in optimizer.items()})
            for flat in flats:
                self.optimizer.state[flat][key] = flat.detach().clone()
        self._set_parameters(parameters)
        if optimizer and self.stage < 3:
            self._wrapped._lazy_init_hp_params_optimizer_state()  # names the parts of the flats

    def _set_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            with self._gathered(self.parameters[name], modifier_rank=0), torch.no_grad():
                self.parameters[name].copy_(value)
        self._wrapped.refresh_fp32_params()  # the optimiser's flat copy follows the parameters

    def _gathered(
        self, parameter: nn.Parameter, modifier_rank: int | None = None
    ) -> AbstractContextManager[Any]:
        """Inside, the parameter is whole; what that rank writes into it stays. Collective."""
        if self.stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter], modifier_rank=modifier_rank)


def _ask_for_a_gradient(_part: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """ZeRO-3 takes the gradients of what it gathered when it sees that of an input: the first has
    one, even if it is data."""
    first, *others = given
    return (first if first.requires_grad else first.detach().requires_grad_(), *others)


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
