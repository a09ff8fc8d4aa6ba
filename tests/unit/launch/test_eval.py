"""A run evaluated after training: its last validation again, other splits and stores, mistakes."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError, RunError, StoreError
from data_pipeline.sources.arrays import ArraySource
from data_pipeline.store.build import build
from launch import eval as evaluation
from launch import plan, train
from scaling.models import MODELS
from scaling.runs.rows import Row, of_split, read_rows
from scaling.train.report import Reporter, Summary
from tests.small_models import NEAR

SMALL = ["model.channels=2", "model.hidden=4", "model.operators=1", "train.batch_size=4",
         "train.micro_batch_size=2", "train.steps=4", "train.save_every=2", "train.log_every=1",
         "optim.warmup_steps=0", "engine=ddp", "device=cpu"]  # fmt: skip
RECALL = ["experiment=recall", "task.held_out_size=5", *SMALL]


def evaluate(run: Path, *overrides: str) -> Row:
    """The row that the command adds."""
    evaluation.main([str(run), *overrides])
    return read_rows(run / "evaluations.jsonl")[-1]


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train.main([*RECALL, f"runs={runs}", "name=recall"])
    return runs / "recall"


def test_a_deterministic_run_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And trains: no operator lacks such an algorithm."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    monkeypatch.setattr(
        torch.Tensor,
        "backward",
        lambda x, *a, _run=torch.Tensor.backward, **k: (
            seen.append(torch.are_deterministic_algorithms_enabled()) or _run(x, *a, **k)
        ),
    )
    try:
        for told in ("false", "true"):
            train.main([*RECALL, f"runs={tmp_path}", f"name={told}", f"train.deterministic={told}"])
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert seen == 4 * 2 * [False] + 4 * 2 * [True]


@pytest.fixture
def copy(recall: Path, tmp_path: Path) -> Path:
    """A run that a test may spoil."""
    return Path(shutil.copytree(recall, tmp_path / "recall"))


def write_store(path: Path, vectors: int = 0, seed: int = 0, splits: str = "rrrve") -> Path:
    """Five sequences of points, in splits t(r)ain, (v)alidation and t(e)st."""
    random = np.random.default_rng(seed)
    names = {"r": "train", "v": "validation", "e": "test"}
    arrays: dict[str, Any] = {
        "points": random.normal(size=(60, 3)).cumsum(0),
        "offsets": np.arange(0, 61, 12),
        "split": np.array([names[letter] for letter in splits]),
    }
    if vectors:
        arrays["vectors"] = random.normal(size=(60, vectors, 3))
    np.savez(path.with_suffix(".npz"), **arrays)
    build(path, ArraySource(path.with_suffix(".npz")))
    return path


@pytest.fixture(scope="module")
def denoising(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    store = write_store(runs / "store")
    data = [f"task.store={store}", "task.atoms=[point]", "task.neighbours=2"]
    train.main([*SMALL, *data, f"runs={runs}", "name=denoising"])
    return runs / "denoising"


def without_times(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("time", "step_s")}


@pytest.mark.parametrize("name", ["recall", "denoising"])
def test_validation_is_that_of_the_training_to_the_last_digit(name: str, request):
    run = request.getfixturevalue(name)
    (last,) = of_split(read_rows(run / "metrics.jsonl"), "validation")
    row = evaluate(run, "split=validation")
    assert without_times(last).items() <= row.items()
    assert row["standard_error"] > 0 if name == "recall" else row["samples"] == 1
    summary = json.loads((run / "status.json").read_text())["summary"]
    assert row["baselines"] == summary["baselines"]


TASKS = {
    "recall": ["task.tokens=16", "task.held_out_size=2"],
    "needles": ["task.tokens=24", "task.pairs=4", "task.held_out_size=2"],
    "nbody": ["task.particles=20", "task.train_size=8", "task.held_out_size=2", "task.steps=20"],
    "denoising": ["task.neighbours=1", "task.atoms=[point]"],
}


@pytest.mark.slow  # some minutes
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_and_is_evaluated_and_planned_on_every_task(model, task, tmp_path):
    tiny = {key: "null" if x is None else x for key, x in MODELS[model].tiny().items()}
    options = [f"model.{key}={value}" for key, value in tiny.items()]
    data = TASKS[task]
    if task == "denoising":
        data = [*data, f"task.store={write_store(tmp_path / 'store')}"]
    if "neighbours" in tiny:
        options = [*options, "model.neighbours=3"]
    told = [f"task={task}", f"model={model}", *data, *options, "train.batch_size=2",
            "train.micro_batch_size=2", "engine=ddp", "device=cpu"]  # fmt: skip
    run = [*told, "train.steps=1", f"runs={tmp_path}", "name=run", "optim.warmup_steps=0"]
    if model in NEAR and task in ("recall", "needles"):  # where nothing has a place
        with pytest.raises(ConfigError, match="all points of row 0 are at one place"):
            train.main(run)
    else:
        train.main(run)
        row = evaluate(tmp_path / "run")
        assert np.isfinite(row["loss"]) and row["samples"] >= 1
    plan.main([*told, "ranks=2", "machine=h100", f"output={tmp_path}"])
    assert json.loads((tmp_path / "plan.json").read_text())["step_s"] > 0


def test_other_splits_precisions_and_micro_batches(recall: Path, capsys):
    test = evaluate(recall)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{recall} at step 4, test: 5 samples, 160 tokens"
    assert f"{test['loss']:.4f} ± {test['standard_error']:.4f}" in said[1] and "zero" in said[1]
    assert said[-1] == f"  added to {recall / 'evaluations.jsonl'}"
    double = evaluate(recall, "train.precision=float64", "train.micro_batch_size=1")
    assert double["equivariance_error"] < 1e-12 < test["equivariance_error"]
    for key in ("loss", "standard_error"):
        assert test[key] == pytest.approx(double[key], rel=1e-5)
        assert test[key] != pytest.approx(evaluate(recall, "split=validation")[key], rel=1e-3)


def test_what_the_run_was_told_may_be_said_again(recall: Path):
    again = evaluate(recall, "model=se3_hyena", "model.channels=2", "model.hidden=4",
                     "model.operators=1", "task.held_out_size=5", "parallel=data")  # fmt: skip
    assert without_times(again) == without_times(evaluate(recall))


def test_a_run_in_progress_is_read_and_goes_on_undisturbed(copy: Path, monkeypatch):
    """Evaluated while the training holds its lock; the rows of both stay apart."""
    rows, finish = [], Reporter.finish

    def evaluated(*arguments: Any) -> Summary:
        before = (copy / "metrics.jsonl").read_bytes()
        rows.append(evaluate(copy))
        assert (copy / "metrics.jsonl").read_bytes() == before
        return finish(*arguments)

    monkeypatch.setattr(Reporter, "finish", evaluated)
    train.main([*RECALL, f"runs={copy.parent}", "name=recall", "train.steps=6"])
    assert [row["step"] for row in rows] == [6]
    steps = [row["step"] for row in of_split(read_rows(copy / "metrics.jsonl"), "train")]
    assert steps == [1, 2, 3, 4, 5, 6]


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_serves(copy: Path, capsys):
    last = copy / "checkpoints" / "step-00000004"
    damage(last / "optimizer-00000.pt")  # which no evaluation needs
    assert evaluate(copy)["step"] == 4
    damage(last / "model-00000.pt")
    capsys.readouterr()
    assert evaluate(copy)["step"] == 2
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{last} is damaged (") and first.endswith("this is step 2 instead")
    (copy / "checkpoints" / "step-00000002" / "state.json").unlink()
    with pytest.raises(RunError, match=r"step-00000004 is damaged \(.*\), and so is every older"):
        evaluate(copy)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "split": (["split=tset"], "split='tset': must be 'train', 'validation' or 'test'"),
    "model option": (["model.channels=3"], "was trained otherwise: model.channels was 2, is 3;"),
    "model": (
        ["model=se3_hyena_paper"],
        "otherwise: model.name was 'se3_hyena', is 'se3_hyena_paper'; leave",
    ),
    "task option": (["task.held_out_size=9"], "task.held_out_size was 5, is 9;"),
    "task": (["task=denoising"], "otherwise: task.name was 'recall', is 'denoising'; leave"),
    "store": (["store=x"], "store=x does not suit the run's task: recall makes its samples"),
    "no key": (["train.steps=3"], "unknown key train.steps; it has: micro_batch_size"),
    "no section": (["optim.lr=1"], "unknown key optim;"),
    "no group": (["engine=ddp"], "eval takes no engine=...: python -m launch eval --help"),
    "bound": (["train.micro_batch_size=0"], "train.micro_batch_size=0: must be greater"),
    "length": (["train.max_length=3"], "train.max_length=3: sequence 0 of test has 32 tokens"),
    "mesh": (["parallel.sp=2"], "but the world has 1 rank"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(recall: Path, mistake: str):
    overrides, named = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        evaluate(recall, *overrides)
    assert named in str(error.value) and "\n" not in str(error.value)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (shutil.rmtree, "is no run (there is no such folder)"),
    "no run": (lambda run: (run / "config.yaml").unlink(), "is no run (has no config.yaml)"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
    "no YAML": (
        lambda run: (run / "config.yaml").write_text("a: [b\nc: }"),
        "config.yaml cannot be read",
    ),
    "no text": (
        lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe"),
        "config.yaml cannot be read",
    ),
    "a sweep": (
        lambda run: (run / "config.yaml").write_text("model: {name: se3_hyena}"),
        "is no training run: its config.yaml has no task",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_folder_that_holds_no_run_is_one_line(copy: Path, spoilt: str):
    spoil, named = SPOILT[spoilt]
    spoil(copy)
    with pytest.raises(RunError) as error:
        evaluation.main([str(copy)])
    assert named in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"eval takes one path, .* and not 2"):
        evaluation.main([str(copy), str(copy)])


def test_another_store_of_the_same_kind(denoising: Path, tmp_path: Path):
    """Its own numbers; with several, those of all of them together."""
    other = write_store(tmp_path / "other", seed=1, splits="eeeee")
    row, own = evaluate(denoising, f"store={other}"), evaluate(denoising)
    assert (row["samples"], own["samples"]) == (5, 1) and row["store"] == str(other)
    both = evaluate(denoising, f"store=[{other},{denoising.parent / 'store'}]")
    assert both["samples"] == 6
    # Noise is numbered through the mixture, so that the second store's is another than alone.
    assert both["loss"] == pytest.approx((5 * row["loss"] + own["loss"]) / 6, rel=0.2)
    with pytest.raises(ConfigError, match=r"split=train is empty; there are test \(5 samples\)$"):
        evaluate(denoising, f"store={other}", "split=train")


def test_a_store_that_does_not_suit_the_run(denoising: Path, tmp_path: Path):
    write_store(tmp_path / "wide", vectors=2)
    wide = re.escape(f"store={tmp_path / 'wide'} gives 6 vector and")
    with pytest.raises(RunError, match=rf"holds another model: .*; {wide} \d+ scalar channels"):
        evaluate(denoising, f"store={tmp_path / 'wide'}")
    with pytest.raises(StoreError, match="there is no store at"):
        evaluate(denoising, f"store={tmp_path / 'none'}")
    with pytest.raises(ConfigError, match=r"task\.store was .*store=\.\.\. chooses other data"):
        evaluate(denoising, f"task.store={tmp_path / 'wide'}")


def test_data_that_changed_since_training_are_not_taken_for_the_same(denoising: Path):
    store = denoising.parent / "store"
    kept = store.rename(store.with_name("kept"))
    try:
        write_store(store, seed=2)
        with pytest.raises(RunError, match="was trained on other data than the task's store holds"):
            evaluate(denoising)
        assert evaluate(denoising, f"store={store}")["samples"] == 1
    finally:
        shutil.rmtree(store)
        kept.rename(store)
