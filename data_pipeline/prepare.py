"""The sources that `prepare source=NAME` knows; their fields are its options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.sources.arrays import ArraySource
from data_pipeline.sources.bundled import BundledSource
from data_pipeline.sources.sidechainnet import SideChainNetSource
from data_pipeline.sources.structures import StructureSource
from data_pipeline.sources.synthetic import SyntheticSource
from data_pipeline.store.build import Source, ensure
from data_pipeline.store.grouping import GroupedSource
from data_pipeline.tasks.stored import PROCEDURAL, ProceduralSource

SOURCES: dict[str, Callable] = {
    "bundled": BundledSource,
    "structures": StructureSource,
    "sidechainnet": SideChainNetSource,
    "synthetic": SyntheticSource,
    "arrays": ArraySource,
    **PROCEDURAL,
}


def make_source(name: str, **options: Any) -> Source:
    """The source of that name, from options as they are written: paths are text.

    Raises:
        OptionError: an option's value that cannot be.
        ConfigError: a combination that cannot be, or a package that is missing.
    """
    for key in {"path", "clusters"} & set(options):
        options[key] = None if options[key] is None else Path(options[key])
    source = SOURCES[name](**options)
    if name in PROCEDURAL:
        return ProceduralSource(source)
    clusters, max_identity = (getattr(source, key, None) for key in ("clusters", "max_identity"))
    if clusters is None and max_identity is None:
        return source
    return GroupedSource(source, clusters, max_identity)


def ensure_bundled(path: str | Path) -> bool:
    """Builds the bundled data's store at `path` if it is not there; True if it had to.

    Milliseconds where it is. One process calls it, the others wait.
    """
    return ensure(path, BundledSource())[1]
