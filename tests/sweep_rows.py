"""Rows of a sweep and of a run, and fits, whose numbers are known; as the commands write them."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

GIB = 2**30
SWEEP = {"name": "known", "model": {"name": "se3_hyena"}}
ENVIRONMENT = {
    "command": "python -m launch sweep sweep=known",
    "versions": {"torch": "2.13.0"},
    "python": "3.11.7",
    "cpu": "a processor",
    "cores": 2,
    "gpu": None,
    "threads": 1,
    "git": "0123abc",
}


def cell(model: str = "se3_hyena", length: int = 1024, sp: int = 1, **changes: Any) -> dict:
    """A measured step: N log N / P seconds, on two cores."""
    step_s = length * math.log(length) * 1e-6 / sp
    return {
        "point": f"{model}_N{length}_sp{sp}", "status": "ok", "kind": "step", "model": model,
        "parameters": 50_000, "length": length, "rows": 1, "dp": 1, "sp": sp, "ranks": sp,
        "zero_stage": 0, "seed": 0, "repeat": 0, "hardware": "2 cores", "threads": 1,
        "oversubscribed": sp > 2, "step_s": step_s, "step_low_s": 0.9 * step_s,
        "step_high_s": 1.2 * step_s, "tokens_per_s": length / step_s, "comm_s": 0.25 * step_s,
        "data_wait_s": 0.0, "flops": 100.0 * length, "fft_flops": 20.0 * length,
        "peak_bytes": GIB / 4 + length * GIB / 1024 / sp, "base_bytes": GIB / 4,
    } | changes  # fmt: skip


def trained(parameters: int, flops: float, loss: float, **changes: Any) -> dict:
    """A whole run of one size and budget."""
    run = {"kind": "train", "parameters": parameters, "train_flops": flops, "loss": loss}
    labels = cell(point=f"train_{parameters}_{flops:g}", length=512)
    known = ("point", "status", "model", "length", "rows", "dp", "sp", "seed", "repeat", "hardware")
    return {key: labels[key] for key in known} | run | {"model.parameters": parameters} | changes


def known_rows() -> list[dict]:
    """Strong, weak and length scaling, a failed cell, and three trained sizes."""
    lengths = [cell(length=2**k) for k in range(10, 16)]
    other = [cell("egnn", 2**k) for k in range(10, 13)]
    other[1] = {k: v for k, v in other[1].items() if not k.endswith(("_s", "_bytes"))}
    other[1] |= {"status": "out of memory"}
    strong = [cell(length=2**12, sp=sp) for sp in (2, 4)]
    weak = [cell(length=2**11 * sp, sp=sp) for sp in (2, 4)]
    ladder = [trained(10**k, 10.0 ** (k + 6), 2.0 / k) for k in (3, 4, 5)]
    return lengths + other + strong + weak[1:] + ladder


def known_fits() -> list[dict]:
    """One curve of the step time, held out at 2^15, and a refusal."""
    rows = [cell(length=2**k) for k in range(10, 18)]
    curve = [{"length": r["length"], "value": r["step_s"], "low": r["step_s"] / 2,
              "high": r["step_s"] * 2} for r in rows]  # fmt: skip
    held = {"at": {"length": 2**15}, "measured": 0.34, "predicted": 0.33, "low": 0.3, "high": 0.4,
            "error": -0.03, "covered": True}  # fmt: skip
    group = {"model": "se3_hyena", "sp": 1}
    return [
        {"target": "step_s", "form": "c + a N^b", "variables": ["length"], "group": group,
         "points": 6, "parameters": {"b": {"value": 1.08, "low": 1.01, "high": 1.15}},
         "held_out": held, "residuals": {"rms": 0.01, "remark": None}, "curve": curve},
        {"target": "step_s", "form": "c + a N^b P^-g", "group": {"model": "se3_hyena"},
         "refused": "g: two scales of P, five are needed"},
    ]  # fmt: skip


def run_config(name: str) -> dict:
    """What a run's config.yaml says, shortened."""
    return {"name": name, "task": {"name": "recall"}, "train": {"steps": 4},
            "model": {"name": "se3_hyena", "channels": 16}}  # fmt: skip


def run_rows() -> list[dict]:
    """Four steps of a run, each evaluated."""
    shares = {f"{part}_s": 0.1 for part in ("projection", "transforms", "comm", "other")}
    trained = {"split": "train", "tokens": 32, "tokens_per_s": 200.0, "step_s": 0.4, "lr": 1e-3,
               "grad_norm": 1.0, "peak_bytes": 64 << 20, "comm_bytes": 10, **shares}  # fmt: skip
    evaluated = {"split": "validation", "tokens": 8, "equivariance_error": 1e-6}
    return [
        row
        for step in range(1, 5)
        for row in (
            {"time": 1e9 + step, "step": step, "loss": 1.0 / step} | trained,
            {"time": 1e9 + step, "step": step, "loss": 2.0 / step} | evaluated,
        )
    ]


def write_folder(
    folder: Path, rows: list[dict], config: dict = SWEEP, fits: list[dict] | None = None
) -> Path:
    """A finished run or sweep; the folder."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 1}))
    if fits is not None:
        (folder / "fits.json").write_text(json.dumps(fits))
    return folder
