"""Measure operators and training steps beside rivals: python -m launch bench [bench=...] ...

Both sides of every ratio run in turn in one run, one thread a rank. rows.csv has every number,
summary.md one row a case: the geometric mean over the lengths, beside its goal. A rerun measures
only what is missing or failed.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

from launch.config.check import FolderName, build, check_choice, options_of
from launch.config.compose import command_line
from launch.measure import ENTRY
from scaling.experiments.options import Running
from scaling.runs.identity import Identity, NotIdentity


@dataclass(kw_only=True)
class BenchConfig(Running):
    """Results live in <benches>/<name>."""

    name: Annotated[FolderName, NotIdentity()]
    bench: dict[str, Any]
    """`name` and options: the fields of its options in scaling/experiments/cases/<name>.py."""
    benches: Annotated[str, NotIdentity()] = "benches"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options()

    def options(self) -> Any:
        """The bench's options, checked, with the models in them."""
        from scaling.experiments.registry import BENCHES
        from scaling.models import MODELS

        check_choice("bench", self.bench, BENCHES)
        options = options_of(self.bench)
        models = {f"models.{name}": model for name, model in options.get("models", {}).items()}
        models |= {"model": options["model"]} if "model" in options else {}
        for key, model in models.items():
            check_choice(f"bench.{key}", model, MODELS, filled=("vectors", "scalars"))
        return build(BENCHES[self.bench["name"]], options, prefix="bench.")


def main(arguments: list[str]) -> None:
    """Measure what is missing, write, summarise."""
    config, overrides = command_line(arguments, "bench", BenchConfig)
    from scaling.experiments import ranks
    from scaling.experiments.harness import run_experiment

    options = config.options()
    running = {key: value for key, value in asdict(config).items() if key != "bench"}
    identity = Identity({"": (BenchConfig, running), "bench": (type(options), asdict(options))})
    name, command = config.bench["name"], ["python", "-m", "launch", "bench", *overrides]
    measure = partial(ranks.measure, name, asdict(options), running=config, entry=ENTRY)
    run_experiment(options, measure, config, identity, "benches", command)
