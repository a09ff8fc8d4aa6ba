"""Measure operators beside their rivals: python -m launch bench [key=value] ...

Both sides of every ratio run in turn in the same processes, one thread a rank. rows.csv has every
number, summary.md one row a case: the geometric mean over the lengths, beside its goal.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import ConfigError, RunError
from launch.config import check_folder_name, command_line, to_yaml
from launch.measure import measure


@dataclass
class BenchConfig:
    name: str
    """Results live in <benches>/<name>."""
    lengths: list[int]
    """N, tokens; multiples of every number in sp."""
    sp: list[int]
    """Numbers of ranks: one alone (against FFTs and the paper's listing), several against the
    channel all-to-all."""
    benches: str = "benches"
    seconds: float = 2.0
    """Of every comparison, s."""
    tokens: int = 1 << 22
    """Channels are 8, or as many fewer as keep channels · N within this."""
    threads: int = 1
    """Of each rank."""
    timeout_s: float = 1200.0
    """Longest time of one number of ranks, s."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_folder_name(self.name, "benches")
        for key in ("lengths", "sp"):
            values = getattr(self, key)
            if not values or min(values) < 1:
                raise ConfigError(f"{key}={values}: must be a list of positive numbers")
        for key in ("seconds", "tokens", "threads", "timeout_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)}: must be positive")
        uneven = [(n, sp) for n in self.lengths for sp in self.sp if n % sp]
        if uneven:
            length, sp = uneven[0]
            raise ConfigError(
                f"lengths={length} is no multiple of sp={sp}, which the channel all-to-all needs;"
                f" try {length // sp * sp or sp}"
            )


def main(arguments: list[str]) -> None:
    """Measure, write, summarise."""
    about = "Measure the long convolution beside its rivals and beside its own FFTs."
    config, overrides = command_line(arguments, "bench", BenchConfig, about)
    folder = Path(config.benches) / config.name
    _prepare(folder, config)
    rows: list[dict[str, Any]] = []
    case = {"lengths": sorted(config.lengths), "tokens": config.tokens, "seconds": config.seconds}
    for sp in sorted(config.sp):
        print(f"sp = {sp}: N = {', '.join(map(str, case['lengths']))} ...", flush=True)
        status, found = measure(
            "long_conv",
            case,
            folder / f"sp{sp}",
            sp,
            threads=config.threads,
            timeout_s=config.timeout_s,
            device=config.device,
        )
        if status != "ok":
            raise RunError(f"sp = {sp} failed: {status}; its ranks said: {folder}/sp{sp}/log.txt")
        rows += found
    from scaling.bench.long_conv import memory_fit, summarise

    fit = memory_fit(rows)
    text = table(summarise([*rows, fit]), sorted(config.lengths), fit)
    command = " ".join(["python -m launch bench", *overrides])
    _write(folder, rows, f"`{command}`\n\n{text}\n")
    print("", text, "", f"numbers   {folder / 'rows.csv'}", sep="\n")
    print(f"table     {folder / 'summary.md'}")


def _prepare(folder: Path, config: BenchConfig) -> None:
    from scaling.train.run import describe_environment

    try:
        folder.mkdir(parents=True, exist_ok=True)
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


def table(summary: list[dict[str, Any]], lengths: list[int], fit: dict[str, Any]) -> str:
    """The summary as a Markdown table; ratios, or values where nothing is compared."""
    heads = ["case", "sp", *map(_power_of_two, lengths), "mean or worst", "goal", "met"]
    lines = [heads, ["---"] * len(heads)]
    for row in summary:
        if row["case"] != "memory":
            by = row["by_length"]
            numbers = [f"{by[n]:.3g}" if n in by else "" for n in lengths]
            ends = [f"{row['value']:.3g}", row["goal"], row["met"]]
            lines.append([row["case"], str(row["sp"]), *numbers, *ends])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{text}\n\nPeak memory of a rank: {fit['base'] / 1e6:,.0f} MB + {fit['per_token']:,.0f}"
        " bytes a local token (vector convolution of one channel, forward and backward)."
    )


def _power_of_two(n: int) -> str:
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


if __name__ == "__main__":
    from launch.environment import run_command

    sys.exit(run_command(main, sys.argv[1:]))
