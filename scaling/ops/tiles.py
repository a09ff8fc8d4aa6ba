"""Parts of a model that act on each token alone: in tiles, and once more in the backward pass.

Inside a Clifford MLP a token takes a hundred times the memory that it takes between operators.
Run tile by tile it does so for one tile alone: the forward pass keeps a part's inputs, and the
backward pass runs every tile again before it takes its gradient. A whole operator, with its
exchanges, can be run again in the same way. Recomputation: Chen et al., arXiv 1604.06174; in tiles
along the sequence: ALST, arXiv 2506.13996.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from scaling.algebra.clifford import autocast_dtype
from scaling.execution import Execution
from scaling.parallel.telemetry import timed, timed_both_ways
from scaling.work import work_counter

PROBE = 32
"""Tokens on which is measured what a part keeps."""
MOST_FORMS = 4
"""Compilations of a part of a module, half a minute each: what rows of one length need at most,
two lengths of tiles with gradients and without. Further lengths run uncompiled."""
ALIGNMENT = 16
"""Tiles start at multiples of it: 64 bytes of float32."""

Results = TypeVar("Results", bound=tuple[Tensor, ...])
Part = Callable[..., Results]


def most_kept_per_token(model: nn.Module) -> float:
    """Bytes of a token in the part that keeps most of those that have run so far."""
    tiled = [module for module in model.modules() if isinstance(module, Tiled)]
    return max((kept for module in tiled for kept in module._kept.values()), default=0.0)


def set_execution(model: nn.Module, execution: Execution) -> None:
    """Makes a model run that way."""
    for module in model.modules():
        if isinstance(module, Tiled):
            module.execution = execution


class Tiled(nn.Module):
    """A module with parts that act on each token alone.

    Parts run again outside of `forward`, so that ZeRO-3 must gather the module as a whole. It does
    so where inputs and outputs are tensors with gradients.
    """

    gathers_whole = True
    """False where they are batches: ZeRO-3 then gathers for each inner module, and
    sets `runs_whole`."""
    runs_whole = False
    """Cut nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.execution = Execution()
        self._kept: dict[Any, float] = {}
        self._compiled: dict[str, Part] = {}

    def in_tiles(self, part: Part[Results], *tensors: Tensor) -> Results:
        """part(*tensors), cut into tiles of tokens where it would keep more than tile_bytes.

        Args:
            part: a method of this module, which acts on each token alone and draws no random
                numbers; its results are (..., n).
            tensors: (..., n), or (..., 1) for what all tokens share.
        """
        tokens = max(x.shape[-1] for x in tensors)
        with timed("projection"):
            tile = self._tile(part, tensors, tokens)
            if self.execution.compile:
                part = self._compiled.setdefault(part.__name__, compiled(part))
            run = part if tile >= tokens else functools.partial(self._by_tiles, part, tile)
            results = cast(Results, timed_both_ways("projection", run, *tensors))
        if counter := work_counter():
            counter.pointwise(tensors, results)
        return results

    def _by_tiles(self, part: Part[Results], tile: int, *tensors: Tensor) -> Results:
        cut = zip(*(_cut(x, tile) for x in tensors), strict=False)
        results = [self.recompute(part, *some) for some in cut]
        return cast(Results, tuple(torch.cat(some, -1) for some in zip(*results, strict=True)))

    def recompute(self, part: Part[Results], *tensors: Tensor) -> Results:
        """part(*tensors), keeping nothing but its inputs; any part, run as one piece."""
        return checkpoint(part, *tensors, use_reentrant=False, preserve_rng_state=False)

    def _tile(self, part: Part, tensors: Sequence[Tensor], tokens: int) -> int:
        """Tokens of a tile."""
        if tokens <= 2 * PROBE or self.runs_whole or work_counter():
            return tokens
        device = tensors[0].device.type
        budget = self.execution.tile_budget(device)
        shapes = tuple((x.shape[:-1], x.dtype) for x in tensors)
        key = (part.__name__, shapes, autocast_dtype(device))
        if key not in self._kept:
            self._kept[key] = kept_per_token(part, tensors)
        most = max(int(budget / max(self._kept[key], 1.0)), 1)
        if most >= tokens:
            return tokens
        even = -(-tokens // -(-tokens // most))  # tiles of one size, but the last
        return -(-even // ALIGNMENT) * ALIGNMENT


def compiled(part: Part[Results]) -> Part[Results]:
    """`part` by torch.compile, for MOST_FORMS shapes of its tensors; where the compiler fails, and
    for further shapes, a warning, and `part` as it is."""
    from torch._dynamo.exc import TorchDynamoException  # loads the compiler, which takes seconds
    from torch._inductor.exc import InductorError

    fast = torch.compile(part, dynamic=False)
    forms: set[Any] = set()
    most, told = MOST_FORMS, False

    @functools.wraps(part)
    def run(*tensors: Tensor) -> Results:
        nonlocal most, told
        form = (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(tensors[0].device.type),
            *((x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors),
        )
        if form in forms or len(forms) < most:
            forms.add(form)
            try:
                # The compiler's own limit is for all modules together, and hardly to be seen.
                with torch._dynamo.config.patch(recompile_limit=1 << 16):
                    return fast(*tensors)
            except (TorchDynamoException, InductorError) as error:
                forms.clear()
                most, name = 0, part.__qualname__
                reason = str(error).strip().splitlines()[0][:200]
                why = f"torch.compile cannot do {name} here ({reason}); it runs without"
        else:
            why = (
                f"{part.__qualname__} has been compiled for {most} shapes, the most there are; "
                f"others run without, {tuple(tensors[0].shape)} first; rows of one length, or "
                "execution.compile=false, end this"
            )
        if not told:
            told = True
            warnings.warn(f"execution.compile=true: {why}", stacklevel=2)
        return part(*tensors)

    return run


def kept_per_token(part: Part, tensors: Sequence[Tensor]) -> float:
    """Bytes that `part` keeps for its gradient, for one token of `tensors`."""

    def kept(tokens: int) -> int:
        found: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            return found.setdefault(x.untyped_storage()._cdata, x)

        some = [x[..., :tokens].clone() for x in tensors]
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda x: x):
            graph = part(*[x.requires_grad_(x.is_floating_point()) for x in some])
        del graph
        return sum(x.untyped_storage().nbytes() for x in found.values())

    return (kept(2 * PROBE) - kept(PROBE)) / PROBE


def _cut(x: Tensor, tile: int) -> Iterable[Tensor]:
    """Its tiles; what all tokens share has one, for every tile."""
    return x.split(tile, -1) if x.shape[-1] > 1 else repeat(x)
