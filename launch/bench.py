"""Measure operators and training steps beside rivals: python -m launch bench [bench=...] ...

Both sides of every ratio run in turn in one run, one thread a rank. rows.csv has every number,
summary.md one row a case: the geometric mean over the lengths, beside its goal. A rerun measures
only what is missing or failed.
"""

import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from data_pipeline.errors import OptionError
from launch.config.check import check_choice, check_folder_name, options_of
from launch.config.compose import command_line
from launch.measure import ENTRY
from scaling.execution import Execution
from scaling.experiments.options import Running
from scaling.runs.identity import Identity, NotIdentity


@dataclass(kw_only=True)
class BenchConfig(Running):
    """Results live in <benches>/<name>."""

    bench: dict[str, Any]
    """`name` and options: the fields of its options in scaling/experiments/cases/<name>.py."""
    benches: Annotated[str, NotIdentity()] = "benches"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder_name(self.name, "benches")


def main(arguments: list[str]) -> None:
    """Measure what is missing, write, summarise."""
    about = "Measure an operator or a training step beside its rivals."
    config, overrides = command_line(arguments, "bench", BenchConfig, about, check=_options)
    from scaling.experiments.harness import run_experiment

    options = _options(config)
    running = {key: value for key, value in asdict(config).items() if key != "bench"}
    run_experiment(
        config.bench["name"],
        options,
        config,
        Identity({"": (BenchConfig, running), "bench": (type(options), asdict(options))}),
        "benches",
        ["python", "-m", "launch", "bench", *overrides],
        ENTRY,
    )


def _options(config: BenchConfig) -> Any:
    """The bench's options, checked, with the models and the execution in them."""
    from scaling.experiments.registry import BENCHES
    from scaling.models import MODELS

    options = options_of(config.bench)
    if isinstance(execution := options.get("execution"), dict):
        check_choice("bench.execution", {"name": "own"} | execution, {"own": Execution})
        options["execution"] = Execution(**execution)
    check_choice("bench", config.bench, BENCHES)
    models = {f"models.{name}": model for name, model in options.get("models", {}).items()}
    models |= {key: options[key] for key in ("model",) if key in options}
    for key, model in models.items():
        check_choice(f"bench.{key}", model, MODELS, given=("vectors", "scalars"))
    try:
        return BENCHES[config.bench["name"]](**options)
    except OptionError as error:
        raise error.within("bench") from None


if __name__ == "__main__":
    from launch.ranks.exit import run_command

    sys.exit(run_command(main, sys.argv[1:]))
