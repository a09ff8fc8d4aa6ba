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
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from scaling.algebra.clifford import autocast_dtype
from scaling.execution import Execution
from scaling.parallel.telemetry import timed, timed_both_ways

PROBE = 32
"""Tokens on which is measured what a part keeps."""
MOST_GRAPHS = 64
"""Compiled forms of a part: for every operator, with and without gradients, two tile lengths."""
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
            if tile < tokens:
                return _again(part, self.parameters(), tensors, tile)
            return cast(Results, timed_both_ways("projection", part, *tensors))

    def recompute(self, part: Part[Results], *tensors: Tensor) -> Results:
        """part(*tensors), keeping nothing but its inputs; any part, run as one piece."""
        return _again(part, self.parameters(), tensors, None)

    def _tile(self, part: Part, tensors: Sequence[Tensor], tokens: int) -> int:
        """Tokens of a tile."""
        if tokens <= 2 * PROBE or self.runs_whole:
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
    """`part` by torch.compile, without a word about its tiles' lengths changing; where the compiler
    fails, a warning, and `part` as it is."""
    from torch._dynamo.exc import TorchDynamoException  # loads the compiler, which takes seconds
    from torch._inductor.exc import InductorError

    fast = torch.compile(part, dynamic=False)
    works = True

    @functools.wraps(part)
    def run(*tensors: Tensor) -> Results:
        nonlocal works
        if works:
            try:
                with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                    return fast(*tensors)
            except (TorchDynamoException, InductorError) as error:
                works = False
                warnings.warn(
                    f"execution.compile=true: torch.compile cannot do {part.__qualname__} here "
                    f"({str(error).strip().splitlines()[0][:200]}); it runs without",
                    stacklevel=2,
                )
        return part(*tensors)

    return run


def kept_per_token(part: Part, tensors: Sequence[Tensor]) -> float:
    """Bytes that `part` keeps for its gradient, for one token of `tensors`."""

    def kept(tokens: int) -> int:
        found: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            return found.setdefault(x.untyped_storage().data_ptr(), x)

        some = [_cut(x, slice(0, tokens)).clone() for x in tensors]
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda x: x):
            graph = part(*[x.requires_grad_(x.is_floating_point()) for x in some])
        del graph
        return sum(x.untyped_storage().nbytes() for x in found.values())

    return (kept(2 * PROBE) - kept(PROBE)) / PROBE


def _again(
    part: Part[Results],
    parameters: Iterable[nn.Parameter],
    tensors: Sequence[Tensor],
    tile: int | None,
) -> Results:
    return cast(Results, _Again.apply(part, tile, len(tensors), *tensors, *parameters))


class _Again(torch.autograd.Function):
    """Runs a part tile by tile and keeps its inputs; runs every tile again for its gradient.

    The module's parameters are inputs: engines see their gradients come once, as ever.
    """

    @staticmethod
    def forward(ctx: Any, part: Part, tile: int | None, count: int, *given: Tensor):
        tensors = given[:count]
        ctx.part, ctx.tile, ctx.count = part, tile, count
        ctx.save_for_backward(*given)
        device = tensors[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        if tile is None:
            return part(*[x.detach() for x in tensors])
        results: list[Tensor] = []
        for here in _tiles(tensors, tile):
            found = part(*[_cut(x, here) for x in tensors])
            if not results:
                tokens = max(x.shape[-1] for x in tensors)
                results = [x.new_empty(*x.shape[:-1], tokens) for x in found]
            for result, x in zip(results, found, strict=True):
                result[..., here] = x
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with nullcontext() if ctx.tile is None else timed("projection"):
            return None, None, None, *_Again._gradients(ctx, grads)

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor]) -> list[Tensor | None]:
        given, part, count = ctx.saved_tensors, ctx.part, ctx.count
        tensors, parameters = given[:count], given[count:]
        needed = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        found: list[Tensor | None] = [None] * len(given)
        device, dtype, enabled = ctx.autocast
        for here in [None] if ctx.tile is None else _tiles(tensors, ctx.tile):
            cut = [(x if here is None else _cut(x, here)).detach() for x in tensors]
            for i in needed:
                if i < count:
                    cut[i].requires_grad_()
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                results = part(*cut)
            wanted = [cut[i] if i < count else parameters[i - count] for i in needed]
            back = [x if here is None else x[..., here] for x in grads]
            # Some hang on nothing that is trained, where parameters are frozen.
            trained = [j for j, x in enumerate(results) if x.requires_grad]
            if not trained:
                return found
            got = torch.autograd.grad(
                [results[j] for j in trained], wanted, [back[j] for j in trained], allow_unused=True
            )
            del results
            for i, grad in zip(needed, got, strict=True):
                if grad is not None:
                    found[i] = _add(found[i], grad, given[i], here if i < count else None)
        return found


def _add(total: Tensor | None, grad: Tensor, x: Tensor, here: slice | None) -> Tensor:
    """The gradient of x so far, with that of one tile."""
    if here is not None and x.shape[-1] > 1:
        total = torch.zeros_like(x) if total is None else total
        total[..., here] = grad
        return total
    return grad if total is None else total.add_(grad)


def _tiles(tensors: Sequence[Tensor], tile: int) -> list[slice]:
    tokens = max(x.shape[-1] for x in tensors)
    return [slice(i, min(i + tile, tokens)) for i in range(0, tokens, tile)]


def _cut(x: Tensor, here: slice) -> Tensor:
    return x[..., here] if x.shape[-1] > 1 else x
