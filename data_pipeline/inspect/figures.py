"""Figures of what a store holds."""

from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

COLORS = {"train": "#4c72b0", "validation": "#dd8452", "test": "#55a868"}
_DENSITY = LinearSegmentedColormap.from_list("density", ["white", "#9ecae1", "#2171b5", "#08306b"])
_ENCLOSED = 0.98
"""Share of the residues inside the contour of a Ramachandran plot."""
_CELL, _BLUR = 2, 4.0
"""Degrees: a cell of the density, and the standard deviation that smooths 20,000 residues."""


def draw_lengths(lengths: dict[str, np.ndarray], title: str) -> Figure:
    """Histogram of sample lengths on a logarithmic axis, the splits on top of each other."""
    figure, axes = _figure(7.0, 4.0, title)
    every = np.concatenate(list(lengths.values()))
    low, high = every.min(), every.max() + 1
    bins = np.geomspace(low, max(high, 1.1 * low), min(40, max(len(every) // 3, 8)) + 1)
    labels = [f"{split}: {len(here):,}" for split, here in lengths.items()]
    colors = [COLORS[split] for split in lengths]
    axes.hist(list(lengths.values()), bins, stacked=True, label=labels, color=colors,
              edgecolor="white", linewidth=0.5)  # fmt: skip
    median = float(np.median(every))
    axes.axvline(median, color="0.2", linestyle="--", linewidth=1, label=f"median: {median:,.0f}")
    axes.set_xscale("log")
    ticks = [t for d in range(7) for t in (10**d, 2 * 10**d, 5 * 10**d) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="residues or tokens in a sample", ylabel="samples")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def draw_ramachandran(angles: dict[str, np.ndarray], title: str) -> Figure:
    """Density of (phi, psi) for each kind of residue; dots lie outside the contour."""
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    figure.suptitle(title)
    for axes, (kind, here) in zip(figure.subplots(2, 2).flat, angles.items(), strict=True):
        if len(here):
            _density(axes, here)
        ticks = range(-180, 181, 60)
        axes.set(title=f"{kind}: {len(here):,}", xlim=(-180, 180), ylim=(-180, 180), aspect="equal",
                 xticks=ticks, yticks=ticks, xlabel="φ, degrees", ylabel="ψ, degrees")  # fmt: skip
        axes.axhline(0, color="0.7", linewidth=0.6, zorder=1.5)
        axes.axvline(0, color="0.7", linewidth=0.6, zorder=1.5)
    return figure


def _density(axes: Any, angles: np.ndarray) -> None:
    count = 360 // _CELL
    edges = np.linspace(-180, 180, count + 1)
    histogram = np.histogram2d(*angles.T, bins=[edges, edges])[0]
    # Angles wrap around, and so does a Gaussian by Fourier transform.
    frequency = np.fft.fftfreq(count)
    blur = _BLUR * max(20_000 / len(angles), 1) ** (1 / 6)  # Scott's rule in two dimensions
    falloff = np.exp(-2 * (np.pi * blur / _CELL * frequency) ** 2)
    smooth = np.fft.ifft2(np.fft.fft2(histogram) * falloff[:, None] * falloff).real.clip(0)
    centres = (edges[1:] + edges[:-1]) / 2
    axes.pcolormesh(edges, edges, smooth.T, cmap=_DENSITY, norm=PowerNorm(0.4), rasterized=True)
    cells = (((angles + 180) // _CELL).astype(int)) % count
    own = smooth[cells[:, 0], cells[:, 1]]
    level = np.quantile(own, 1 - _ENCLOSED)
    if 0 < level < smooth.max():
        axes.contour(centres, centres, smooth.T, [level], colors="#08306b", linewidths=0.8)
    outside = angles[own < level]
    axes.plot(*outside.T, ".", color="#c0392b", markersize=2.5, alpha=0.6, markeredgewidth=0)


def draw_path(points: np.ndarray, segment: np.ndarray, unit: str, title: str) -> Figure:
    """Points (length, 3) in their order, violet to yellow, seen along their shortest axis."""
    figure, axes = _figure(7.0, 7.0, title)
    seen = np.isfinite(points).all(1)
    points, segment = points[seen].astype(np.float64), segment[seen]
    points = points - points.mean(0)
    turn = np.linalg.svd(points, full_matrices=False)[2]
    turn[2] *= np.linalg.det(turn)  # never mirrored
    flat = (points @ turn.T)[:, :2]
    unbroken = segment[1:] == segment[:-1]
    lines, order = np.stack([flat[:-1], flat[1:]], 1)[unbroken], np.flatnonzero(unbroken)
    axes.add_collection(LineCollection(list(lines), array=order, linewidths=1.2, cmap="viridis"))
    axes.scatter(*flat.T, c=np.arange(len(flat)), s=8, zorder=2)
    _frame(axes, flat, unit)
    return figure


def _figure(width: float, height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _frame(axes: Any, points: np.ndarray, unit: str) -> None:
    """No axes but a bar of a round length."""
    low, high = points.min(0), points.max(0)
    margin = 0.06 * float((high - low).max()) + 1e-9
    axes.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - 2 * margin, high[1] + margin))
    axes.set_aspect("equal")
    axes.set_axis_off()
    bar = 10 ** np.floor(np.log10(max(float(high[0] - low[0]), 1e-9) / 2))
    x, y = low[0], low[1] - 1.2 * margin
    axes.plot([x, x + bar], [y, y], color="0.2", linewidth=2, solid_capstyle="butt")
    axes.text(x + bar / 2, y - 0.15 * margin, f"{bar:g} {unit}".strip(), ha="center", va="top")
