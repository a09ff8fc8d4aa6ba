"""Products at every frequency: where polyphase components become spectra, and back."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from scaling.algebra.spectra import ROLES, Product, Role, ramp
from scaling.parallel.rows import RowGroup
from scaling.parallel.transform import Frequencies

CACHED = 1 << 15
"""Complex numbers of a component that a CPU works on at once: all components fit its cache."""


def multiply(
    product: Product,
    group: RowGroup,
    number: int,
    fresh: dict[Role, list[Tensor]],
    kept: dict[Role, list[Tensor]],
    results: dict[Role, list[Tensor]],
    keep: bool,
) -> None:
    """Fills the results of one part of a group's frequencies, tile by tile.

    Tensors are (phase, channel, component, row, k), a role's components one behind the other.
    fresh and results are polyphase components, kept are spectra; `keep` turns fresh into spectra.
    """
    some = next(iter(results.values()))[0]
    rows = max(group.rows(role) for role in ROLES)
    twiddle = _twiddle(group.frequencies, number, some.dtype, some.device)
    factor = group.factor(group.frequencies.parts[number], some.dtype, some.device)
    for c, k in _tiles(some, rows):
        at = (slice(None), c, slice(None), slice(None), k)
        turn = None if twiddle is None else twiddle[..., k]
        phase = None if factor is None else factor[..., k].unsqueeze(2)
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
    if spectrum.shape[3] > goal.shape[3]:  # a static k is shared by the rows
        spectrum = spectrum.sum(3, keepdim=True)
    if turn is None:
        goal.copy_(spectrum)
    else:
        torch.mul(_over_phases(spectrum, inverse=True), turn.conj_physical(), out=goal)


def _with_rows(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:3], rows, x.shape[4])


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
