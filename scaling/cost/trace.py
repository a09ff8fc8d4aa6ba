"""One rank's training step on the meta device: what is computed, moved, exchanged and held.

The model's own code runs as one rank of a world whose other ranks do not exist, on tensors without
numbers, so that no size costs anything. Every operator is heard with its shapes. A part that real
steps cut into very many tiles is cut into fewer here, and all pairs of tokens are one block: such
operators count as often, and as small, as they would be.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import log2, prod
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from data_pipeline.batch import GeometricBatch
from scaling.execution import Execution, simulated
from scaling.models.protocol import Model
from scaling.observe.memory import LARGE_BLOCK
from scaling.ops.pairs import block_tokens
from scaling.ops.tiles import PROBE, most_kept_per_token, set_execution
from scaling.parallel.shard import SequenceShard, redistribute_batch
from scaling.parallel.telemetry import ExchangeCount, innermost_range, measuring

MOST_TILES = 16
"""Tiles of a part in the step that runs here; parts that keep hardly anything may then stay whole,
which foresees a little too much memory."""
KEPT, TILE = "kept activations", "tile workspace"
HEAP = "left free on the heap"
"""On a CPU small tensors lie on the process's heap, which hardly shrinks when they are freed."""
PURPOSES = {"transforms": "FFT workspace and spectra", "comm": "exchange buffers"}
"""Of what is made inside these timed ranges. All else is kept where it has every token, and
part of a tile where it has not: tokens are the last axis."""
PARTS = ("projection", "transforms", "pairs", "other")
"""Timed ranges that operators belong to; other: outside of all, or of none of these."""
_FFT = (torch.ops.aten._fft_r2c, torch.ops.aten._fft_c2r, torch.ops.aten._fft_c2c)
_FREE = {getattr(torch.ops.aten, name) for name in
         ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}  # fmt: skip


class Operator(NamedTuple):
    """What one call computes and moves."""

    bytes: float
    """Read and written, each once."""
    matrix_flops: float = 0.0
    side: int = 0
    """Smallest of the matrices' sides."""
    transform_flops: float = 0.0
    length: int = 0
    """Of the transforms."""


@dataclass
class StepTrace:
    """Of one rank and one micro-batch: forward and backward."""

    operators: dict[tuple[str, Operator], float] = field(default_factory=dict)
    """How often each is called, by part."""
    exchanges: dict[str, ExchangeCount] = field(default_factory=dict)
    """By operator; no seconds."""
    held: Counter[str] = field(default_factory=Counter)
    """Bytes of live tensors, and of the heap beyond them, when they were most, by purpose."""
    heap: int = 0
    """Bytes of small tensors when these were most; 0 on a GPU."""

    @property
    def sent_bytes(self) -> int:
        return sum(each.bytes for each in self.exchanges.values())

    @property
    def collectives(self) -> int:
        return sum(each.calls for each in self.exchanges.values())


def trace_step(
    model: Model,
    execution: Execution,
    length: int,
    *,
    rows: int = 1,
    ranks: int = 1,
    rank: int | None = None,
    device: str = "cpu",
) -> StepTrace:
    """A step of `rows` rows of `length` tokens that `ranks` ranks share. The model stays as it is.

    Args:
        rank: None is that of the last token, which holds as many tokens as any.
        device: whose tiles are meant, cpu or cuda.
    """
    forward_and_backward(model, random_batch(model, rows, 2 * PROBE + 1))  # says what parts keep
    model.zero_grad()
    model = deepcopy(model).to("meta")
    execution = replace(execution, offload="none", compile=False)  # what is kept is counted here
    rank = (length - 1) % ranks if rank is None else rank
    with simulated(device), _world(rank, ranks) if ranks > 1 else nullcontext():
        shard = SequenceShard(length, layout=model.layout)
        tile = execution.tile_budget(device)
        coarse = max(tile, int(most_kept_per_token(model) * shard.n_local / MOST_TILES))
        set_execution(model, replace(execution, tile_bytes=coarse))
        operators = _Operators(shard.n_local, coarse / tile, device)
        with measuring() as measured:
            natural = SequenceShard(length, layout="contiguous")
            batch = redistribute_batch(_batch(model, rows, natural), natural, shard)
            with operators:
                forward_and_backward(model, batch, shard)
    return StepTrace(operators.calls, dict(measured.exchanges), operators.peak, operators.heap)


def _batch(model: Model, rows: int, shard: SequenceShard) -> GeometricBatch:
    """A rank's tokens of full rows, without numbers."""
    with torch.device("meta"):
        batch = random_batch(model, rows, shard.n_local)
    return batch.replace(lengths=(shard.length,) * rows)


def random_batch(model: Model, rows: int, tokens: int) -> GeometricBatch:
    """Full rows, on one process."""
    fields = [(3,), (model.vectors, 3), (model.scalars,)]
    return GeometricBatch(*(torch.randn(rows, *channels, tokens) for channels in fields),
                          lengths=(tokens,) * rows)  # fmt: skip


def forward_and_backward(
    model: Model, batch: GeometricBatch, shard: SequenceShard | None = None
) -> None:
    """Of a loss that every output and parameter counts in."""
    out = model(batch, shard)
    loss = out.points.square().sum() + out.vectors.square().sum() + out.scalars.square().sum()
    loss.backward()


@contextmanager
def _world(rank: int, ranks: int) -> Iterator[None]:
    """A process group whose other members do not exist: what is received means nothing."""
    from torch.testing._internal.distributed import fake_pg

    if not hasattr(dist.Backend, "NOBODY"):
        make: Any = fake_pg._create_fake_pg
        devices = ["cpu", "meta"]
        dist.Backend.register_backend("nobody", make, extended_api=True, devices=devices)
    dist.init_process_group("nobody", rank=rank, world_size=ranks, store=fake_pg.FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Operators(TorchDispatchMode):
    """While it is entered, hears every operator, and counts the bytes of all tensors that operators
    make and nobody has freed yet; `peak` is what was held, by purpose, when it was most.

    An operator of known shapes is not run again: its result is made directly.

    Args:
        tokens: of this process.
        tiles: real tiles in one of those that run here.
        device: which is meant, cpu or cuda; on a CPU small tensors lie on a heap.
    """

    def __init__(self, tokens: int, tiles: float, device: str) -> None:
        super().__init__()
        self.calls: dict[tuple[str, Operator], float] = {}
        self.peak: Counter[str] = Counter()
        self.heap = 0
        self._small, self._largest_small = 0, LARGE_BLOCK if device == "cpu" else 0
        self._waited = 0.0  # bytes of tiles' results that are being joined
        self._tokens, self._tiles, self._device = tokens, tiles, device
        self._held: Counter[str] = Counter()
        self._total, self._most = 0.0, 0.0
        self._known: set[int] = set()
        self._silent: dict[Any, bool] = {}
        self._calls: dict[Any, tuple[Operator, Callable[[list[Tensor]], Tensor] | None]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in self._silent:
            # Those of torch.distributed may have a list of thousands of ranks, and cost nothing.
            self._silent[function] = function.is_view or function.namespace == "c10d"
        if self._silent[function]:
            return function(*args, **kwargs)
        leaves = _leaves((*args, *kwargs.values()))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = (function, *kwargs, *map(_form, leaves))
        if key in self._calls:
            cost, again = self._calls[key]
        else:
            cost = again = None
        result = again(tensors) if again else function(*args, **kwargs)
        results = _leaves(result if isinstance(result, list | tuple) else (result,))
        results = [x for x in results if isinstance(x, Tensor)]
        if cost is None:
            cost = _cost(function, args, kwargs, tensors, results)
            self._calls[key] = cost, _again(tensors, result)
        self._count(function, cost, [*tensors, *results])
        if self._largest_small:
            joined = function is torch.ops.aten.cat.default and self._is_whole(results[0])
            self._waited = self._waited + self._missing(results[0]) if joined else 0.0
            self.heap = max(self.heap, round(self._small + self._waited))
        for x in results:
            self._hold(x)
        return result

    def _count(self, function: Any, cost: Operator, tensors: list[Tensor]) -> None:
        if function.overloadpacket in _FREE:
            return
        part = innermost_range()
        part, times = part if part in PARTS else "other", 1.0
        if part == "projection" and not any(self._is_whole(x) for x in tensors):
            times = self._tiles
        if part == "pairs":
            times = max(map(self._blocks, tensors), default=1.0)
        if times > 1:
            cost = Operator(cost.bytes / times, cost.matrix_flops / times, cost.side,
                            cost.transform_flops / times, cost.length)  # fmt: skip
        self.calls[part, cost] = self.calls.get((part, cost), 0.0) + times

    def _is_whole(self, x: Tensor) -> bool:
        """Whether it has every token of this process, with which it is more than a tile."""
        return x.ndim > 0 and x.shape[-1] > 0 and x.shape[-1] % self._tokens == 0

    def _blocks(self, x: Tensor) -> float:
        """In how many it is made, if it is of all pairs of tokens: (b, h, ..., n, n)."""
        if x.numel() < (self._tokens - 1) ** 2:
            return 1.0
        block = block_tokens(self._device, prod(x.shape[:-2][:2]))
        return max(self._tokens / block, 1.0) ** 2

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._known:
            return
        part, whole = innermost_range(), self._is_whole(x)
        purpose = PURPOSES.get(part or "", KEPT if whole else TILE)
        if part == "projection" and not whole:
            size = round(size / self._tiles)
        if part == "pairs" and (blocks := self._blocks(x)) > 1:
            size, purpose = round(size / blocks), TILE
        small = size if size < self._largest_small else 0
        self._known.add(key)
        self._held[purpose] += size
        self._total += size
        self._small += small
        self.heap = max(self.heap, self._small)
        if self._total + self.heap - self._small > self._most:
            self._most = self._total + self.heap - self._small
            self.peak = self._held.copy()
            if self._largest_small:
                self.peak[HEAP] = self.heap - self._small
        finalize(storage, self._freed, key, purpose, size, small)

    def _freed(self, key: int, purpose: str, size: int, small: int) -> None:
        self._known.discard(key)
        self._held[purpose] -= size
        self._total -= size
        self._small -= small

    def _missing(self, joined: Tensor) -> float:
        """Results of tiles wait for each other: all of them, where one real tile's were counted."""
        return joined.numel() * joined.itemsize * (1 - 1 / self._tiles)


def _leaves(arguments: Any) -> list[Any]:
    """Of arguments that are values or lists of these."""
    found = []
    for x in arguments:
        found += x if isinstance(x, list | tuple) else [x]
    return found


def _again(tensors: list[Tensor], result: Any) -> Callable[[list[Tensor]], Tensor] | None:
    """How the same call's result is made from its tensors without running it, where that is known:
    one of them, or a new one."""
    if not isinstance(result, Tensor) or not all(x.is_meta for x in (*tensors, result)):
        return None
    for number, x in enumerate(tensors):
        if x is result:
            return itemgetter(number)
    if any(x.untyped_storage()._cdata == result.untyped_storage()._cdata for x in tensors):
        return None
    shape, stride, dtype = result.shape, result.stride(), result.dtype
    return lambda _: torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _form(x: Any) -> Any:
    """What an operator's result and cost depend on."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device, x.is_conj(), x.is_neg()
    return type(x), x


def _cost(
    function: Any, args: Any, kwargs: Any, tensors: list[Tensor], results: list[Tensor]
) -> Operator:
    """What a call takes; what is written in place is read, too, or overwritten: moved once."""
    own = {id(x) for x in tensors}
    moved = sum(map(_moved, tensors)) + sum(_moved(x) for x in results if id(x) not in own)
    packet = function.overloadpacket
    if packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=results[0])
        side = min(min(x.shape[-2:]) for x in tensors if x.ndim > 1)
        return Operator(
            moved, matrix_flops=flops * (4 if results[0].is_complex() else 1), side=side
        )
    if packet in _FFT:
        x, dim = tensors[0], args[1][0]
        n, both_complex = max(x.shape[dim], results[0].shape[dim]), packet is _FFT[-1]
        each = (5.0 if both_complex else 2.5) * n * log2(max(n, 2))
        return Operator(moved, transform_flops=each * x.numel() / x.shape[dim], length=n)
    return Operator(moved)


def _moved(x: Tensor) -> int:
    """Bytes; what is expanded is read from where it lies."""
    return min(x.numel() * x.itemsize, x.untyped_storage().nbytes())
