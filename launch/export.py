"""Write a trained model into a folder of its own: python -m launch export runs/NAME FOLDER

The run may be going on: it is read, and left alone; its newest whole checkpoint counts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError
from launch.config.compose import command_line, compose
from launch.config.settings import EvalConfig
from launch.eval import sections_of_run
from launch.train import task_and_model
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row, of_split, read_rows


@dataclass
class ExportConfig:
    paths: list[str]
    """Two: the run's folder, and one that is not there yet."""


def main(arguments: list[str]) -> None:
    """Write the folder, and say what is in it."""
    config, _ = command_line(arguments, "export", ExportConfig)
    if len(config.paths) != 2:
        raise ConfigError("export takes two paths, a run and the folder that it writes: python -m "
                          "launch export runs/NAME FOLDER")  # fmt: skip
    run, folder = RunFolder(config.paths[0]), Path(config.paths[1])
    from scaling.checkpoint.checkpoint import load_model
    from scaling.models.pretrained import write_pretrained

    trained = compose("eval", [], EvalConfig, [str(run.path)], sections_of_run([str(run.path)]))
    task, model = task_and_model(trained)
    fix = "use the version of the program that wrote it"
    step, damage = load_model(run.checkpoints, model, task.digest, fix)
    if damage:
        print(f"{damage}: this is step {step} instead")
    channels = {"vectors": task.vectors, "scalars": task.scalars}
    sections = {key: asdict(trained)[key] for key in ("task", "model", "train", "execution")}
    said = {"step": step, "digest": task.digest, "environment": run.environment()}
    count = sum(p.numel() for p in model.parameters())
    rows = [row for row in of_split(run.rows(), "validation") if row["step"] == step]
    rows += [row for row in read_rows(run.path / "evaluations.jsonl") if row["step"] == step]
    text = "\n".join(_readme(folder.name, sections["model"]["name"], count, rows, said))
    content = {"model": sections["model"], **channels, "run": sections, **said}
    write_pretrained(folder, content, model.state_dict(), text + "\n")
    print(f"{folder}: {sections['model']['name']} at step {step:,}, {count:,} parameters")


def _readme(
    title: str, model: str, parameters: int, rows: list[Row], said: Mapping[str, Any]
) -> Iterator[str]:
    """What the model is, how well it does, and how it came about."""
    environment = said["environment"]
    size = f"`{model}` with {parameters:,} parameters, after {said['step']:,} steps"
    yield from (f"# {title}", "", f"{size}. Everything that it was told is in config.json.", "")
    if rows:
        yield from ("| Split | Samples | Loss | Standard error | Equivariance error |",
                    "|---|---|---|---|---|")  # fmt: skip
        for row in rows:
            data = f" of {row['store']}" if row.get("store") else ""
            error = row.get("standard_error")
            yield (f"| {row['split']}{data} | {row['samples']:,} | {row['loss']:.4g} "
                   f"| {'-' if error is None else f'{error:.2g}'} "
                   f"| {row['equivariance_error']:.1e} |")  # fmt: skip
        yield from ("", "Losses are mean squared errors over that of the trivial answer.", "")
    versions = environment.get("versions") or {}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield from ("Trained by", "", f"    {environment.get('command')}", "",
                f"commit {environment.get('git')}, {known}.", "", "```python",
                "from scaling.models import from_pretrained", "",
                'model = from_pretrained("this_folder")',
                "moved = model(batch)  # of data_pipeline.batch.GeometricBatch", "```")  # fmt: skip
