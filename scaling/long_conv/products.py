"""Products at every frequency: where polyphase components become spectra, and back."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Complex
from torch import Tensor

from scaling.execution import kind_of
from scaling.long_conv.form import Part, Role, TrilinearForm, ramp
from scaling.long_conv.rows import RowGroup
from scaling.long_conv.transform import Frequencies, Phases

CACHED = 1 << 15
"""Complex numbers of a component that a CPU works on at once: all components fit its cache."""


Block = dict[Part, Phases]
"""This rank's frequencies of every part of one group."""


def multiply(
    form: TrilinearForm, group: RowGroup, fresh: Block, kept: Block, results: Block, keep: bool
) -> None:
    """Fills the results at a group's frequencies, tile by tile.

    fresh and results are polyphase components, kept are spectra; `keep` turns fresh into spectra.
    """
    some = next(iter(results.values()))
    rows = max(group.count.values())
    roles = dict.fromkeys(role for role, _ in results)
    twiddle = _twiddle(group.frequencies, some.dtype, some.device)
    factor = group.factor(some.dtype, some.device)
    for c, k in _tiles(some, rows):
        at = (..., c, slice(None), k)
        turn = None if twiddle is None else twiddle[..., k]
        phase = None if factor is None else factor[:, :, None, None, k]
        spectra = {part: x[at] for part, x in kept.items()}
        for part, x in fresh.items():
            spectra[part] = _enter(part[0], x[at], turn, phase)
            if keep and turn is not None:
                x[at] = spectra[part]
        goals = {part: x[at] for part, x in results.items()}
        out = {
            part: x if turn is None and x.shape[1] == rows else _with_rows(x, rows)
            for part, x in goals.items()
        }
        for role in roles:
            form.contract(role, spectra, out)
        for part, spectrum in out.items():
            _leave(part[0], spectrum, turn, phase, goals[part])


def _enter(role: Role, x: Phases, turn: Tensor | None, phase: Tensor | None) -> Phases:
    spectrum = x if turn is None else _over_ranks(x * turn)
    if role == "u":
        spectrum.conj_physical_()
        if phase is not None:
            spectrum.mul_(phase)
    return spectrum


def _leave(
    role: Role, spectrum: Phases, turn: Tensor | None, phase: Tensor | None, goal: Phases
) -> None:
    if role != "u":
        spectrum.conj_physical_()
    elif phase is not None:
        spectrum.mul_(phase)
    if spectrum is goal:
        return
    if spectrum.shape[1] > goal.shape[1]:  # a static k is shared by the rows
        spectrum = spectrum.sum(1, keepdim=True)
    if turn is None:
        goal.copy_(spectrum)
    else:
        torch.mul(_over_ranks(spectrum, inverse=True), turn.conj_physical(), out=goal)


def _with_rows(x: Phases, rows: int) -> Phases:
    return x.new_empty(x.shape[0], rows, *x.shape[2:])


def _tiles(x: Phases, rows: int) -> Iterator[tuple[slice, slice]]:
    """Channels and frequencies that are worked on at once: on a CPU what its cache holds."""
    ranks, _, channels, _, frequencies = x.shape
    most = CACHED if kind_of(x.device.type) == "cpu" else ranks * rows * channels * frequencies
    width = max(1, min(frequencies, most // (ranks * rows)))
    depth = max(1, most // (ranks * rows * width))
    for c in range(0, channels, depth):
        for k in range(0, frequencies, width):
            yield slice(c, c + depth), slice(k, k + width)


def _over_ranks(x: Phases, inverse: bool = False) -> Phases:
    """The Fourier transform over the ranks.

    There are few: on a CPU a matrix product is fastest. On a GPU the same product may run in TF32,
    switched on by a container's environment or another library, and lose four of its digits.
    """
    if kind_of(x.device.type) != "cpu":
        return torch.fft.ifft(x, dim=0) if inverse else torch.fft.fft(x, dim=0)
    matrix = _fourier_matrix(len(x), inverse, x.dtype, x.device)
    return (matrix @ x.flatten(1)).view(x.shape)


@lru_cache
def _fourier_matrix(
    ranks: int, inverse: bool, dtype: torch.dtype, device: torch.device
) -> Complex[Tensor, "frequency rank"]:
    matrix = ramp(range(ranks), range(ranks), ranks, dtype, device)
    return matrix / ranks if inverse else matrix.conj_physical()


@lru_cache(maxsize=8)
def _twiddle(
    frequencies: Frequencies, dtype: torch.dtype, device: torch.device
) -> Complex[Tensor, "rank 1 1 1 k"] | None:
    """exp(-2πi r k / T) for the first token r of every rank; None where there is one rank."""
    if frequencies.ranks == 1:
        return None
    ranks = range(frequencies.ranks)
    table = ramp(frequencies.bins, ranks, frequencies.transform, dtype, device)
    return table.conj_physical()[:, None, None, None]
