"""One module under every launcher: the same curve, and errors that end all ranks with one line."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.sources.bundled import BundledSource
from data_pipeline.store.build import build
from launch import train
from scaling.observe.metrics import TIME_SHARES
from scaling.runs.rows import read_rows
from tests.processes import run

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY = ["experiment=recall", "task.held_out_size=4", "model.channels=2", "model.hidden=4",
        "model.operators=1", "train.steps=4", "train.batch_size=4", "train.micro_batch_size=2",
        "train.log_every=1", "optim.warmup_steps=0", "device=cpu"]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--main_process_port", "0", "--config_file"]

pytestmark = pytest.mark.timeout(300)  # the runs together, on a busy machine


def commands(port: int) -> dict[str, list[str]]:
    """Run name -> command and the overrides that differ; deepspeed inserts its --local_rank."""
    return {
        "torchrun": [*TORCHRUN, "-m", "launch.train", "engine=ddp", "parallel=data"],
        "accelerate": [*ACCELERATE, "configs/accelerate/cpu_deepspeed_zero1.yaml",
                       "-m", "launch.train", "train.profile_steps=1"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port),
                      "--module", "launch.train", "engine.zero_stage=0"],
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(command: list[str], *overrides: str, **variables: str) -> subprocess.CompletedProcess:
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | variables
    return run([*command, *TINY, *overrides], cwd=ROOT, env=environ)


def curve(run: Path) -> list[tuple[int, str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["split"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each launcher's run, one after another: ranks that spin for each other share few cores; and
    `python`, without a launcher, in this process."""
    folder = tmp_path_factory.mktemp("runs")
    train.main([*TINY, "engine=ddp", f"runs={folder}", "name=python"])
    built = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    for name, command in commands(free_port()).items():
        ended = start(command, f"runs={folder}", f"name={name}", **built)
        assert ended.returncode == 0, f"{name}: {ended.stdout}{ended.stderr}"
    return folder


def test_all_launchers_give_the_same_curve(runs: Path):
    """Engines DDP and ZeRO-0 and -1, sequence and data parallel: one loss curve."""
    reference = curve(runs / "python")
    assert [(step, split) for step, split, _ in reference] == [
        (1, "train"), (2, "train"), (3, "train"), (4, "train"), (4, "validation"),
    ]  # fmt: skip
    assert len({loss for *_, loss in reference}) == 5
    for name in commands(0):
        for (step, split, loss), (*place, expected) in zip(
            curve(runs / name), reference, strict=True
        ):
            assert [step, split] == place, name
            assert loss == pytest.approx(expected, rel=1e-5), (name, step, split)


def test_all_launchers_used_two_ranks(runs: Path):
    """What was recorded, so that no launcher quietly trained on one."""
    for name in commands(0):
        environment = json.loads((runs / name / "environment.json").read_text())
        assert environment["world"] == 2, name


def test_every_rank_has_a_log_from_its_start_to_its_end(runs: Path):
    """Under every launcher; with the steps that were done, and what it wrote of the checkpoint."""
    for name in commands(0):
        for rank in range(2):
            file = runs / name / "logs" / f"rank-{rank:05d}.jsonl"
            said = [json.loads(line) for line in file.read_text().splitlines()]
            assert {record["rank"] for record in said} == {rank}
            words = ["begins, cpu, one of 2 rank(s)", "first step", "wrote this rank's part"]
            words += ["is complete"] * (rank == 0) + ["finished at step 4", "ends"]
            places = [next((n for n, record in enumerate(said) if word in record["text"]), -1)
                      for word in words]  # fmt: skip
            assert places == sorted(places) and places[0] >= 0, (name, said)
            assert (said[places[1]]["step"], said[-1]["step"]) == (1, 4)


@pytest.mark.parametrize(
    ("launcher", "name", "mesh"),
    [
        (TORCHRUN, "python", "parallel=sequence"),
        ([*ACCELERATE, "configs/accelerate/cpu_deepspeed_zero1.yaml"], "torchrun", "parallel=data"),
    ],
)
def test_two_ranks_evaluate_a_run_of_any(runs: Path, launcher: list[str], name: str, mesh: str):
    """The run's last validation again, said by the first rank alone."""
    command = [*launcher, "-m", "launch.eval", str(runs / name), "split=validation", mesh]
    ended = run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("validation: 4 samples, 128 tokens") == 1
    (row,) = read_rows(runs / name / "evaluations.jsonl")
    step, split, loss = curve(runs / name)[-1]
    assert (row["step"], row["split"]) == (step, split)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)


def test_deepspeed_compiled_nothing(runs: Path):
    """Its first start on a CPU would take two minutes and a compiler, for what inference uses."""
    assert not (runs / "extensions").exists()


def test_a_trace_and_the_rows_say_where_the_time_went(runs: Path):
    """Of each rank the steps after the warm-up, with our ranges; parts of a step fit into it."""
    files = sorted((runs / "accelerate" / "profile").iterdir())
    assert [file.name for file in files] == [
        f"rank{rank}.steps3-3.pt.trace.json.gz" for rank in range(2)
    ]
    for file in files:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        calls = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
        ranges = {name.removeprefix("longfold."): n for name, n in calls.items() if "fold" in name}
        steps = {"data_wait", "forward", "backward", "optimizer"}
        assert ranges.keys() == steps | {"projection", "transforms", "comm"}
        assert ranges["data_wait"] == ranges["optimizer"] == 1
        assert ranges["transforms"] == 4  # micro-batches, forward and backward
    assert not (runs / "torchrun" / "profile").exists()
    for name in ("python", *commands(0)):
        lines = (runs / name / "metrics.jsonl").read_text().splitlines()
        for row in (row for row in map(json.loads, lines) if row["split"] == "train"):
            split = [row[part] for part in TIME_SHARES]
            assert min(split) >= 0 and sum(split) <= row["step_s"] * 1.0001
            assert row["transforms_s"] > 0
            assert (row["comm_s"] > 0) == (name in ("accelerate", "deepspeed"))


ENDLESS = ["train.steps=100000", "train.save_every=100000", "train.evaluate_every=100000"]


def rows_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_until(what: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def state_of(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def launcher_is_killed(command: list[str], run: Path, **variables: str) -> None:
    """In the middle of training, by SIGKILL; its ranks then save and stop within a step."""
    options = [*TINY, *ENDLESS, f"runs={run.parent}", f"name={run.name}", "engine=ddp"]
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | variables
    with (run.parent / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, *options], cwd=ROOT, env=environ, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: rows_of(run) > 2)
        launcher.kill()
        launcher.wait()
        before = rows_of(run)
        wait_until(lambda: state_of(run) != "running")
        said = (run.parent / "log").read_text()
        assert state_of(run) == "interrupted", said
        # The step that was under way, and the one in which a rank noticed.
        latest = max(path.name for path in (run / "checkpoints").iterdir())
        assert before <= int(latest.removeprefix("step-")) <= before + 3
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "launcher",
    ["torchrun", "wrapped", *(pytest.param(x, marks=pytest.mark.slow) for x in
                              ("accelerate", "deepspeed"))],
)  # fmt: skip
def test_ranks_whose_launcher_was_killed_save_and_stop(launcher: str, tmp_path: Path):
    ranks = ["-m", "launch.train", "parallel=data"]
    shell = ["--no-python", "sh", "-c", f'{sys.executable} -m launch.train "$@"; true', "rank"]
    launcher_is_killed(
        {
            "torchrun": [*TORCHRUN, *ranks],
            "wrapped": [*TORCHRUN, *shell],
            "accelerate": [*ACCELERATE, "configs/accelerate/cpu_plain.yaml", *ranks],
            "deepspeed": commands(free_port())["deepspeed"][:-1],
        }[launcher],
        tmp_path / "run",
    )


def test_a_plain_process_goes_on_without_whoever_started_it(tmp_path: Path):
    """In the background of a shell that has ended, as nohup leaves it."""
    run = tmp_path / "run"
    options = [*TINY, *ENDLESS, f"runs={tmp_path}", "name=run", "engine=ddp"]
    script = '"$@" > /dev/null 2>&1 & echo $!'
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "launch", "train", *options]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    pid = int(subprocess.check_output(command, cwd=ROOT, env=environ, timeout=60))
    try:
        wait_until(lambda: rows_of(run) > 5)
        assert state_of(run) == "running"
        os.kill(pid, signal.SIGUSR2)  # a warning of SLURM's: it saves and stops
        wait_until(lambda: state_of(run) != "running")
        assert state_of(run) == "interrupted"
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


MPIRUNS = {
    "mpirun.openmpi": ["--allow-run-as-root", "--oversubscribe", "-n", "2"],
    "mpirun.mpich": ["-n", "2"],
}


@pytest.mark.slow
@pytest.mark.mpirun
@pytest.mark.parametrize("program", MPIRUNS)
def test_mpirun_gives_the_same_curve_and_its_end_ends_the_ranks(program: str, tmp_path: Path):
    command = [program, *MPIRUNS[program], sys.executable, "-m", "launch.train", "engine=ddp"]
    port = {"MASTER_PORT": str(free_port())}
    ended = start(command, f"runs={tmp_path}", "name=mpi", **port)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads((tmp_path / "mpi" / "environment.json").read_text())["world"] == 2
    train.main([*TINY, "engine=ddp", f"runs={tmp_path}", "name=one"])
    reference = curve(tmp_path / "one")
    assert curve(tmp_path / "mpi") == [(*at, pytest.approx(x, rel=1e-5)) for *at, x in reference]
    if program == "mpirun.openmpi":  # Hydra kills its ranks itself
        launcher_is_killed(command, tmp_path / "killed", **port)


def test_packed_samples_sharded_over_two_ranks_give_the_curve_of_one(tmp_path: Path):
    """Samples of many chains, cut inside a chain, from a store on the disk."""
    build(tmp_path / "store", BundledSource())
    options = [f"task.store={tmp_path / 'store'}", "task.atoms=[CA]", "task.neighbours=2",
               "task.packed_length=1501", "train.batch_size=2", "train.micro_batch_size=1",
               "train.steps=3", "engine=ddp", f"runs={tmp_path}"]  # fmt: skip
    tiny = [each for each in TINY if not each.startswith(("experiment", "task.", "train."))]
    tiny += ["train.log_every=1", "optim.warmup_steps=0"]
    train.main([*tiny, *options, "name=one"])
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = run(
        [*TORCHRUN, "-m", "launch.train", *tiny, *options, "name=two"], cwd=ROOT, env=environ
    )
    assert ended.returncode == 0, ended.stderr
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len({loss for *_, loss in one}) == 4
    assert two == [(*place, pytest.approx(loss, rel=1e-5)) for *place, loss in one]


def test_an_error_of_all_ranks_is_said_once_and_ends_them(runs: Path):
    """A run directory of another configuration, found out inside the process group."""
    command = [*TORCHRUN, "-m", "launch.train", "engine=ddp"]
    ended = start(command, "train.seed=1", f"runs={runs}", "name=torchrun")
    assert ended.returncode != 0
    said = [
        line for line in ended.stderr.splitlines() if "belongs to another configuration" in line
    ]
    assert len(said) == 1 and said[0].startswith("error: "), ended.stderr
    assert "train.seed was 0, is 1" in said[0]


def test_a_mesh_that_does_not_fit_names_the_product(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"dp\(2\) \* sp\(3\) = 6, but the world has 1 rank"):
        train.main([*TINY, "engine=ddp", f"runs={tmp_path}", "parallel.dp=2", "parallel.sp=3"])


def test_accelerate_and_the_configuration_must_agree(tmp_path: Path, monkeypatch):
    """Two engines, two ZeRO stages: an error that names both."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"told to use DeepSpeed, but engine\.name = 'ddp'"):
        train.main([*TINY, "engine=ddp", f"runs={tmp_path}", "name=a"])
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    command = [sys.executable, "-m", "launch", "train", "engine.zero_stage=1"]
    ended = start(command, f"runs={tmp_path}", "name=b", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "zero_optimization.stage = 2, but engine.zero_stage = 1" in line
    assert "Traceback" not in ended.stderr
