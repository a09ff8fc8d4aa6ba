"""DeepSpeed behind the engine's interface."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from data_pipeline.errors import ConfigError
from scaling.engine.base import Engine
from scaling.engine.shards import PARAMETER, SavedState, Shard, Shards, on_cpu, shard_of
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
        deepspeed = _import_deepspeed()
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
        if getattr(self._wrapped, "swap_optimizer", False):
            raise ConfigError(
                "zero_optimization.offload_optimizer.device = 'nvme': checkpoints cannot be made "
                "of what lies there; say 'cpu'"
            )
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

    def state(self) -> Shards:
        if self.stage == 0:
            return super().state()
        shards: Shards = {}
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                with self._gathered(parameter):
                    own = shard_of(parameter, group_rank(self.group), self.world)
                shards[name] = {PARAMETER: own}
            elif place := self._place(parameter):
                start, flat, part = place
                kinds = {PARAMETER: flat, **self.optimizer.state.get(flat, {})}
                shards[name] = {
                    kind: Shard(start, on_cpu(x[part] if x.ndim else x))
                    for kind, x in kinds.items()
                    if x.ndim or start == 0  # else another rank gives it
                }
        return shards

    def load_state(self, saved: SavedState) -> None:
        if self.stage == 0:
            super().load_state(saved)
            return
        for name, parameter in self.parameters.items():
            with self._gathered(parameter, modifier_rank=0), torch.no_grad():
                if self.stage < 3 or group_rank(self.group) == 0:
                    parameter.copy_(saved.read(name, PARAMETER).view(self.shapes[name]))
        self._wrapped.refresh_fp32_params()  # the optimiser's flat copy follows the parameters
        for name, parameter in self.parameters.items():
            kinds = saved.kinds(name)
            if kinds and (place := self._place(parameter)):
                start, flat, part = place
                state = self.optimizer.state[flat]
                for kind in kinds:
                    values = saved.read(name, kind, start, start + part.stop - part.start)
                    if values.ndim:
                        state.setdefault(kind, torch.zeros_like(flat))[part] = values
                    else:
                        state[kind] = values.clone()

    def _place(self, parameter: Any) -> tuple[int, Tensor, slice] | None:
        """Where in a trained parameter the elements begin that this rank owns; the flat tensor that
        ZeRO keeps them in, in float32, and their place there. None if it owns none."""
        if self.stage == 3:
            group, offset, size = self._wrapped.grad_position[parameter.ds_id]
            start = size * group_rank(self.group)
            length = min(size, parameter.ds_numel - start)  # the last part is padded
            flat = self._wrapped.fp32_partitioned_groups_flat[group]
            return (start, flat, slice(offset, offset + length)) if length > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._wrapped.single_partition_of_fp32_groups[mapping.param_group_index]
        offset, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        return mapping.lp_fragment_address.start, flat, slice(offset, offset + length)

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


def _import_deepspeed() -> Any:
    """Only who chooses it pays, and compiles nothing: operators of its own serve inference or are
    optimisers (which of them could be built here it would ask a compiler, on every rank), and of
    its optimiser Muon, which is not used, it compiles the functions while it imports them."""
    import deepspeed
    from deepspeed.runtime import compiler

    operators: Any = deepspeed.ops
    operators.__compatible_ops__ = {}
    with patch.object(compiler, "compile", lambda: compiler.dummy_decorator):
        import deepspeed.runtime.zero.muon.original_muon
    _quieten(logging.getLogger("DeepSpeed"))
    return deepspeed


def _quieten(logger: logging.Logger) -> None:
    """DeepSpeed speaks through the program's log, and does not say what it says in any case: that
    it does not know torch's SGD (our tests do), that stage 3 does not look into a GeometricBatch
    (modules that own parameters pass tensors), and that it calls collectives by names which PyTorch
    has replaced."""
    known = ("untested optimizer", "unknown inputs or outputs type")
    logger.addFilter(lambda record: not any(text in record.getMessage() for text in known))
    logger.handlers.clear()
    logger.propagate = True
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning
    )
