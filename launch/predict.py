"""Denoise a user's structures: python -m launch predict FOLDER input=... output=... [key=value] ...

torchrun | accelerate launch | deepspeed ... launch.predict       the same, on many ranks

FOLDER is a run on task=denoising or its exported model; its data are not needed. Each input file is
copied with the model's coordinates at N, CA and C, or whichever atoms the run has, and with their
displacements, Å, as B factors. The rest of the file stays as it is.
"""

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.chains import ATOMS, Chain, describe
from data_pipeline.errors import ConfigError, RunError, StructureError
from launch.config.check import options_of, options_within
from launch.config.compose import command_line
from launch.config.settings import PredictConfig, mesh_sizes
from launch.eval import trained_with
from launch.ranks.discovery import discover
from launch.ranks.process import run_command, share_cores
from launch.train import on_ranks
from scaling.runs.exported import is_exported
from scaling.runs.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from data_pipeline.sources.structure_edits import Edit, EditableStructure
    from data_pipeline.tasks.backbone import BackboneInputs
    from scaling.models import Model


def main(arguments: list[str]) -> None:
    """Denoise structure files; every rank runs this."""
    ranks = discover()
    share_cores(ranks)
    config, _ = command_line(arguments, "predict", PredictConfig, sections_of_run)
    with on_ranks(ranks, config) as device:
        predict(config, device)


def sections_of_run(paths: list[str]) -> dict[str, Any]:
    """What the run in a folder says of a prediction.

    Raises:
        ConfigError: not one path, or a run on another task or on other atoms.
        RunError: no training run lies there.
    """
    if len(paths) != 1:
        raise ConfigError(f"predict takes one path, the folder of a run or of an exported model, "
                          f"before the first key=value, and not {len(paths)}: python -m launch "
                          "predict runs/NAME input=... output=...")  # fmt: skip
    run = trained_with(paths[0])
    if (name := run["task"].get("name")) != "denoising":
        raise ConfigError(f"{paths[0]} was trained on task={name}, which moves no atoms: name a "
                          "run on task=denoising")  # fmt: skip
    atoms = run["task"].get("atoms", ["N", "CA", "C"])
    if not set(atoms) <= set(ATOMS):
        raise ConfigError(f"{paths[0]} was trained on {', '.join(atoms)}, which structure files do "
                          f"not have: name a run on some of {', '.join(ATOMS)}")  # fmt: skip
    kept = {"execution": run["execution"]} if "execution" in run else {}
    return kept | {"precision": run["train"].get("precision", "float32")}


def predict(config: PredictConfig, device: "torch.device") -> None:
    """Write a file for each input, and say what was done; inside the process group, if any."""
    from scaling.checkpoint.checkpoint import load_exported, load_model
    from scaling.engine.build import check_precision
    from scaling.ops.tiles import set_execution
    from scaling.parallel.collectives import first_rank_says, group_size
    from scaling.parallel.mesh import Mesh
    from scaling.train.objective import Objective
    from scaling.train.predict import denoised
    from scaling.train.settings import EvaluationSettings

    check_precision(config.precision)
    files = first_rank_says(lambda: _files(config))
    with options_within(config, "parallel"):
        mesh = Mesh(*mesh_sizes(config.parallel, group_size(None)))
    run = RunFolder(config.paths[0])
    inputs, model = inputs_and_model(trained_with(config.paths[0]))
    set_execution(model, config.execution)
    fix = ("name a run whose data have no channels of their own: structure files give "
           f"{inputs.vectors} vector and {inputs.scalars} scalar channels")  # fmt: skip
    if is_exported(run.path):
        step, damage = load_exported(run.path, model, None, fix), ""
    else:
        step, damage = load_model(run.checkpoints, model, None, fix)
    settings = EvaluationSettings(precision=config.precision)
    objective = Objective.for_run(model, mesh, settings, device)
    first_rank_says(lambda: print(f"{damage}: this is step {step} instead") if damage else None)
    written = 0
    for source, target in files:
        opened: list[EditableStructure] = []  # on the first rank alone
        chains = first_rank_says(partial(_chains, source, opened, config.skip_unreadable))
        if chains is None:
            continue
        xyz = denoised(objective, inputs, chains)
        first_rank_says(partial(_write, opened, inputs, xyz, target, source))
        written += 1
    of_all = f"{written} of {len(files)}" if written < len(files) else f"{written}"
    first_rank_says(
        lambda: print(f"{config.output}: {of_all} files, by {run.path} at step {step:,}")
    )


def inputs_and_model(run: Mapping[str, Any]) -> "tuple[BackboneInputs, Model]":
    """What a run of that configuration makes of a backbone, and its model as first drawn."""
    from data_pipeline.tasks.backbone import BackboneInputs
    from scaling.models import build

    known = BackboneInputs.__dataclass_fields__
    inputs = BackboneInputs(**{key: x for key, x in run["task"].items() if key in known})
    channels = {"vectors": inputs.vectors, "scalars": inputs.scalars}
    return inputs, build(run["model"]["name"], **channels, **options_of(run["model"]))


def _files(config: PredictConfig) -> list[tuple[Path, Path]]:
    """Each input with the file that comes of it; the output folder is there afterwards.

    Raises:
        ConfigError: nothing is read or may be written, or gemmi is missing.
    """
    from data_pipeline.sources.structure_files import gemmi_module
    from data_pipeline.sources.structures import is_structure

    if config.input is None or config.output is None:
        missing = "input" if config.input is None else "output"
        raise ConfigError(f"predict needs {missing}=...: python -m launch predict FOLDER "
                          "input=FILE_OR_FOLDER output=FOLDER")  # fmt: skip
    gemmi_module()
    source, output = Path(config.input), Path(config.output)
    folder = source if source.is_dir() else source.parent
    if not source.exists():
        raise ConfigError(f"input={source} does not exist; give a file or folder")
    if output.resolve() == folder.resolve() or (
        source.is_dir() and source.resolve() in output.resolve().parents
    ):
        raise ConfigError(f"output={output} lies where input={source} is read; choose a folder "
                          "elsewhere")  # fmt: skip
    found = [source] if source.is_file() else _walk(source)
    chosen = [file for file in found if file == source or is_structure(file.name)]
    if not chosen:
        raise ConfigError(f"input={source} holds no file named *.pdb, *.ent, *.cif or *.mmcif (or "
                          f".pdb1, .gz) among its {len(found)} files; choose another")  # fmt: skip
    files = [(file, output / file.relative_to(folder)) for file in chosen]
    for _, target in files:
        if target.exists():
            raise ConfigError(f"{target} exists already; remove it, or choose another output=...")
    _check_writable(output)
    return files


def _walk(folder: Path) -> list[Path]:
    """Files of a folder and its sub-folders; linked folders stay outside."""

    def stop(error: OSError) -> None:
        raise ConfigError(f"input: {error.filename} cannot be read: {error.strerror}; change its "
                          "permissions, or choose another folder") from error  # fmt: skip

    walk = os.walk(folder, onerror=stop)
    return sorted(Path(place, name) for place, _, names in walk for name in names)


def _check_writable(output: Path) -> None:
    """Makes the folder, before anything is computed."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"output={output} cannot be written: {error.strerror}; choose a folder "
                          "where you may write") from error  # fmt: skip


def _chains(
    path: Path, opened: "list[EditableStructure]", skip_unreadable: bool
) -> list[Chain] | None:
    """The chains of a file, which `opened` gains; None of one that is skipped."""
    from data_pipeline.sources.structure_edits import EditableStructure

    try:
        opened.append(EditableStructure(path))
    except StructureError as error:
        if not skip_unreadable:
            raise
        print(f"{path.name}: skipped; {error}")
        return None
    return opened[0].chains


def _write(
    opened: "list[EditableStructure]",
    inputs: "BackboneInputs",
    xyz: list[np.ndarray],
    target: Path,
    source: Path,
) -> None:
    """The file whole or not at all, and a line about it."""
    (file,) = opened
    edit = file.with_atoms(inputs.atoms, xyz)
    draft = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(edit.content)
        draft.rename(target)
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror}; make room, or choose "
                       "another output=...") from error  # fmt: skip
    print(f"{source.name}: {_summary(edit, len(file.chains))}")
    if file.notes:
        print(f"  read otherwise: {describe(file.notes)}")


def _summary(edit: "Edit", chains: int) -> str:
    """How many atoms moved how far, and what was left alone."""
    moved = edit.displacements.astype(np.float64)
    said = "nothing moved" if chains else "no protein chain, nothing moved"
    if len(moved):
        rms, most = np.sqrt(np.square(moved).mean()), moved.max()
        of_chains = f"{chains} chain{'s' * (chains > 1)}"
        said = f"{len(moved):,} atoms of {of_chains} moved by {rms:.3f} Å (rms; {most:.3f} at most)"
    left = ", ".join(f"{count:,} {kind}" for kind, count in edit.left_alone.items())
    return f"{said}; left alone: {left or 'nothing'}"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
