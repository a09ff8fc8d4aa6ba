"""Long convolutions as one trilinear form, on one process or on a cyclic shard.

The operands' streams are transformed and exchanged together: one all-to-all brings the spectra of
q and k, one takes the result back; the same number again for the gradients. Channels go in chunks
of bounded memory, and while one chunk's exchange is under way another's transforms run.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from scaling.algebra.spectra import ROLES, Product, Role, ramp
from scaling.parallel.rows import RowGroup
from scaling.parallel.transform import Frequencies, Spectra, Transform

CACHED = 1 << 15
"""Complex numbers of a component that a CPU works on at once: all components fit its cache."""
IN_FLIGHT = 2
"""Chunks of channels under way at once."""

Parts = list[list[Tensor]]
"""One role's frequencies by group and part: (phase, channel, component, row, k)."""
Given = dict[Role, list[Tensor]]
"""Tensors of each role: (row, channel, component, n_local)."""


@dataclass
class Convolution:
    """What is multiplied, and where the tokens of every role lie."""

    product: Product
    groups: list[RowGroup]
    transform: Transform
    rows: dict[Role, int]
    """Rows of each role's tensors; a static k has one for all."""
    keep_spectra: bool
    workspace_bytes: int

    def __call__(self, q: list[Tensor], k: list[Tensor]) -> tuple[Tensor, ...]:
        """The parts of u."""
        return _LongConv.apply(self, "u", *q, *k)

    def run(
        self, given: Given, kept: list[dict[Role, Parts]], wanted: Sequence[Role], keep: bool
    ) -> tuple[Given, list[dict[Role, Parts]]]:
        """The wanted roles' tensors, from tokens (given) and spectra (kept, by chunk) of the rest;
        and, to be kept, the spectra of what was given."""
        some = next(iter(given.values()))[0]
        _, channels, _, tokens = some.shape
        new = some.new_empty if all(group.complete for group in self.groups) else some.new_zeros
        results = {
            role: [
                new(self.rows[role], channels, components, tokens)
                for components in self.product.parts[role]
            ]
            for role in wanted
        }
        chunks = self._chunks(channels)
        found: list[dict[Role, Parts]] = [{} for _ in chunks]
        interleave(
            self._chunk(_part(given, chunk), old, _part(results, chunk), new if keep else None)
            for chunk, old, new in zip(chunks, kept or found, found, strict=True)
        )
        return results, found

    def _chunks(self, channels: int) -> list[slice]:
        """Channels that are worked on at once; the same on every rank."""
        numbers = sum(
            group.rows(role) * self.product.components(role) * group.frequencies.local
            for group in self.groups
            for role in ROLES
        )
        one = 4 * numbers * self.transform.dtype.itemsize // 2  # tokens, spectra, sent, received
        size = max(1, self.workspace_bytes // (IN_FLIGHT * max(one, 1)))
        return [slice(c, min(c + size, channels)) for c in range(0, channels, size)]

    def _chunk(
        self, given: Given, kept: dict[Role, Parts], results: Given, found: dict[Role, Parts] | None
    ) -> Generator[None, None, None]:
        """One chunk of channels; pauses while an exchange is under way."""
        channels = next(iter(given.values()))[0].shape[1]
        streams = self._streams(given, channels)
        pending = self.transform.start(self._fill(given, channels))
        yield
        fresh = self._by_role(self.transform.finish(pending, streams), given, channels)
        if found is not None:
            found.update(fresh)
        streams = self._streams(results, channels)
        product = self.transform.empty(streams)
        self._multiply(fresh, kept, self._by_role(product, results, channels), found is not None)
        del fresh
        pending = self.transform.start_back(product, streams)
        del product
        yield
        self._read(self.transform.finish_back(pending, streams), results, channels)

    def _streams(self, roles: Iterable[Role], channels: int) -> list[int]:
        """Streams of each group."""
        return [
            sum(channels * self.product.components(role) * group.rows(role) for role in roles)
            for group in self.groups
        ]

    def _split(
        self, x: Tensor, roles: Iterable[Role], group: RowGroup, channels: int
    ) -> dict[Role, Tensor]:
        """Streams, the axis before the last, by role: (..., channel, component, row, *)."""
        shapes = {
            role: (channels, self.product.components(role), group.rows(role)) for role in roles
        }
        pieces = x.split([c * d * r for c, d, r in shapes.values()], -2)
        return {
            role: piece.unflatten(-2, shape)
            for (role, shape), piece in zip(shapes.items(), pieces, strict=True)
        }

    def _fill(self, given: Given, channels: int) -> list[Tensor]:
        buffers = []
        for group, streams in zip(self.groups, self._streams(given, channels), strict=True):
            buffer = self.transform.tokens(streams, group.frequencies)
            for role, rows in self._split(buffer, given, group, channels).items():
                pieces = rows.split(self.product.parts[role], 1)
                for tensor, piece in zip(given[role], pieces, strict=True):
                    group.fill(role, tensor, piece)
            buffers.append(buffer)
        return buffers

    def _read(self, buffers: list[Tensor], results: Given, channels: int) -> None:
        for group, buffer in zip(self.groups, buffers, strict=True):
            for role, rows in self._split(buffer, results, group, channels).items():
                pieces = rows.split(self.product.parts[role], 1)
                for tensor, piece in zip(results[role], pieces, strict=True):
                    group.read(role, piece, tensor)

    def _by_role(self, spectra: Spectra, roles: Iterable[Role], channels: int) -> dict[Role, Parts]:
        split = [
            [self._split(part, roles, group, channels) for part in parts]
            for group, parts in zip(self.groups, spectra.parts, strict=True)
        ]
        return {role: [[part[role] for part in parts] for parts in split] for role in roles}

    def _multiply(
        self,
        fresh: dict[Role, Parts],
        kept: dict[Role, Parts],
        results: dict[Role, Parts],
        keep: bool,
    ) -> None:
        """From polyphase components (fresh) and spectra (kept) to polyphase components."""
        for g, group in enumerate(self.groups):
            for p in range(len(group.frequencies.parts)):
                part = [
                    {role: parts[g][p] for role, parts in some.items()}
                    for some in (fresh, kept, results)
                ]
                _multiply_part(self.product, group, p, part[0], part[1], part[2], keep)


def _multiply_part(
    product: Product,
    group: RowGroup,
    number: int,
    fresh: dict[Role, Tensor],
    kept: dict[Role, Tensor],
    results: dict[Role, Tensor],
    keep: bool,
) -> None:
    """One part of one group's frequencies, tile by tile."""
    some = next(iter(results.values()))
    rows = max(group.rows(role) for role in ROLES)
    twiddle = _twiddle(group.frequencies, number, some.dtype, some.device)
    factor = group.factor(group.frequencies.parts[number], some.dtype, some.device)
    for c, k in _tiles(some, rows):
        at = (slice(None), c, slice(None), slice(None), k)
        turn = None if twiddle is None else twiddle[..., k]
        phase = None if factor is None else factor[..., k].unsqueeze(2)
        spectra = {role: x[at] for role, x in kept.items()}
        for role, x in fresh.items():
            spectrum = x[at] if turn is None else _over_phases(x[at] * turn)
            if role == "u":
                _multiply_by(spectrum.conj_physical_(), phase)
            if keep and turn is not None:
                x[at] = spectrum
            spectra[role] = spectrum
        for role, result in results.items():
            goal = result[at]
            in_place = turn is None and group.rows(role) == rows
            out = goal if in_place else goal.new_empty(*goal.shape[:3], rows, goal.shape[4])
            x, y = (spectra[other] for other in _others(role))
            product.contract(role, x, y, out)
            if role == "u":
                _multiply_by(out, phase)
            else:
                out.conj_physical_()
            if group.rows(role) < rows:
                out = out.sum(3, keepdim=True)
            if turn is not None:
                torch.mul(_over_phases(out, inverse=True), turn.conj_physical(), out=goal)
            elif not in_place:
                goal.copy_(out)


def _multiply_by(x: Tensor, phase: Tensor | None) -> None:
    if phase is not None:
        x.mul_(phase)


def _tiles(x: Tensor, rows: int) -> Iterator[tuple[slice, slice]]:
    """Channels and frequencies that are worked on at once: on a CPU what its cache holds."""
    phases, channels, _, _, frequencies = x.shape
    most = CACHED if x.device.type == "cpu" else phases * channels * rows * frequencies
    width = max(1, min(frequencies, most // (phases * rows)))
    depth = max(1, most // (phases * rows * width))
    for c in range(0, channels, depth):
        for k in range(0, frequencies, width):
            yield slice(c, c + depth), slice(k, k + width)


def _over_phases(x: Tensor, inverse: bool = False) -> Tensor:
    """The Fourier transform over the first axis: few phases, so a matrix product is fastest."""
    matrix = _fourier_matrix(len(x), inverse, x.dtype, x.device)
    return (matrix @ x.reshape(len(x), -1)).view(x.shape)


@lru_cache
def _fourier_matrix(size: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = ramp(0, 1, size, range(size), size, dtype, device)
    return matrix / size if inverse else matrix.conj_physical()


@lru_cache(maxsize=8)
def _twiddle(
    frequencies: Frequencies, number: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """exp(-2πi r k / T) for every phase r: (phase, 1, 1, 1, k); None on one rank."""
    if frequencies.ranks == 1:
        return None
    part = frequencies.parts[number]
    turns = range(frequencies.ranks)
    table = ramp(part.start, part.step, part.count, turns, frequencies.transform, dtype, device)
    return table.conj_physical()[:, None, None, None]


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


def _part(tensors: Given, channels: slice) -> Given:
    return {role: [x[:, channels] for x in parts] for role, parts in tensors.items()}


class _LongConv(torch.autograd.Function):
    """The trilinear form's derivative by one role, from the tensors of the two others."""

    @staticmethod
    def forward(ctx: Any, convolution: Convolution, role: Role, *tensors: Tensor):
        ctx.convolution, ctx.role = convolution, role
        ctx.keeps = convolution.keep_spectra and any(ctx.needs_input_grad)
        given = _by_role(convolution, _others(role), tensors)
        results, spectra = convolution.run(given, [], [role], ctx.keeps)
        ctx.save_for_backward(*(_flat(spectra) if ctx.keeps else tensors))
        return tuple(results[role])

    @staticmethod
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
            kept = _nested(convolution, others, ctx.saved_tensors)
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
    return [x for chunk in spectra for parts in chunk.values() for part in parts for x in part]


def _nested(
    convolution: Convolution, roles: list[Role], flat: Sequence[Tensor]
) -> list[dict[Role, Parts]]:
    tensors, groups = iter(flat), [group.frequencies.parts for group in convolution.groups]
    chunk = len(roles) * sum(map(len, groups))
    return [
        {role: [[next(tensors) for _ in parts] for parts in groups] for role in roles}
        for _ in range(len(flat) // chunk)
    ]
