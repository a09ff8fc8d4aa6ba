"""A trained model in a folder of its own, which needs neither its run nor an engine.

config.json          model: name and options; vectors, scalars: channels; whatever else is said
model.safetensors    parameters and buffers by name
README.md            for people
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.disk import sync, write_atomically
from data_pipeline.errors import RunError
from scaling.runs.exported import CONFIG, FORMAT, read_config

WEIGHTS, README = "model.safetensors", "README.md"


@dataclass(frozen=True)
class Pretrained:
    """What such a folder holds."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]

    def fill(self, model: nn.Module) -> None:
        """Gives a model of this configuration the saved parameters.

        Raises:
            RunError: they are of another model.
        """
        mine = model.state_dict()
        names = sorted(mine.keys() | self.weights.keys())
        shapes = {n: [tuple(x[n].shape) if n in x else None for x in (mine, self.weights)]
                  for n in names}  # fmt: skip
        if wrong := [name for name in names if shapes[name][0] != shapes[name][1]]:
            mine_has, saved = shapes[wrong[0]]
            raise RunError(
                f"{self.folder / WEIGHTS} is of another model than {CONFIG} beside it: {wrong[0]} "
                f"has the shape {saved} there and {mine_has} here ({len(wrong)} tensors differ); "
                "export the run again"
            )
        model.load_state_dict(self.weights)


def write_pretrained(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], readme: str
) -> None:
    """Complete, or not there.

    Raises:
        RunError: something is there already, or it cannot be written.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        if folder.exists():
            raise RunError(f"{folder} exists already: name another folder, or remove it")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
        temporary.mkdir(parents=True)
        tensors = {name: x.detach().cpu().contiguous() for name, x in weights.items()}
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        sync(temporary / WEIGHTS)
        write_atomically(temporary / README, readme)
        whole = json.dumps({"format": FORMAT} | dict(config), indent=1)
        write_atomically(temporary / CONFIG, whole + "\n")
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be written ({error}); make room, or name another folder"
                       ) from error  # fmt: skip


def read_pretrained(folder: Path) -> Pretrained:
    """Configuration and tensors.

    Raises:
        RunError: something is missing or damaged.
    """
    config = read_config(folder)
    try:
        return Pretrained(folder, config, load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{folder / WEIGHTS} cannot be read ({reason}); export the run again"
                       ) from error  # fmt: skip
