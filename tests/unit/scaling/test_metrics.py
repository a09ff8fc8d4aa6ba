"""metrics.jsonl is the truth, and every view of it agrees."""

import gzip
import json
import math
import mmap
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.counter_rng import evaluation_key
from data_pipeline.errors import RunError
from data_pipeline.tasks.registry import build_task
from scaling.engine.build import build_engine
from scaling.models import Model, build
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.observe.metrics import StepMeter
from scaling.observe.profile import StepProfiler
from scaling.observe.sinks import TensorBoardSink, about_run
from scaling.parallel.mesh import Mesh
from scaling.parallel.telemetry import exchanging, is_traced, timed
from scaling.runs.folder import RunFolder
from scaling.train.evaluate import Evaluation
from scaling.train.loop import optimizer_maker
from scaling.train.objective import Objective
from scaling.train.report import progress_line, summarise
from scaling.train.settings import OptimSettings, TrainSettings
from tests.small_models import PlainModel
from tests.threaded_ranks import run_threaded

CPU = torch.device("cpu")


def train_row(step: int, **values) -> dict:
    row = {"step": step, "split": "train", "loss": 1.0 / step, "tokens": 10}
    return row | {"tokens_per_s": 100.0 * step, "step_s": 0.1, "data_wait_s": 0.0} | values


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Step, value and time that TensorBoard shows of the training loss."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value, e.wall_time) for e in events.Scalars("loss/train")]


def test_tensorboard_shows_each_row_once_at_its_time(tmp_path):
    """Also after a resume, and after a second start."""
    rows = [train_row(step, time=1e9 + 60 * step) for step in range(1, 5)]
    shown = [(row["step"], pytest.approx(row["loss"]), row["time"]) for row in rows]

    def start(known: list[dict], *further: dict) -> set[Path]:
        sink = TensorBoardSink(tmp_path)
        sink.start(known)
        for row in further:
            sink.write(row)
        sink.close()
        return set(tmp_path.iterdir())

    start([], *rows[:3], train_row(4, loss=-1.0, time=5e9))
    resumed = start(rows[:2], rows[2])  # after step 2: what came later goes
    assert len(resumed) == 1 and curve(tmp_path) == shown[:3]
    assert start(rows[:3]) == resumed  # right already: nothing is written
    validation = {"step": 4, "split": "validation", "loss": 0.5, "equivariance_error": 1e-6}
    gone_on = start(rows[:3], rows[3], validation)
    assert gone_on > resumed and curve(tmp_path) == shown
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"speed/tokens_per_s", "time/step_s", "loss/validation"} <= set(events.Tags()["scalars"])
    assert not any(tag.partition("/")[2] == "time" for tag in events.Tags()["scalars"])


def test_what_is_said_about_a_run_is_there_once_and_follows_its_configuration(tmp_path):
    """Also where a process was killed between writing anew and removing what was before."""
    rows = [train_row(1, time=1e9)]

    def start(channels: int) -> list[Path]:
        (tmp_path / "config.yaml").write_text(f"model: {{channels: {channels}}}")
        (tmp_path / "identity.json").write_text(json.dumps({"model": {"channels": channels}}))
        run = RunFolder(tmp_path)
        sink = TensorBoardSink(run.tensorboard)
        sink.start(rows, about_run(run))
        sink.close()
        return sorted(run.tensorboard.iterdir())

    first = start(8)
    assert len(first) == 1 and start(8) == first
    twice = first[0].with_name(first[0].name + ".twice")
    shutil.copy(first[0], twice)
    mended = start(8)
    assert len(mended) == 1 and twice not in mended
    other = start(16)
    assert len(other) == 1 and other != mended
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("configuration/text_summary")
    assert b"channels: 16" in text.tensor_proto.string_val[0]
    assert {"command/text_summary", "_hparams_/session_start_info", "custom_scalars__config__"} < {
        *events.Tags()["tensors"], *events.summary_metadata
    }  # fmt: skip


def test_rows_of_early_versions_have_no_time(tmp_path):
    for _ in range(2):
        sink = TensorBoardSink(tmp_path)
        sink.start([train_row(1), train_row(2, loss=math.nan)])
        sink.close()
        assert [step for step, *_ in curve(tmp_path)] == [1, 2]
    assert len(list(tmp_path.iterdir())) == 1


def test_first_steps_are_left_out_of_the_rates(monkeypatch):
    """Steps of 5, 3, 1 and 1 seconds: the first two warm up."""
    now = 0.0
    monkeypatch.setattr("scaling.parallel.telemetry.perf_counter", lambda: now)
    meter = StepMeter(CPU)
    for number, seconds in enumerate((5, 3, 1, 1)):
        with meter.step():
            with timed("data_wait"):
                now += seconds / 16
            with timed("forward"):
                now += seconds / 2
            with timed("forward"), timed("transforms"):  # of the second micro-batch
                now += seconds / 16
                with timed("comm"), exchanging("test", 100 * number):
                    now += seconds / 8
                now += seconds / 16
            with timed("optimizer"):
                now += seconds / 8
            now += seconds / 16
            meter.tokens = 10 + number
        if number == 0:
            row = meter.row()
            assert (row["step_s"], row["tokens_per_s"]) == (5, 2)  # there is nothing better
    row = meter.row()
    assert row["step_s"] == 1 and row["forward_s"] == 0.75 and row["comm_bytes"] == 250
    assert row["tokens_per_s"] == (12 + 13) / 2 and row["tokens"] == 13
    split = ("projection_s", "transforms_s", "comm_s", "optimizer_s", "data_wait_s", "other_s")
    assert [row[part] for part in split] == [0, 0.125, 0.125, 0.125, 0.0625, 0.5625]
    assert row["peak_bytes"] > 0


@pytest.mark.parametrize(("steps", "traced"), [(2, None), (3, "3-3"), (9, "3-4")])
def test_traces_hold_the_steps_after_the_warm_up_or_say_that_there_are_none(
    tmp_path, steps, traced
):
    said = []
    with StepProfiler(tmp_path / "profile", 2, said.append) as profiler:
        for step in range(1, steps + 1):
            with profiler.step(step), timed(f"step{step}"):
                torch.ones(1)
                assert is_traced() == (2 < step < 5)
    (line,) = said
    assert not is_traced()
    if traced is None:
        assert "profile_steps=2 traced nothing: this process took 2 steps" in line
        return
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == f"rank0.steps{traced}.pt.trace.json.gz" and str(file) in line
    text = gzip.decompress(file.read_bytes()).decode()
    found = [step for step in range(1, 10) if f"longfold.step{step}" in text]
    assert found == [3, 4][: steps - 2]


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "profile").touch()
    with (
        pytest.raises(RunError, match="cannot write the trace"),
        StepProfiler(tmp_path / "profile", 1, print) as profiler,
    ):
        for step in range(1, 4):
            with profiler.step(step):
                torch.ones(1)
    assert not is_traced()


def test_peak_memory_is_seen_and_forgotten():
    """A map of our own: malloc may serve a block from what earlier tests left resident."""
    base = reset_peak(CPU)
    with mmap.mmap(-1, 64 << 20) as block:
        for _ in range(64):
            block.write(bytes(1 << 20))
    seen = peak_bytes(CPU) - base
    assert 60 << 20 < seen < 200 << 20
    assert reset_peak(CPU) < base + (30 << 20) and peak_bytes(CPU) < base + (30 << 20)


def test_plain_lines_and_summary_say_what_matters(tmp_path):
    parts = {"projection_s": 0.06, "other_s": 0.02, "comm_s": 0.0}
    rows = [train_row(step, peak_bytes=step << 20, **parts) for step in range(1, 21)]
    rows += [
        {"step": 20, "split": "validation", "loss": 0.25, "tokens": 5, "equivariance_error": 3e-6}
    ]
    first, second = (progress_line(row, 40) for row in rows[19:])
    assert first == "step 20/40 loss 0.0500 2,000 tokens/s data wait 0 ms eta 0:00:02"
    assert "validation loss 0.2500 equivariance error 3.0e-06" in second
    summary = summarise(tmp_path, rows, 20, "finished")
    summary.baselines = {"identity": 1.0}
    text = "\n".join(summary.lines())
    assert summary.train_loss == pytest.approx((1 / 19 + 1 / 20) / 2)
    assert summary.tokens_per_s == 1100  # median of all rows but the first
    assert "0.2500  (identity 1.0000)" in text and "20 MiB" in text
    assert " projection 75%, other 25%" in text
    assert text.endswith(f"tensorboard --logdir {tmp_path.parent}")
    assert "-" in "\n".join(summarise(tmp_path, [], 0, "interrupted").lines())


class Crooked(PlainModel):
    """Not equivariant: the first axis is special. One parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, batch, shard=None):
        torch.rand(1)  # an evaluation may not move training's random numbers
        vectors = batch.vectors * torch.tensor([1.0, 2.0, 1.0]).reshape(3, 1) * self.slope
        return batch.replace(vectors=vectors)


def evaluation(model: Model, rows: int) -> Evaluation:
    task = build_task("recall", tokens=9, held_out_size=5)
    objective = Objective(model, Mesh(1, 1))
    engine = build_engine(
        "ddp",
        objective,
        optimizer_maker(OptimSettings()),
        gradient_clipping=0.0,
        micro_batch_size=rows,
        accumulation=1,
        environment={},
    )
    return Evaluation(engine, objective, task, TrainSettings(micro_batch_size=rows))


def test_validation_counts_every_sample_once_and_disturbs_nothing():
    model = Crooked()
    before = torch.get_rng_state()
    row, *others = (evaluation(model, rows).row(7) for rows in (5, 2, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.slope.grad is None
    assert (row["step"], row["split"], row["tokens"]) == (7, "validation", 45)
    task = build_task("recall", tokens=9, held_out_size=5)
    keys = [evaluation_key("validation", item) for item in range(5)]
    sample = task.sample("validation", range(5), keys, 0, 9)
    answer = model(sample.inputs).vectors[:, 0].mean(-1)
    error = (answer - sample.target).square().mean().item()
    assert row["loss"] == pytest.approx(error / task.unit, rel=1e-5)
    for other in others:
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)


def test_equivariance_error_tells_equivariant_from_crooked():
    torch.manual_seed(0)
    scalars = build_task("recall", tokens=9).scalars
    straight = build("se3_hyena", 1, scalars, channels=2, hidden=2, operators=1)
    assert evaluation(straight, 4).row(1)["equivariance_error"] < 2e-5
    assert evaluation(Crooked(), 4).row(1)["equivariance_error"] > 0.1


def rows_of_ranks(group, slow: int | None) -> list[dict]:
    """Of twelve steps and then two more; one rank computes for 20 ms, others for 4."""
    meter, rows = StepMeter(CPU), []
    seconds = 0.02 if dist.get_rank() == slow else 0.004
    for steps in (11, 1, 2):
        for _ in range(steps):
            with meter.step(), timed("projection"):
                time.sleep(seconds)
        rows.append(meter.row())
    return rows


def test_a_slow_rank_is_named_after_ten_steps():
    """The first two of a process do not count."""
    for rows in run_threaded(rows_of_ranks, 3, 1):
        assert [row.get("slow_rank") for row in rows] == [None, 1, 1]
        assert 2 < rows[1]["slow_by"] <= 6
        assert progress_line(train_row(12) | rows[1], 20).endswith(" times as long as others")
    for rows in run_threaded(rows_of_ranks, 3, None):
        assert not any("slow_rank" in row for row in rows)
