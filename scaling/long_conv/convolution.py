"""Long convolutions as one trilinear form, on one process or on a cyclic shard.

The operands' streams are transformed and exchanged together: one all-to-all brings the spectra of
q and k, one takes the result back; the same number again for the gradients. Channels go in chunks
of bounded memory, and while one chunk's exchange is under way another's transforms run.
"""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaling.long_conv.form import ROLES, Part, Role, TrilinearForm
from scaling.long_conv.products import Block, multiply
from scaling.long_conv.rows import RowGroup
from scaling.long_conv.transform import Spectra, Streams, Transform
from scaling.parallel.telemetry import timed

IN_FLIGHT = 2
"""Chunks of channels under way at once."""
TOGETHER = 3
"""Streams from which MKL's time for one no longer falls by a factor with their number."""

Tokens = Float[Tensor, "_ channel _ n_local"]


@dataclass
class Stack:
    """Parts whose streams are transformed as one tensor, one part behind the other."""

    group: RowGroup
    shapes: dict[Part, tuple[int, int, int]]
    """Channels, components and rows."""

    @property
    def streams(self) -> Streams:
        return self.group.frequencies, sum(map(prod, self.shapes.values()))

    def split(self, x: Tensor) -> dict[Part, Tensor]:
        """(..., stream, *) -> (..., channel, component, row, *) of each part."""
        pieces = x.split([prod(shape) for shape in self.shapes.values()], -2)
        return {
            part: piece.unflatten(-2, shape)
            for (part, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }


@dataclass
class Convolution:
    """What is multiplied, and where the tokens of every role lie."""

    product: TrilinearForm
    groups: list[RowGroup]
    transform: Transform
    rows: dict[Role, int]
    """Rows of each role's tensors; a static k has one for all."""
    covered: bool
    """Whether every token of every tensor is in one body, so that each is written once."""
    differentiable: bool
    workspace_bytes: int
    in_place: bool = False
    """Whether tensors are transformed where they lie, without being copied into one."""

    def __call__(self, q: list[Tokens], k: list[Tokens]) -> tuple[Tokens, ...]:
        """The parts of u."""
        self.in_place = (
            [group.is_one_full_row(q[0].shape[-1]) for group in self.groups] == [True]
            and set(self.rows.values()) == {1}
            and q[0].dtype == self.transform.dtype.to_real()
            and all(x.shape[1] * x.shape[2] >= TOGETHER for x in (*q, *k))
        )
        return _LongConv.apply(self, *q, *k)

    def run(
        self,
        tokens: dict[Part, Tokens],
        kept: list[list[Block]],
        wanted: Sequence[Role],
        keep: bool,
    ) -> tuple[dict[Part, Tokens], list[list[Block]]]:
        """The wanted roles' tensors, from tokens and, by chunk, spectra of the others; and, to be
        kept, the spectra of the tokens."""
        some = next(iter(tokens.values()))
        _, channels, _, n_local = some.shape
        chunks = self._chunks(channels)
        sizes = {part: self.product.sizes[part[0]][part[1]] for part in self.product.parts(*wanted)}
        results: dict[Part, Tokens] = {}
        if not self.in_place or len(chunks) > 1:
            new = some.new_empty if self.covered else some.new_zeros
            results = {
                part: new(self.rows[part[0]], channels, size, n_local)
                for part, size in sizes.items()
            }
        spectra: list[list[Block]] = [[] for _ in chunks]
        interleave(
            self._chunk(tokens, old, sizes, results, chunk, new if keep else None)
            for chunk, old, new in zip(chunks, kept or spectra, spectra, strict=True)
        )
        return results, spectra

    def _chunks(self, channels: int) -> list[slice]:
        """Channels that are worked on at once; the same on every rank."""
        numbers = sum(
            group.count[role] * self.product.components(role) * group.frequencies.tokens
            for group in self.groups
            for role in ROLES
        )
        # Products and what they become; with other ranks also what is sent and received.
        copies = 2 if self.transform.shard is None else 4
        one = copies * numbers * self.transform.dtype.itemsize // 2
        size = max(1, self.workspace_bytes // (IN_FLIGHT * max(one, 1)))
        return [slice(c, min(c + size, channels)) for c in range(0, channels, size)]

    def _chunk(
        self,
        tokens: dict[Part, Tokens],
        kept: list[Block],
        wanted: Iterable[Part],
        results: dict[Part, Tokens],
        chunk: slice,
        keep: list[Block] | None,
    ) -> Generator[None, None, None]:
        """One chunk of channels; pauses while an exchange is under way."""
        channels = chunk.stop - chunk.start
        tokens = {part: x[:, chunk] for part, x in tokens.items()}
        stacks = self._stacks(tokens, channels)
        streams = [stack.streams for stack in stacks]
        pending = self.transform.start(self._fill(tokens, stacks), streams)
        yield
        fresh = self._blocks(self.transform.finish(pending, streams), stacks)
        if keep is not None:
            keep += fresh
        stacks = self._stacks(wanted, channels)
        streams = [stack.streams for stack in stacks]
        product = self.transform.empty(streams)
        blocks = self._blocks(product, stacks)
        self._multiply(fresh, kept, blocks, keep is not None)
        del fresh, pending  # before room is made for what comes back
        pending = self.transform.start_back(product, streams)
        del product, blocks
        yield
        back = self.transform.finish_back(pending, streams)
        for stack, x in zip(stacks, back, strict=True):
            for part, rows in stack.split(x).items():
                if part in results:
                    stack.group.read(part[0], rows, results[part][:, chunk])
                else:  # rows are the result; autograd lets nobody change one that is a view
                    shape = [rows.shape[axis] for axis in (2, 0, 1, 3)]
                    results[part] = torch.ops.aten._unsafe_view(rows, shape)

    def _multiply(
        self, fresh: list[Block], kept: list[Block], results: list[Block], keep: bool
    ) -> None:
        bins = ((group, bins) for group in self.groups for bins in group.frequencies.parts)
        old = kept or [{} for _ in fresh]
        for (group, some), *blocks in zip(bins, fresh, old, results, strict=True):
            multiply(self.product, group, some, *blocks, keep=keep)

    def _stacks(self, parts: Iterable[Part], channels: int) -> list[Stack]:
        shapes = [
            (
                group,
                {(r, n): (channels, self.product.sizes[r][n], group.count[r]) for r, n in parts},
            )
            for group in self.groups
        ]
        if self.in_place:
            ((group, every),) = shapes
            return [Stack(group, {part: shape}) for part, shape in every.items()]
        return [Stack(group, every) for group, every in shapes]

    def _fill(self, tokens: dict[Part, Tokens], stacks: list[Stack]) -> list[Tensor]:
        """Tokens (stream, token) of every stack."""
        if self.in_place:
            return [x.flatten(0, -2) for x in tokens.values()]
        filled = []
        for stack in stacks:
            filled.append(self.transform.tokens(stack.streams))
            for part, rows in stack.split(filled[-1]).items():
                stack.group.fill(part[0], tokens[part], rows)
        return filled

    def _blocks(self, spectra: Spectra, stacks: list[Stack]) -> list[Block]:
        """Every group's parts of frequencies, one behind the other."""
        blocks: dict[tuple[int, int], Block] = {}
        parts = iter(spectra.parts)
        for stack in stacks:
            for number in range(len(stack.group.frequencies.parts)):
                block = blocks.setdefault((id(stack.group), number), {})
                block.update(stack.split(next(parts)))
        return list(blocks.values())


def interleave(tasks: Iterable[Generator[None, None, None]]) -> None:
    """Runs generators in turn, IN_FLIGHT at once: where one pauses the next goes on."""
    waiting, running = iter(tasks), deque[Generator[None, None, None]]()
    while True:
        while len(running) < IN_FLIGHT and (task := next(waiting, None)) is not None:
            next(task)
            running.append(task)
        if not running:
            return
        task = running.popleft()
        try:
            next(task)
        except StopIteration:
            continue
        running.append(task)


class _LongConv(torch.autograd.Function):
    """The trilinear form's derivative by u; backward, its derivatives by q and k."""

    @staticmethod
    def forward(ctx: Any, convolution: Convolution, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.convolution, ctx.parts = convolution, convolution.product.parts("q", "k")
        keep = convolution.differentiable and any(ctx.needs_input_grad)
        tokens = dict(zip(ctx.parts, operands, strict=True))
        results, spectra = convolution.run(tokens, [], ["u"], keep)
        ctx.blocks = len(spectra), len(spectra[0]) if spectra else 0
        ctx.save_for_backward(
            *[block[part] for chunk in spectra for block in chunk for part in ctx.parts]
        )
        return tuple(results[part] for part in convolution.product.parts("u"))

    @staticmethod
    @once_differentiable
    @timed("transforms")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        convolution, spectra = ctx.convolution, iter(ctx.saved_tensors)
        chunks, blocks = ctx.blocks
        kept = [
            [{part: next(spectra) for part in ctx.parts} for _ in range(blocks)]
            for _ in range(chunks)
        ]
        needed = dict(zip(ctx.parts, ctx.needs_input_grad[1:], strict=True))
        wanted = [role for role in ("q", "k") if any(needed[p] for p in ctx.parts if p[0] == role)]
        tokens = dict(zip(convolution.product.parts("u"), grads, strict=True))
        gradients, _ = convolution.run(tokens, kept, wanted, keep=False)
        return None, *[gradients.get(part) for part in ctx.parts]
