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
from torch import Tensor

from data_pipeline.errors import ConfigError
from scaling.long_conv.form import ROLES, Role, TrilinearForm
from scaling.long_conv.products import multiply
from scaling.long_conv.rows import RowGroup, WholeRows
from scaling.long_conv.transform import Spectra, Streams, Transform
from scaling.parallel.telemetry import timed

IN_FLIGHT = 2
"""Chunks of channels under way at once."""
TOGETHER = 3
"""Streams from which MKL's time for one no longer falls by a factor with their number."""

Parts = list[list[list[Tensor]]]
"""One role's frequencies: group, part, tensors (rank, phase, channel, component, row, k), one for
each of its parts."""
Given = dict[Role, list[Tensor]]
"""Tensors of each role: (row, channel, component, n_local)."""
Layout = list[list[tuple[Role, int]]]
"""What every tensor (stream, token) of a group holds: parts of roles, with their components."""


@dataclass
class Convolution:
    """What is multiplied, and where the tokens of every role lie."""

    product: TrilinearForm
    groups: list[RowGroup]
    transform: Transform
    rows: dict[Role, int]
    """Rows of each role's tensors; a static k has one for all."""
    keep_spectra: bool
    workspace_bytes: int
    in_place: bool = False
    """Whether tensors are transformed where they lie, without being copied into one."""

    def __call__(self, q: list[Tensor], k: list[Tensor]) -> tuple[Tensor, ...]:
        """The parts of u."""
        self.in_place = (
            len(self.groups) == 1
            and isinstance(group := self.groups[0], WholeRows)
            and group.is_one_full_row
            and q[0].dtype == self.transform.dtype.to_real()
            and all(x.shape[1] * x.shape[2] >= TOGETHER for x in (*q, *k))
        )
        return _LongConv.apply(self, "u", *q, *k)

    def run(
        self, given: Given, kept: list[dict[Role, Parts]], wanted: Sequence[Role], keep: bool
    ) -> tuple[Given, list[dict[Role, Parts]]]:
        """The wanted roles' tensors, from tokens (given) and spectra (kept, by chunk) of the rest;
        and, to be kept, the spectra of what was given."""
        some = next(iter(given.values()))[0]
        _, channels, _, tokens = some.shape
        chunks = self._chunks(channels)
        if self.in_place and len(chunks) == 1:
            results: Given = {role: [] for role in wanted}
        else:
            complete = self.groups and all(group.complete for group in self.groups)
            new = some.new_empty if complete else some.new_zeros
            results = {
                role: [new(self.rows[role], channels, c, tokens) for c in self.product.parts[role]]
                for role in wanted
            }
        found: list[dict[Role, Parts]] = [{} for _ in chunks]
        interleave(
            self._chunk(
                {role: [x[:, chunk] for x in tensors] for role, tensors in given.items()},
                old,
                results,
                chunk,
                new if keep else None,
            )
            for chunk, old, new in zip(chunks, kept or found, found, strict=True)
        )
        return results, found

    def _chunks(self, channels: int) -> list[slice]:
        """Channels that are worked on at once; the same on every rank."""
        numbers = sum(
            group.rows(role) * self.product.components(role) * group.frequencies.tokens
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
        given: Given,
        kept: dict[Role, Parts],
        results: Given,
        chunk: slice,
        found: dict[Role, Parts] | None,
    ) -> Generator[None, None, None]:
        """One chunk of channels; pauses while an exchange is under way."""
        channels = chunk.stop - chunk.start
        layout = self._layout(given)
        streams = self._streams(layout, channels)
        pending = self.transform.start(self._fill(given, layout, streams))
        yield
        fresh = self._by_role(self.transform.finish(pending, streams), layout, channels)
        if found is not None:
            found.update(fresh)
        layout = self._layout(results)
        streams = self._streams(layout, channels)
        product = self.transform.empty(streams)
        parts = self._by_role(product, layout, channels)
        for g, group in enumerate(self.groups):
            for p in range(len(group.frequencies.parts)):
                here = ({r: x[g][p] for r, x in some.items()} for some in (fresh, kept, parts))
                multiply(self.product, group, p, *here, keep=found is not None)
        del fresh, pending  # before room is made for what comes back
        pending = self.transform.start_back(product, streams)
        del product, parts
        yield
        self._read(self.transform.finish_back(pending, streams), layout, results, chunk)

    def _layout(self, roles: Iterable[Role]) -> Layout:
        pairs = [(role, size) for role in roles for size in self.product.parts[role]]
        return [[pair] for pair in pairs] if self.in_place else [pairs]

    def _streams(self, layout: Layout, channels: int) -> Streams:
        return [
            [sum(channels * size * group.rows(role) for role, size in pairs) for pairs in layout]
            for group in self.groups
        ]

    def _split(
        self, tensors: list[Tensor], layout: Layout, group: RowGroup, channels: int
    ) -> list[tuple[Role, Tensor]]:
        """Streams, the axis before the last, by part: (..., channel, component, row, *)."""
        found = []
        for x, pairs in zip(tensors, layout, strict=True):
            shapes = [(channels, size, group.rows(role)) for role, size in pairs]
            pieces = x.split([prod(shape) for shape in shapes], -2)
            for (role, _), piece, shape in zip(pairs, pieces, shapes, strict=True):
                found.append((role, piece.unflatten(-2, shape)))
        return found

    def _fill(self, given: Given, layout: Layout, streams: Streams) -> list[list[Tensor]]:
        """Tokens (stream, token) of every group's tensors."""
        flat = [x for tensors in given.values() for x in tensors]
        if self.in_place:
            return [[x.flatten(0, -2) for x in flat]]
        filled = []
        for group, (number,) in zip(self.groups, streams, strict=True):
            buffer = self.transform.tokens(number, group.frequencies)
            pieces = self._split([buffer], layout, group, flat[0].shape[1])
            for x, (role, piece) in zip(flat, pieces, strict=True):
                group.fill(role, x, piece)
            filled.append([buffer])
        return filled

    def _read(
        self, tokens: list[list[Tensor]], layout: Layout, results: Given, chunk: slice
    ) -> None:
        """Puts the tokens of a chunk's rows into the results; where there are none yet, the rows
        are the results."""
        new = not any(results.values())
        for group, tensors in zip(self.groups, tokens, strict=True):
            goals = iter([x for parts in results.values() for x in parts])
            for role, piece in self._split(tensors, layout, group, chunk.stop - chunk.start):
                if new:  # autograd lets nobody change a function's result that is a view
                    shape = [piece.shape[axis] for axis in (2, 0, 1, 3)]
                    results[role].append(torch.ops.aten._unsafe_view(piece, shape))
                else:
                    group.read(role, piece, next(goals)[:, chunk])

    def _by_role(self, spectra: Spectra, layout: Layout, channels: int) -> dict[Role, Parts]:
        found: dict[Role, Parts] = {role: [] for pairs in layout for role, _ in pairs}
        for group, parts in zip(self.groups, spectra.parts, strict=True):
            for groups in found.values():
                groups.append([[] for _ in parts])
            for number, tensors in enumerate(parts):
                for role, piece in self._split(tensors, layout, group, channels):
                    found[role][-1][number].append(piece)
        return found


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
    """The trilinear form's derivative by one role, from the tensors of the two others."""

    @staticmethod
    def forward(ctx: Any, convolution: Convolution, role: Role, *tensors: Tensor):
        ctx.convolution, ctx.role = convolution, role
        ctx.keeps = convolution.keep_spectra and any(ctx.needs_input_grad)
        given = _by_role(convolution, _others(role), tensors)
        results, spectra = convolution.run(given, [], [role], ctx.keeps)
        ctx.chunks = len(spectra)
        ctx.save_for_backward(*(_flat(spectra) if ctx.keeps else tensors))
        return tuple(results[role])

    @staticmethod
    @timed("transforms")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        convolution, others, again = ctx.convolution, _others(ctx.role), torch.is_grad_enabled()
        if ctx.keeps and again:  # only with create_graph=True
            raise ConfigError(
                "create_graph=True needs the tokens of a long convolution, but this one kept their"
                " spectra; call it with keep_spectra=False"
            )
        needed = _by_role(convolution, others, ctx.needs_input_grad[2:])
        wanted = [role for role in others if any(needed[role])]
        given: Given = {ctx.role: list(grads)}
        kept = []
        if ctx.keeps:
            kept = _nested(convolution, others, ctx.saved_tensors, ctx.chunks)
        else:
            given |= _by_role(convolution, others, ctx.saved_tensors)
        if again:
            found = {
                role: _LongConv.apply(
                    convolution, role, *[x for r in _others(role) for x in given[r]]
                )
                for role in wanted
            }
        else:
            found, _ = convolution.run(given, kept, wanted, keep=False)
        none = {role: [None] * len(convolution.product.parts[role]) for role in others}
        return None, None, *[x for role in others for x in found.get(role, none[role])]


def _others(role: Role) -> list[Role]:
    return [other for other in ROLES if other != role]


def _by_role(convolution: Convolution, roles: list[Role], values: Sequence[Any]) -> dict[Role, Any]:
    """One value for each part of each role, in order."""
    in_order = iter(values)
    return {role: [next(in_order) for _ in convolution.product.parts[role]] for role in roles}


def _flat(spectra: list[dict[Role, Parts]]) -> list[Tensor]:
    return [
        x
        for chunk in spectra
        for groups in chunk.values()
        for parts in groups
        for tensors in parts
        for x in tensors
    ]


def _nested(
    convolution: Convolution, roles: list[Role], flat: Sequence[Tensor], chunks: int
) -> list[dict[Role, Parts]]:
    tensors, product = iter(flat), convolution.product
    numbers = [len(group.frequencies.parts) for group in convolution.groups]
    return [
        {
            role: [
                [[next(tensors) for _ in product.parts[role]] for _ in range(n)] for n in numbers
            ]
            for role in roles
        }
        for _ in range(chunks)
    ]
