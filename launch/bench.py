"""Measure operators and training steps beside rivals: python -m launch bench [bench=...] ...

Both sides of every ratio run in turn in one run, one thread a rank. rows.csv has every number,
summary.md one row a case: the geometric mean over the lengths, beside its goal.
"""

import csv
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import ConfigError, RunError
from launch.config.check import check_choice, check_folder_name, options_of
from launch.config.compose import command_line, to_yaml
from launch.measure import measure
from scaling.execution import Execution


@dataclass
class BenchConfig:
    name: str
    """Results live in <benches>/<name>."""
    bench: dict[str, Any]
    """`name` and options: the fields of its case in scaling/bench/<name>.py."""
    benches: str = "benches"
    threads: int = 1
    """Of each rank."""
    timeout_s: float = 1200.0
    """Longest time of one set of processes, s."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_folder_name(self.name, "benches")
        for key in ("threads", "timeout_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)}: must be positive")


def main(arguments: list[str]) -> None:
    """Measure, write, summarise."""
    about = "Measure an operator or a training step beside its rivals."
    config, overrides = command_line(arguments, "bench", BenchConfig, about, check=_case)
    from scaling.experiments.family import summarise, table
    from scaling.experiments.registry import BENCHES

    bench = BENCHES[config.bench["name"]]
    folder = Path(config.benches) / config.name
    _prepare(folder, config)
    rows: list[dict[str, Any]] = []
    case = _case(config)
    parts = bench.parts(case)
    for number, part in enumerate(parts, 1):
        print(f"part {number}/{len(parts)}: {part.title} ...", flush=True)
        status, found = measure(
            "bench",
            {"name": config.bench["name"]} | asdict(part.case),
            folder / part.title,
            part.ranks,
            threads=config.threads,
            timeout_s=config.timeout_s,
            device=config.device,
        )
        if status != "ok":
            raise RunError(
                f"{part.title} failed: {status}; its ranks said: {folder / part.title}/log.txt"
            )
        rows += found
    concluded, remarks = bench.conclude(case, rows)
    text = "\n\n".join(filter(None, [table(summarise(concluded, bench.goals)), remarks]))
    command = " ".join(["python -m launch bench", *overrides])
    _write(folder, rows, f"`{command}`\n\n{text}\n")
    print("", text, "", f"numbers   {folder / 'rows.csv'}", sep="\n")
    print(f"table     {folder / 'summary.md'}")
    if bench.figure:
        from scaling.experiments.plots import plot_rows

        plot_rows(rows, folder / "figure.png", bench.figure)
        print(f"figure    {folder / 'figure.png'}")


def _case(config: BenchConfig) -> Any:
    """The options as the bench's case, checked, with the models and the execution in it."""
    from scaling.experiments.registry import BENCHES
    from scaling.models import MODELS

    cases = {name: bench.case for name, bench in BENCHES.items()}
    check_choice("bench", config.bench, cases)
    options = options_of(config.bench)
    models = {f"models.{name}": model for name, model in options.get("models", {}).items()}
    models |= {key: options[key] for key in ("model",) if key in options}
    for key, model in models.items():
        check_choice(f"bench.{key}", model, MODELS, given=("vectors", "scalars"))
    execution = options.get("execution", {})
    check_choice("bench.execution", {"name": "own"} | execution, {"own": Execution})
    Execution(**execution)
    return cases[config.bench["name"]](**options)


def _prepare(folder: Path, config: BenchConfig) -> None:
    from scaling.train.run import describe_environment

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in ("rows.csv", "summary.md", "figure.png"):  # of another configuration
            (folder / earlier).unlink(missing_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "environment.json").write_text(json.dumps(describe_environment(), indent=1))
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; choose benches=") from None


def _write(folder: Path, rows: list[dict[str, Any]], summary: str) -> None:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "summary.md").write_text(summary)


if __name__ == "__main__":
    from launch.ranks.exit import run_command

    sys.exit(run_command(main, sys.argv[1:]))
