"""What a store holds, in numbers and figures: lengths, the Ramachandran plot, one backbone."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chains import ATOMS, SPLITS
from data_pipeline.counter_rng import hash64, permuted
from data_pipeline.errors import StoreError
from data_pipeline.store.reader import Store

MOST_RESIDUES = 200_000
"""Residues that the Ramachandran plot shows."""
LONGEST_DRAWN = 400
"""Residues of a backbone that is still to be seen in a figure."""


def inspect(path: str | Path, folder: Path) -> tuple[dict[str, Any], str]:
    """Draws PNGs into `folder`; the store's manifest and further lines about it.

    Raises:
        StoreError: see Store; or the folder cannot be written.
    """
    from data_pipeline.inspect import figures

    store = Store(path)
    lengths = {split: store.lengths[store.chains(split)] for split in SPLITS}
    backbones = store.atoms == ATOMS
    name, kind = Path(path).name, store.manifest["source"]["kind"]
    title = name if kind in name else f"{name} ({kind})"
    drawn = {"lengths.png": figures.draw_lengths(lengths, title)}
    if backbones:
        angles, count = sampled_torsions(store)
        drawn["ramachandran.png"] = figures.draw_ramachandran(angles, f"{title}, {count}")
    chain = most_drawable(store)
    xyz = store.read("xyz", chain, 0, int(store.lengths[chain]))
    segment = store.read("segment", chain, 0, int(store.lengths[chain]))
    name = f"{store.name(chain)}, {len(xyz)} {'residues' if backbones else 'tokens'}"
    atom, unit = (ATOMS.index("CA"), "Å") if backbones else (0, "")
    drawn["backbone.png"] = figures.draw_path(xyz[:, atom], segment, unit, f"{title}: {name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, figure in drawn.items():
            figure.savefig(folder / file, dpi=150)
    except OSError as error:
        raise StoreError(
            f"cannot write figures={folder}: {error.strerror}; choose another folder"
        ) from error
    return store.manifest, _lines(store, lengths, [folder / file for file in drawn])


def _lines(store: Store, lengths: dict[str, np.ndarray], files: list[Path]) -> str:
    lines = ["", "", f"  {'lengths':<12}{'min':>8}{'median':>10}{'mean':>12}{'max':>10}"]
    for split, here in lengths.items():
        if len(here):
            low, high = here.min(), here.max()
            lines.append(
                f"  {split:<12}{low:>8,}{np.median(here):>10,.0f}{here.mean():>12,.1f}{high:>10,}"
            )
    shapes = [f"xyz ({len(store.atoms)}, 3)"]
    shapes += [f"{name} {kind} {shape}" for name, (kind, shape) in store.kinds.items()]
    lines += ["", f"  atoms       {', '.join(store.atoms)}", f"  of a token  {', '.join(shapes)}"]
    lines += [f"  {'figures' if file is files[0] else '':<12}{file}" for file in files]
    return "\n".join(lines)


def sampled_torsions(store: Store) -> tuple[dict[str, np.ndarray], str]:
    """phi and psi in degrees, (n, 2), of residues by the kind of plot they belong to, and of how
    many chains they are: all, or as many as hold MOST_RESIDUES, chosen by chance."""
    total = len(store.lengths)
    order = [permuted(place, total, hash64("inspect", total)) for place in range(total)]
    enough = int(np.searchsorted(np.cumsum(store.lengths[order]), MOST_RESIDUES)) + 1
    chains = np.sort(order[:enough])
    lengths = store.lengths[chains]
    whole = chains, np.zeros_like(lengths), lengths
    arrays = [store.gather(name, *whole) for name in ("xyz", "residue", "segment")]
    ends = np.cumsum(lengths)[:-1]
    found = [torsions(*chain) for chain in zip(*(np.split(a, ends) for a in arrays), strict=True)]
    kinds = {kind: np.concatenate([part[kind] for part in found]) for kind in found[0]}
    return kinds, f"{len(found):,} of {total:,} chains"


def torsions(xyz: np.ndarray, residue: np.ndarray, segment: np.ndarray) -> dict[str, np.ndarray]:
    """phi and psi in degrees, (n, 2), of one chain's residues; none at an end or beside a break."""
    n, ca, c = xyz[:, :3].astype(np.float64).swapaxes(0, 1)
    phi = dihedrals(c[:-2], n[1:-1], ca[1:-1], c[1:-1])
    psi = dihedrals(n[1:-1], ca[1:-1], c[1:-1], n[2:])
    whole = (segment[:-2] == segment[2:]) & np.isfinite(phi) & np.isfinite(psi)
    letter, after = residue[1:-1], residue[2:]
    glycine, proline = letter == _GLYCINE, letter == _PROLINE
    kinds = {
        "General": ~glycine & ~proline & (after != _PROLINE),
        "Glycine": glycine,
        "Proline": proline,
        "Before proline": ~glycine & ~proline & (after == _PROLINE),
    }
    both = np.stack([phi, psi], 1)
    return {name: both[whole & chosen] for name, chosen in kinds.items()}


_GLYCINE, _PROLINE = 5, 12  # places in RESIDUES


def dihedrals(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Degrees, IUPAC's sign."""
    first, axis, last = b - a, c - b, d - c
    u, v = np.cross(first, axis), np.cross(axis, last)
    y = (first * v).sum(-1) * np.linalg.norm(axis, axis=-1)
    return np.degrees(np.arctan2(y, (u * v).sum(-1)))


def most_drawable(store: Store) -> int:
    """The longest chain of at most LONGEST_DRAWN residues without a break; else the first that is
    short enough, else the shortest."""
    order = np.argsort(-store.lengths, kind="stable")
    short = order[store.lengths[order] <= LONGEST_DRAWN]
    for chain in short[:50]:
        length = int(store.lengths[chain])
        if not store.read("segment", int(chain), length - 1, length)[0]:
            return int(chain)
    return int(short[0] if len(short) else order[-1])
