"""Products at every frequency: where polyphase components become spectra, and back."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from scaling.long_conv.form import ROLES, Role, TrilinearForm, ramp
from scaling.long_conv.rows import RowGroup
from scaling.long_conv.transform import Frequencies

CACHED = 1 << 15
"""Complex numbers of a component that a CPU works on at once: all components fit its cache."""


def multiply(
    product: TrilinearForm,
    group: RowGroup,
    number: int,
    fresh: dict[Role, list[Tensor]],
    kept: dict[Role, list[Tensor]],
    results: dict[Role, list[Tensor]],
    keep: bool,
) -> None:
    """Fills the results of one part of a group's frequencies, tile by tile.

    Tensors are (rank, phase, channel, component, row, k), a role's parts one behind the other.
    fresh and results are polyphase components, kept are spectra; `keep` turns fresh into spectra.
    """
    some = next(iter(results.values()))[0]
    rows = max(group.rows(role) for role in ROLES)
    twiddle = _twiddle(group.frequencies, number, some.dtype, some.device)
    factor = group.factor(group.frequencies.parts[number], some.dtype, some.device)
    for c, k in _tiles(some, rows):
        at = (..., c, slice(None), slice(None), k)
        turn = None if twiddle is None else twiddle[..., k]
        phase = None if factor is None else factor[..., k].unsqueeze(-3)
        spectra = {role: [x[at] for x in tensors] for role, tensors in kept.items()}
        for role, tensors in fresh.items():
            spectra[role] = [_enter(role, x[at], turn, phase) for x in tensors]
            if keep and turn is not None:
                for x, spectrum in zip(tensors, spectra[role], strict=True):
                    x[at] = spectrum
        for role, tensors in results.items():
            goals = [x[at] for x in tensors]
            in_place = turn is None and group.rows(role) == rows
            out = goals if in_place else [_with_rows(goal, rows) for goal in goals]
            x, y = (spectra[other] for other in ROLES if other != role)
            product.contract(role, x, y, out)
            for goal, spectrum in zip(goals, out, strict=True):
                _leave(role, spectrum, turn, phase, goal)


def _enter(role: Role, x: Tensor, turn: Tensor | None, phase: Tensor | None) -> Tensor:
    spectrum = x if turn is None else _over_phases(x * turn)
    if role == "u":
        spectrum.conj_physical_()
        if phase is not None:
            spectrum.mul_(phase)
    return spectrum


def _leave(
    role: Role, spectrum: Tensor, turn: Tensor | None, phase: Tensor | None, goal: Tensor
) -> None:
    if role != "u":
        spectrum.conj_physical_()
    elif phase is not None:
        spectrum.mul_(phase)
    if spectrum is goal:
        return
    if spectrum.shape[-2] > goal.shape[-2]:  # a static k is shared by the rows
        spectrum = spectrum.sum(-2, keepdim=True)
    if turn is None:
        goal.copy_(spectrum)
    else:
        torch.mul(_over_phases(spectrum, inverse=True), turn.conj_physical(), out=goal)


def _with_rows(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-2], rows, x.shape[-1])


def _tiles(x: Tensor, rows: int) -> Iterator[tuple[slice, slice]]:
    """Channels and frequencies that are worked on at once: on a CPU what its cache holds."""
    ranks, split, channels, _, _, frequencies = x.shape
    phases = ranks * split
    most = CACHED if x.device.type == "cpu" else phases * channels * rows * frequencies
    width = max(1, min(frequencies, most // (phases * rows)))
    depth = max(1, most // (phases * rows * width))
    for c in range(0, channels, depth):
        for k in range(0, frequencies, width):
            yield slice(c, c + depth), slice(k, k + width)


def _over_phases(x: Tensor, inverse: bool = False) -> Tensor:
    """The Fourier transform over ranks and phases: few, so a matrix product is fastest."""
    ranks, split = x.shape[:2]
    matrix = _fourier_matrix(ranks, split, inverse, x.dtype, x.device)
    return (matrix @ x.reshape(ranks * split, -1)).view(x.shape)


@lru_cache
def _fourier_matrix(
    ranks: int, split: int, inverse: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    phases = Frequencies(1, 0, ranks, split).phases
    matrix = ramp(0, 1, len(phases), phases, len(phases), dtype, device)  # (phase, frequency)
    return matrix / len(phases) if inverse else matrix.T.conj_physical().contiguous()


@lru_cache(maxsize=8)
def _twiddle(
    frequencies: Frequencies, number: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """exp(-2πi p k / T) for the first token p of every phase: (rank, phase, 1, 1, 1, k); None
    where there is one phase."""
    if len(frequencies.phases) == 1:
        return None
    part, phases = frequencies.parts[number], frequencies.phases
    table = ramp(part.start, part.step, part.count, phases, frequencies.transform, dtype, device)
    return table.conj_physical().view(frequencies.ranks, frequencies.split, 1, 1, 1, part.count)
