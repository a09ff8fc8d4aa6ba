"""A protein backbone as a cartoon: ribbons for helices and strands, a tube for the rest.

The curve is a cubic B-spline of the CA atoms and the ribbon lies in the peptide planes (Carson,
J. Mol. Graphics 5, 103, 1987); helices and strands are where DSSP's hydrogen bonds are (Kabsch and
Sander, Biopolymers 22, 2577, 1983).
"""

import numpy as np
from matplotlib import colormaps

_STEPS = 8
"""Pieces of the curve for each residue."""
_TUBE, _HELIX, _STRAND, _ARROW = 0.7, 2.6, 2.4, 4.4
"""Widths in Å; an arrow's is at its base."""
_OUTLINE, _BEHIND = 0.12, 0.5
"""Å by which the outline is wider, and lies behind."""
_BOND_ENERGY = -0.5
"""kcal/mol below which DSSP calls it a hydrogen bond."""


def quads(
    xyz: np.ndarray, segment: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The cartoon as seen along the chain's shortest axis, in the order of painting.

    Args:
        xyz: (length, 4, 3) N, CA, C, O in Å; residues that lack one are gaps.
        segment: (length,) unbroken stretch of each residue.

    Returns:
        Corners (polygons, 4, 2) in Å, colours (polygons, 3), and where the first and last residue
        are. Behind each piece of ribbon lies a darker, wider one: the outline.
    """
    whole = np.isfinite(xyz).all((1, 2))
    place = np.flatnonzero(whole)
    xyz = _turned(xyz[whole].astype(np.float64))
    kind = secondary_structure(xyz)
    # A gap, or another stretch, begins a new ribbon.
    new = (np.diff(place) > 1) | (np.diff(segment[whole]) != 0)
    corners, shades, shares = [], [], []
    for run in np.split(np.arange(len(xyz)), np.flatnonzero(new) + 1):
        if len(run) > 1:
            quad, normal = _ribbon(xyz[run], kind[run])
            corners.append(quad)
            shades.append(normal)
            steps = np.linspace(run[0], run[-1], len(quad)) / max(len(xyz) - 1, 1)
            shares.append(steps)
    quad, normal = np.concatenate(corners), np.concatenate(shades)
    depth = quad[..., 2].mean(1)
    color = _shaded(np.concatenate(shares), depth, normal)
    middle = (quad + quad[:, [1, 0, 3, 2]]) / 2
    outward = quad - middle
    size = np.linalg.norm(outward, axis=-1, keepdims=True).clip(1e-6)
    outline = middle + outward * (1 + _OUTLINE / size)
    quad, color = np.concatenate([outline, quad]), np.concatenate([0.45 * color, color])
    order = np.argsort(np.concatenate([depth - _BEHIND, depth]), kind="stable")
    return quad[order, :, :2], color[order], (xyz[0, 1, :2], xyz[-1, 1, :2])


def secondary_structure(xyz: np.ndarray) -> np.ndarray:
    """1 in an alpha helix, 2 in a strand, else 0, for each residue of (length, 4, 3)."""
    length = len(xyz)
    kind = np.zeros(length, int)
    if length < 6:
        return kind
    n, _, c, o = xyz.swapaxes(0, 1)
    to_hydrogen = c[:-1] - o[:-1]
    hydrogen = n.copy()
    hydrogen[1:] += 1.01 * to_hydrogen / np.linalg.norm(to_hydrogen, axis=1, keepdims=True)

    def closeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return 1 / np.linalg.norm(a[:, None] - b[None], axis=-1).clip(0.5)

    energy: np.ndarray = 27.9 * (closeness(n, o) + closeness(hydrogen, c) - closeness(hydrogen, o)
                     - closeness(n, c))  # fmt: skip
    apart = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    bond = np.logical_and(energy < _BOND_ENERGY, apart > 1)  # [i, j]: NH of i to CO of j
    bond[0] = False
    turn = np.diagonal(bond, -4)  # CO of i to NH of i + 4
    for i in np.flatnonzero(turn[1:] & turn[:-1]) + 1:
        kind[i : i + 4] = 1
    middle = slice(1, -1)
    before, after = slice(0, -2), slice(2, None)
    parallel = bond[middle, before] & bond[after, middle].T
    parallel |= parallel.T
    opposite = (bond[middle, middle] & bond[middle, middle].T) | (
        bond[after, before] & bond[after, before].T
    )
    bridge = np.zeros((length, length), bool)
    bridge[middle, middle] = (parallel | opposite) & (apart[middle, middle] > 2)
    strand = np.logical_or.reduce(bridge, axis=1)
    strand[1:-1] |= strand[:-2] & strand[2:]  # a bulge
    strand &= kind == 0
    # One bridge, or two, are no strand to draw.
    for run in np.split(np.arange(length), np.flatnonzero(np.diff(strand)) + 1):
        if strand[run[0]] and len(run) > 2:
            kind[run] = 2
    return kind


def _turned(xyz: np.ndarray) -> np.ndarray:
    """Centred, the longest axis across, the shortest towards the viewer; never mirrored."""
    xyz = xyz - xyz[:, 1].mean(0)
    axes = np.linalg.svd(xyz[:, 1], full_matrices=False)[2]
    axes[2] *= np.linalg.det(axes)
    return xyz @ axes.T


def _ribbon(xyz: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quads (n, 4, 3) and their unit normals (n, 3) of one unbroken stretch."""
    ca, c, o = xyz[:, 1], xyz[:, 2], xyz[:, 3]
    side = o - c
    along = np.gradient(ca, axis=0)
    side -= along * ((side * along).sum(1) / (along**2).sum(1))[:, None]
    side /= np.linalg.norm(side, axis=1, keepdims=True).clip(1e-6)
    for i in range(1, len(side)):  # carbonyls of a strand point up and down in turn
        if side[i] @ side[i - 1] < 0:
            side[i] = -side[i]
    centre, across = _spline(ca), _spline(side)
    tangent = np.gradient(centre, axis=0)
    across -= tangent * ((across * tangent).sum(1) / (tangent**2).sum(1).clip(1e-9))[:, None]
    across /= np.linalg.norm(across, axis=1, keepdims=True).clip(1e-6)
    # A tube is a ribbon that always faces the viewer.
    facing = np.stack([-tangent[:, 1], tangent[:, 0], np.zeros(len(tangent))], 1)
    facing /= np.linalg.norm(facing, axis=1, keepdims=True).clip(1e-6)
    width, flat = _widths(kind)
    left = np.where(flat[:, None], across, facing)
    normal = np.cross(tangent, left)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-6)
    edge = 0.5 * width[:, None] * left
    # Ribbon and tube do not share an edge: each piece is drawn by its first point's kind.
    following = 0.5 * width[1:, None] * np.where(flat[:-1, None], across[1:], facing[1:])
    quad = np.stack([centre[:-1] - edge[:-1], centre[:-1] + edge[:-1],
                     centre[1:] + following, centre[1:] - following], 1)  # fmt: skip
    return quad, np.where(flat[:-1, None], normal[:-1], [0.0, 0.0, 0.8])


def _widths(kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Å at each point of the curve, and where it is a ribbon."""
    count = (len(kind) - 1) * _STEPS + 1
    own = kind[np.minimum((np.arange(count) + _STEPS // 2) // _STEPS, len(kind) - 1)]
    width = np.choose(own, [_TUBE, _HELIX, _STRAND])
    ends = np.flatnonzero((own[:-1] == 2) & (own[1:] != 2))
    for end in ends:
        first = max(end - int(1.5 * _STEPS), 0)
        width[first : end + 1] = np.linspace(_ARROW, _TUBE, end + 1 - first)
    return width, own > 0


def _spline(points: np.ndarray) -> np.ndarray:
    """Uniform cubic B-spline, _STEPS pieces a point, from the first to the last."""
    first, last = 2 * points[:1] - points[1:2], 2 * points[-1:] - points[-2:-1]
    p = np.concatenate([first, points, last])
    t = (np.arange(_STEPS) / _STEPS)[:, None, None]
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    windows = (p[:-3], p[1:-2], p[2:-1], p[3:])
    pieces = sum(w * x for w, x in zip(weights, windows, strict=True)) / 6
    return np.concatenate([np.asarray(pieces).swapaxes(0, 1).reshape(-1, 3), points[-1:]])


def _shaded(share: np.ndarray, depth: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Blue to red along the chain, darker where turned from the light, paler where far away."""
    color = colormaps["turbo"](0.06 + 0.86 * share)[:, :3]
    light = np.array([0.35, 0.45, 0.82])
    facing = normal * np.where(normal[:, 2:] < 0, -1, 1)
    bright = 0.55 + 0.45 * (facing @ light).clip(0)
    span = max(float(np.ptp(depth)), 1e-6)
    haze = 0.45 * (depth.max() - depth)[:, None] / span
    return (color * bright[:, None] * (1 - haze) + haze).clip(0, 1)
