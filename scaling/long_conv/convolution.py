"""Long convolutions as one trilinear form, on one process or on a cyclic shard.

The operands are transformed and exchanged together: one all-to-all brings the spectra of q and k,
one takes the result back; the same number again for the gradients. Channels go in chunks of bounded
memory, and while one chunk's exchange is under way another's transforms run.
"""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaling.long_conv.form import ROLES, Part, Role, TrilinearForm
from scaling.long_conv.products import Block, multiply
from scaling.long_conv.rows import RowGroup
from scaling.long_conv.transform import Layout, Phases, Transform
from scaling.parallel.telemetry import timed

IN_FLIGHT = 2
"""Chunks of channels under way at once."""

Tokens = Float[Tensor, "_row channel _component n_local"]


@dataclass
class Convolution:
    """What is multiplied, and where the tokens of every role lie."""

    form: TrilinearForm
    groups: list[RowGroup]
    transform: Transform
    rows: dict[Role, int]
    """Rows of each role's tensors; a static k has one for all."""
    differentiable: bool
    workspace_bytes: int

    def __call__(self, q: list[Tokens], k: list[Tokens]) -> tuple[Tokens, ...]:
        """The parts of u."""
        return _LongConv.apply(self, *q, *k)

    def run(
        self,
        tokens: dict[Part, Tokens],
        kept: list[list[Block]],
        wanted: Sequence[Role],
        keep: bool,
    ) -> tuple[dict[Part, Tokens], list[list[Block]]]:
        """The wanted roles' tensors, from tokens and, by chunk and group, spectra of the others;
        and, to be kept, the spectra of the tokens."""
        some = next(iter(tokens.values()))
        _, channels, _, n_local = some.shape
        chunks = self.chunks(channels)
        results = {}
        for role in wanted:
            new = some.new_empty if self._is_ready(role, channels, n_local) else some.new_zeros
            for number, size in enumerate(self.form.sizes[role]):
                results[role, number] = new(self.rows[role], channels, size, n_local)
        spectra: list[list[Block]] = [[] for _ in chunks]
        interleave(
            self._chunk(tokens, old, results, chunk, new if keep else None)
            for chunk, old, new in zip(chunks, kept or spectra, spectra, strict=True)
        )
        return results, spectra

    def _is_ready(self, role: Role, channels: int, n_local: int) -> bool:
        """Whether what comes back is a role's tensor already, and need not be copied into it."""
        whole = [group.is_tensor(role, self.rows[role], n_local) for group in self.groups]
        return whole == [True] and len(self.chunks(channels)) == 1

    def chunks(self, channels: int) -> list[slice]:
        """Channels that are worked on at once; the same on every rank."""
        numbers = sum(
            group.count[role] * self.form.components(role) * group.frequencies.local
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
        results: dict[Part, Tokens],
        chunk: slice,
        keep: list[Block] | None,
    ) -> Generator[None, None, None]:
        """One chunk of channels; pauses while an exchange is under way."""
        real = self.transform.dtype.to_real()
        phases = self.transform.to_phases(
            [
                group.fill(role, x[:, chunk], real)
                for group in self.groups
                for (role, _), x in tokens.items()
            ],
            self._layout(tokens, chunk),
        )
        fresh = self._by_group((yield from phases), tokens)
        if keep is not None:
            keep += fresh
        layout = self._layout(results, chunk)
        wire = self.transform.empty(layout)
        products = self._by_group(self.transform.phases(wire, layout), results)
        for number, group in enumerate(self.groups):
            old = kept[number] if kept else {}
            multiply(self.form, group, fresh[number], old, products[number], keep is not None)
        rows = self.transform.to_rows(wire, layout)
        del fresh, products, wire  # before room is made for what comes back
        back = iter((yield from rows))
        for group in self.groups:
            for (role, number), x in results.items():
                if self._is_ready(role, x.shape[1], x.shape[3]):
                    results[role, number] = next(back).to(x.dtype)
                else:
                    group.read(role, next(back), x[:, chunk])

    def _layout(self, parts: Iterable[Part], chunk: slice) -> Layout:
        channels = chunk.stop - chunk.start
        return [
            (group.frequencies, (group.count[role], channels, self.form.sizes[role][number]))
            for group in self.groups
            for role, number in parts
        ]

    def _by_group(self, phases: list[Phases], parts: Iterable[Part]) -> list[Block]:
        each = iter(phases)
        return [{part: next(each) for part in parts} for _ in self.groups]


def interleave(tasks: Iterable[Generator[None, None, None]]) -> None:
    """Runs generators in turn, IN_FLIGHT at once: where one pauses the next goes on."""
    waiting, running, end = iter(tasks), deque[Generator[None, None, None]](), object()
    while True:
        running.extendleft(islice(waiting, IN_FLIGHT - len(running)))  # what is new goes first
        if not running:
            return
        task = running.popleft()
        if next(task, end) is not end:
            running.append(task)


class _LongConv(torch.autograd.Function):
    """The trilinear form's derivative by u; backward, its derivatives by q and k."""

    @staticmethod
    def forward(ctx: Any, convolution: Convolution, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.convolution, ctx.parts = convolution, convolution.form.parts("q", "k")
        keep = convolution.differentiable and any(ctx.needs_input_grad)
        tokens = dict(zip(ctx.parts, operands, strict=True))
        results, spectra = convolution.run(tokens, [], ["u"], keep)
        ctx.save_for_backward(
            *[block[part] for chunk in spectra for block in chunk for part in ctx.parts]
        )
        return tuple(results.values())

    @staticmethod
    @once_differentiable
    @timed("transforms")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        convolution, spectra = ctx.convolution, iter(ctx.saved_tensors)
        kept = [
            [{part: next(spectra) for part in ctx.parts} for _ in convolution.groups]
            for _ in convolution.chunks(grads[0].shape[1])
        ]
        needed = dict(zip(ctx.parts, ctx.needs_input_grad[1:], strict=True))
        wanted = [role for role in ("q", "k") if any(needed[p] for p in ctx.parts if p[0] == role)]
        tokens = dict(zip(convolution.form.parts("u"), grads, strict=True))
        gradients, _ = convolution.run(tokens, kept, wanted, keep=False)
        return None, *[gradients.get(part) for part in ctx.parts]
