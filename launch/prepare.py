"""Build, verify or show a data store: python -m launch prepare [source=...] [key=value] ..."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from data_pipeline.chains import describe
from data_pipeline.errors import ConfigError
from data_pipeline.prepare import make_source
from data_pipeline.store.build import ensure, verify
from data_pipeline.store.reader import Store
from launch.config.check import Choice, options_of, options_within
from launch.config.compose import command_line


@dataclass
class PrepareConfig:
    source: Annotated[dict[str, Any], Choice("data_pipeline.prepare:SOURCES")]
    """`name` and the options of that source."""
    store: str
    """Folder of the store; to verify and inspect also its URL."""
    figures: str | None = None
    """Folder of the figures that `inspect` draws; None: the store's name with .inspect."""
    action: Literal["build", "verify", "inspect", "fasta"] = "build"

    def __post_init__(self) -> None:
        if self.action == "build" and "://" in self.store:
            rule = "is a URL, and stores are written into folders: write one here, then copy it"
            raise ConfigError(f"store={self.store} {rule}")


def main(arguments: list[str]) -> None:
    """Build, verify or show a data store."""
    config, _ = command_line(arguments, "prepare", PrepareConfig)
    began, store, more = time.perf_counter(), config.store, ""
    if config.action == "build":
        with options_within(config, "source"):
            source = make_source(config.source["name"], **options_of(config.source))
            manifest, built = ensure(store, source)
        done = "built" if built else "is there and belongs to this source; reused"
    elif config.action == "verify":
        manifest, done = verify(store), "verified: every hash and every chunk"
    elif config.action == "fasta":
        opened = Store(store)
        manifest, file = opened.manifest, Path(f"{_beside(store)}.fasta")
        file.write_text("".join(opened.fasta()))
        done = f"opened; its sequences are in {file}"
    else:
        from data_pipeline.inspect.inspect import inspect

        manifest, more = inspect(store, Path(config.figures or f"{_beside(store)}.inspect"))
        done = "opened; action=verify reads it all"
    print(f"{store} {done} ({time.perf_counter() - began:.2f} s)")
    print(summary(manifest) + more)


def _beside(store: str) -> str:
    """Where files about a store go: next to it, or here if it is a URL."""
    return store.rpartition("/")[2] if "://" in store else store.rstrip("/")


def summary(manifest: dict[str, Any]) -> str:
    """What a store holds: counts, split, bonds, what was left out."""
    counts, source = manifest["counts"], manifest["source"]
    size = sum(file["size"] for file in manifest["files"].values())
    bonds = [f"{name} {mean:.2f} ± {std:.2f}" for name, (mean, std) in manifest["bonds"].items()]
    made = " backbones, made and not observed" if source["kind"] == "synthetic" else ""
    lines = [
        f"  source      {source['kind']}{made}, {len(source['files'])} file(s)",
        f"  chains      {counts['chains']:,} in {counts['clusters']:,} groups of like sequences",
        f"  residues    {counts['residues']:,}; {counts['breaks']:,} chain breaks, "
        f"{counts['missing atoms']:,} missing atoms",
        f"  size        {size:,} bytes, digest {manifest['digest'][:12]}",
        f"  noted       {describe(manifest['left_out'])}",
        f"  bonds, Å    {', '.join(bonds) or 'not of protein backbones'}",
        f"  split by    {manifest.get('split', 'shared 4-mers')}",
        "",
        f"  {'split':<12}{'chains':>8}{'clusters':>10}{'residues':>12}",
    ]
    for name, split in counts["splits"].items():
        share = split["residues"] / counts["residues"]
        lines.append(
            f"  {name:<12}{split['chains']:>8,}{split['clusters']:>10,}{split['residues']:>12,}"
            f"{share:>7.1%}"
        )
    if source["kind"] in ("structures", "sidechainnet"):
        kept, left_out = counts["residues"], manifest.get("residues_left_out", {})
        lost = sum(left_out.values())
        reasons = ", ".join(f"{count:,} in {reason}" for reason, count in left_out.items() if count)
        lines.append(
            f"  amino acids {kept + lost:,} in what was read = {kept:,} stored + {lost:,} left out"
            + (f" ({reasons})" if reasons else "")
        )
    return "\n".join(lines)
