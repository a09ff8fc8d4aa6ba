"""What a folder that `export` wrote says of its model, without torch; see models/pretrained.py."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError

CONFIG = "config.json"
FORMAT = 1


def is_exported(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        if config["format"] != FORMAT:
            raise RunError(f"{folder} has format {config['format']}, this program reads {FORMAT}")
        return config
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"{folder} is no exported model (no {CONFIG}): python -m launch export "
                       "runs/NAME FOLDER makes one") from error  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error!r}); export the run again") from error
