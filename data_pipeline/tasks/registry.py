"""What a training task gives: samples by number, in slices, and what trivial answers score."""

from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.tasks.denoising import Denoising
from data_pipeline.tasks.needles import Needles
from data_pipeline.tasks.protocol import Task
from data_pipeline.tasks.stored import PROCEDURAL, Materialised

TASKS = {
    "denoising": Denoising,
    **PROCEDURAL,
    "needles": Needles,
    "materialised": Materialised,
}


def build_task(name: str, **options: Any) -> Task:
    """The task of that name.

    Raises:
        ConfigError: no such task or option, or a value that cannot be.
        StoreError: its data cannot be opened.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name}; there are {', '.join(TASKS)}")
    known = TASKS[name].__dataclass_fields__
    if unknown := set(options) - set(known):
        raise ConfigError(f"task {name} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return TASKS[name](**options)
