"""Measure training steps over lengths and ranks: python -m launch sweep [sweep=first_light] ...

Every point runs in fresh processes, so that memory is its own; a rerun measures only what is
missing or failed, and results of other lengths and ranks stay.
"""

from dataclasses import asdict, dataclass, fields
from typing import Annotated

from launch.config.check import check_folder_name
from launch.config.compose import command_line
from launch.config.settings import Model
from launch.measure import ENTRY
from scaling.experiments.options import Positive, Running, SweepOptions
from scaling.runs.identity import Identity, NotIdentity


@dataclass(kw_only=True)
class SweepConfig(SweepOptions, Running):
    """Results live in <sweeps>/<name>."""

    model: Model
    sweeps: Annotated[str, NotIdentity()] = "sweeps"
    timeout_s: Annotated[Positive, NotIdentity()] = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder_name(self.name, "sweeps")


def main(arguments: list[str]) -> None:
    """Measure what is missing, then draw."""
    about = "Measure tokens/s, exchanged bytes and memory of training steps over lengths and ranks."
    config, overrides = command_line(arguments, "sweep", SweepConfig, about)
    from scaling.experiments.harness import run_experiment

    values = asdict(config)
    run_experiment(
        "sweep",
        SweepOptions(**{each.name: getattr(config, each.name) for each in fields(SweepOptions)}),
        config,
        Identity({"": (SweepConfig, values)}),
        values,
        "sweeps",
        ["python", "-m", "launch", "sweep", *overrides],
        ENTRY,
    )
