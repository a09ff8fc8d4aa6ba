"""Measure training steps over lengths and ranks: python -m launch sweep [sweep=first_light] ...

Every point runs in fresh processes, so that memory is its own; a rerun measures only what is
missing or failed, and results of other lengths and ranks stay.
"""

import sys
from dataclasses import asdict, dataclass, fields
from typing import Annotated

from launch.config.check import check_choice, check_folder_name
from launch.config.compose import command_line
from launch.measure import ENTRY
from scaling.experiments.options import Running, SweepOptions
from scaling.runs.identity import Identity, NotIdentity


@dataclass(kw_only=True)
class SweepConfig(SweepOptions, Running):
    """Results live in <sweeps>/<name>."""

    sweeps: Annotated[str, NotIdentity()] = "sweeps"
    timeout_s: Annotated[float, NotIdentity()] = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder_name(self.name, "sweeps")


def main(arguments: list[str]) -> None:
    """Measure what is missing, then draw."""
    about = "Measure tokens/s, exchanged bytes and memory of training steps over lengths and ranks."
    config, overrides = command_line(arguments, "sweep", SweepConfig, about, check=_check_model)
    from scaling.experiments.cases.sweep import Sweep
    from scaling.experiments.harness import run_experiment

    run_experiment(
        "sweep",
        Sweep(**{each.name: getattr(config, each.name) for each in fields(Sweep)}),
        config,
        Identity({"": (SweepConfig, asdict(config))}),
        "sweeps",
        ["python", "-m", "launch", "sweep", *overrides],
        ENTRY,
    )


def _check_model(config: SweepConfig) -> None:
    from scaling.models import MODELS

    check_choice("model", config.model, MODELS, given=("vectors", "scalars"))


if __name__ == "__main__":
    from launch.ranks.exit import run_command

    sys.exit(run_command(main, sys.argv[1:]))
