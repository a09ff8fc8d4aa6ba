"""Products at every frequency: where polyphase components become spectra, and back."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Complex
from torch import Tensor

from scaling.long_conv.form import Part, Role, TrilinearForm, ramp
from scaling.long_conv.rows import RowGroup
from scaling.long_conv.transform import Bins, Frequencies

CACHED = 1 << 15
"""Complex numbers of a component that a CPU works on at once: all components fit its cache."""


Block = dict[Part, Complex[Tensor, "_ _ _ _ _ _"]]
"""Some frequencies of every part: (rank, phase, channel, component, row, k)."""


def multiply(
    product: TrilinearForm,
    group: RowGroup,
    bins: Bins,
    fresh: Block,
    kept: Block,
    results: Block,
    keep: bool,
) -> None:
    """Fills the results at some of a group's frequencies, tile by tile.

    fresh and results are polyphase components, kept are spectra; `keep` turns fresh into spectra.
    """
    some = next(iter(results.values()))
    rows = max(group.count.values())
    roles = dict.fromkeys(role for role, _ in results)
    twiddle = _twiddle(group.frequencies, bins, some.dtype, some.device)
    factor = group.factor(bins, some.dtype, some.device)
    for c, k in _tiles(some, rows):
        at = (..., c, slice(None), slice(None), k)
        turn = None if twiddle is None else twiddle[..., k]
        phase = None if factor is None else factor[..., k].unsqueeze(-3)
        spectra = {part: x[at] for part, x in kept.items()}
        for part, x in fresh.items():
            spectra[part] = _enter(part[0], x[at], turn, phase)
            if keep and turn is not None:
                x[at] = spectra[part]
        goals = {part: x[at] for part, x in results.items()}
        out = {
            part: x if turn is None and x.shape[-2] == rows else _with_rows(x, rows)
            for part, x in goals.items()
        }
        for role in roles:
            product.contract(role, spectra, out)
        for part, spectrum in out.items():
            _leave(part[0], spectrum, turn, phase, goals[part])


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
    """The Fourier transform over ranks and phases.

    There are few: on a CPU a matrix product is fastest. On a GPU the same product may run in TF32,
    switched on by a container's environment or another library, and lose four of its digits.
    """
    ranks, split = x.shape[:2]
    if x.device.type != "cpu":  # split is 1
        return torch.fft.ifft(x, dim=0) if inverse else torch.fft.fft(x, dim=0)
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
    frequencies: Frequencies, bins: Bins, dtype: torch.dtype, device: torch.device
) -> Complex[Tensor, "rank phase 1 1 1 k"] | None:
    """exp(-2πi p k / T) for the first token p of every phase; None where there is one phase."""
    if len(frequencies.phases) == 1:
        return None
    phases, (first, step, count) = frequencies.phases, (bins.start, bins.step, bins.count)
    table = ramp(first, step, count, phases, frequencies.transform, dtype, device)
    return table.conj_physical().view(frequencies.ranks, frequencies.split, 1, 1, 1, count)
