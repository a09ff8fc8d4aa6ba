"""A trained model in a folder of its own: the same model, the same numbers, without its run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.tasks.registry import build_task
from launch import eval as evaluation
from launch import export, train
from scaling.engine.shards import PARAMETER
from scaling.models import from_pretrained
from scaling.runs.rows import Row, of_split, read_rows
from tests.states import saved_tensors

RECALL = ["experiment=recall", "task.held_out_size=5", "model.channels=2", "model.hidden=4",
          "model.operators=1", "train.batch_size=4", "train.micro_batch_size=2", "train.steps=2",
          "optim.warmup_steps=0", "engine=ddp", "device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train.main([*RECALL, f"runs={runs}", "name=recall"])
    return runs / "recall"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    evaluation.main([str(run)])
    export.main([str(run), str(run.parent / "model")])
    return run.parent / "model"


def evaluate(folder: Path, *overrides: str) -> Row:
    evaluation.main([str(folder), *overrides])
    row = read_rows(folder / "evaluations.jsonl")[-1]
    return {key: value for key, value in row.items() if key not in ("time", "step_s")}


def test_the_model_is_the_runs_and_needs_no_engine(run: Path, exported: Path, tmp_path: Path):
    saved = saved_tensors(run / "checkpoints" / "step-00000002")
    state = from_pretrained(exported).state_dict()
    names = {name: f"model.{name}/{PARAMETER}" for name in state}
    assert {name for name in saved if name.endswith(PARAMETER)} == set(names.values())
    assert all(torch.equal(saved[names[name]], x.flatten()) for name, x in state.items())
    script = (
        "import sys; from scaling.models import from_pretrained\n"
        f"model = from_pretrained({str(exported)!r})\n"
        "assert not {'deepspeed', 'hydra', 'zarr'} & sys.modules.keys()\n"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) == sum(x.numel() for x in state.values())


def test_it_is_evaluated_like_the_run(run: Path, exported: Path):
    for overrides in ([], ["split=validation", "train.precision=float64"]):
        assert evaluate(exported, *overrides) == evaluate(run, *overrides)
    with pytest.raises(ConfigError, match=r"was trained otherwise: model\.hidden"):
        evaluation.main([str(exported), "model.hidden=5"])


def test_its_readme_has_the_numbers_and_the_command(run: Path, exported: Path):
    text = (exported / "README.md").read_text()
    (last,) = of_split(read_rows(run / "metrics.jsonl"), "validation")
    assert f"| validation | 5 | {last['loss']:.4g} |" in text and "| test | 5 |" in text
    assert json.loads((run / "environment.json").read_text())["command"] in text
    config = json.loads((exported / "config.json").read_text())
    task = build_task("recall")
    assert (config["vectors"], config["scalars"]) == (task.vectors, task.scalars)
    assert config["step"] == 2 and config["model"]["hidden"] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "export takes folders before the first key=value"),
        (["RUN"], "export takes two paths, a run and the folder that it writes"),
        (["RUN", "MODEL"], "MODEL exists already: name another folder, or remove it"),
        (["MODEL/none", "MODEL/new"], "MODEL/none is no run"),
        (["RUN", "RUN/metrics.jsonl/new"], "RUN/metrics.jsonl/new cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_one_line(arguments, said, run, exported):
    def real(text: str) -> str:
        return text.replace("RUN", str(run)).replace("MODEL", str(exported))

    with pytest.raises((ConfigError, RunError), match=real(said)):
        export.main([real(each) for each in arguments])


def test_a_damaged_folder_is_named(exported: Path, tmp_path: Path):
    with pytest.raises(RunError, match=r"no exported model \(no config.json\)"):
        from_pretrained(tmp_path)
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-4])
    with pytest.raises(RunError, match=r"model.safetensors cannot be read .* export the run again"):
        from_pretrained(copy)
    (copy / "model.safetensors").write_bytes(weights)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["hidden"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"is of another model than config\.json"):
        from_pretrained(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        from_pretrained(copy)
