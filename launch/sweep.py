"""Measure training steps over lengths and ranks: python -m launch sweep [sweep=first_light] ...

Every point runs in fresh processes, so that memory is its own; a rerun measures only what is
missing or failed, and results of other lengths and ranks stay.
"""

from dataclasses import asdict, dataclass, fields
from typing import Annotated

from launch.config.check import FolderName
from launch.config.compose import command_line
from launch.config.settings import Model
from launch.measure import ENTRY
from scaling.experiments.options import Positive, Running, SweepOptions
from scaling.runs.identity import Identity, NotIdentity


@dataclass(kw_only=True)
class SweepConfig(SweepOptions, Running):
    """Results live in <sweeps>/<name>."""

    name: Annotated[FolderName, NotIdentity()]
    model: Model
    sweeps: Annotated[str, NotIdentity()] = "sweeps"
    timeout_s: Annotated[Positive, NotIdentity()] = 300.0


def main(arguments: list[str]) -> None:
    """Measure what is missing, then draw."""
    config, overrides = command_line(arguments, "sweep", SweepConfig)
    from scaling.experiments.cases.sweep import Sweep
    from scaling.experiments.harness import run_experiment

    sweep = Sweep(**{each.name: getattr(config, each.name) for each in fields(Sweep)})
    identity = Identity({"": (SweepConfig, asdict(config))})
    command = ["python", "-m", "launch", "sweep", *overrides]
    run_experiment("sweep", sweep, config, identity, "sweeps", command, ENTRY)
