"""Measure training steps over lengths and ranks: python -m launch sweep [sweep=first_light] ...

Every point runs in fresh processes, so that memory is its own. results.csv is rewritten after each;
a rerun measures only what is missing or failed.
"""

import csv
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import ConfigError, RunError
from launch.config.check import check_choice, check_folder_name
from launch.config.compose import command_line, to_yaml
from launch.measure import measure
from scaling.execution import Execution


@dataclass
class SweepConfig:
    """Points are all pairs of `lengths` and `sp`."""

    name: str
    """Results live in <sweeps>/<name>."""
    model: dict[str, Any]
    """`name` and options."""
    lengths: list[int]
    """Tokens."""
    sp: list[int]
    """Ranks that share a sequence."""
    sweeps: str = "sweeps"
    execution: Execution = field(default_factory=Execution)
    rows: int = 1
    """Sequences of a step."""
    vectors: int = 1
    scalars: int = 4
    warmup_steps: int = 1
    steps: int = 5
    """Timed steps of a point; their median counts."""
    seed: int = 0
    threads: int = 1
    """Of each rank."""
    timeout_s: float = 300.0
    """Longest time of a point; then it counts as failed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_folder_name(self.name, "sweeps")
        for key in ("rows", "steps", "threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)}: must be at least 1")
        for key in ("lengths", "sp"):
            values = getattr(self, key)
            if not values or min(values) < 1:
                raise ConfigError(f"{key}={values}: must be a list of positive numbers")


def main(arguments: list[str]) -> None:
    """Measure what is missing, then draw."""
    about = "Measure tokens/s, exchanged bytes and memory of training steps over lengths and ranks."
    config, _ = command_line(arguments, "sweep", SweepConfig, about, check=_check_model)
    folder = Path(config.sweeps) / config.name
    rows = _earlier_rows(folder, config)
    points = [(length, sp) for length in sorted(config.lengths) for sp in sorted(config.sp)]
    for number, (length, sp) in enumerate(points, 1):
        title = f"point {number}/{len(points)}: N = {length}, sp = {sp}"
        if rows.get((length, sp), {}).get("status") == "ok":
            print(f"{title}: measured before, kept", flush=True)
            continue
        print(f"{title} ...", end=" ", flush=True)
        rows[length, sp] = row = measure_point(config, folder, length, sp)
        write_rows(folder / "results.csv", rows)
        print(row["status"] if row["status"] != "ok" else _brief(row), flush=True)
    _present(folder, [rows[point] for point in sorted(rows)], config)
    failed = sum(row["status"] != "ok" for row in rows.values())
    if failed:
        raise RunError(f"{failed} of {len(rows)} points failed, see status in {folder}/results.csv")


def _check_model(config: SweepConfig) -> None:
    from scaling.models import MODELS

    check_choice("model", config.model, MODELS, given=("vectors", "scalars"))


def columns() -> list[str]:
    """Of results.csv."""
    from scaling.experiments.cases.train_step import StepCost

    return ["length", "sp", "status", *(field.name for field in fields(StepCost))]


def measure_point(config: SweepConfig, folder: Path, length: int, sp: int) -> dict[str, Any]:
    """One row of results.csv; `status` is ok or the reason why there are no numbers."""
    keys = ("model", "rows", "vectors", "scalars", "warmup_steps", "steps", "seed")
    status, cost = measure(
        "train_step",
        {"length": length, "execution": asdict(config.execution)}
        | {key: getattr(config, key) for key in keys},
        folder / "points" / f"N{length}_sp{sp}",
        sp,
        threads=config.threads,
        timeout_s=config.timeout_s,
        device=config.device,
    )
    return {"length": length, "sp": sp, "status": status} | (cost or {})


def write_rows(path: Path, rows: dict[tuple[int, int], dict[str, Any]]) -> None:
    """The whole table, replaced at once: never half a file."""
    new = path.with_suffix(".tmp")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(), restval="")
        writer.writeheader()
        writer.writerows(rows[point] for point in sorted(rows))
    new.replace(path)


def read_rows(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(length, sp) -> row, numbers as numbers."""
    rows = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            length, sp = int(row.pop("length")), int(row.pop("sp"))
            numbers = {k: float(v) for k, v in row.items() if k != "status" and v != ""}
            rows[length, sp] = {"length": length, "sp": sp, "status": row["status"]} | numbers
    return rows


def _earlier_rows(folder: Path, config: SweepConfig) -> dict[tuple[int, int], dict[str, Any]]:
    """Rows of an earlier run of the same sweep, failed ones among them.

    Raises:
        RunError: the folder holds another configuration's results, or cannot be written.
    """
    from scaling.train.run import describe_environment

    identity = asdict(config)
    for key in ("lengths", "sp", "sweeps", "timeout_s"):  # decide which points, not their numbers
        del identity[key]
    path = folder / "identity.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else identity
        if before != identity:
            raise RunError(
                f"{folder} holds a sweep with other settings ({_difference(before, identity)}); "
                "choose another name=, or remove it"
            )
        path.write_text(json.dumps(identity, indent=1))
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "environment.json").write_text(json.dumps(describe_environment(), indent=1))
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; choose sweeps=") from None
    results = folder / "results.csv"
    return read_rows(results) if results.exists() else {}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(f"{key}: {before.get(key)} there, {now.get(key)} here" for key in keys)


def _brief(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_s']:,.0f} tokens/s"


def _present(folder: Path, rows: list[dict[str, Any]], config: SweepConfig) -> None:
    from scaling.experiments.plots import plot_sweep
    from scaling.experiments.tensorboard import write_sweep
    from scaling.observe.sinks import tensorboard_command

    title = f"{config.model['name']}, one training step of {config.rows} sequence(s)"
    plot_sweep(rows, folder / "sweep.png", title)
    write_sweep(rows, folder / "tensorboard")
    print("", table(rows), "", sep="\n")
    print(f"numbers   {folder / 'results.csv'}\nfigure    {folder / 'sweep.png'}")
    print(f"curves    {tensorboard_command(folder / 'tensorboard')}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading."""
    head = f"{'N':>9} {'sp':>3} {'tokens/s':>10} {'step s':>8} {'MB sent':>8} {'all-to-alls':>12}"
    lines = [f"{head} {'peak MB':>8} {'step MB':>8}"]
    for row in rows:
        start = f"{row['length']:>9} {row['sp']:>3} "
        if row["status"] != "ok":
            lines.append(f"{start}{row['status']}")
            continue
        step = (row["peak_bytes"] - row["base_bytes"]) / 1e6
        lines.append(
            f"{start}{row['tokens_per_s']:>10,.0f} {row['step_s']:>8.3f} "
            f"{row['comm_bytes'] / 1e6:>8.1f} {row['all_to_alls']:>12.0f} "
            f"{row['peak_bytes'] / 1e6:>8.0f} {step:>8.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from launch.ranks.exit import run_command

    sys.exit(run_command(main, sys.argv[1:]))
