"""What all tests share: a pool of ranks that lives as long as the session."""

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["tests.left_out"]

POOL = 8
PATIENCE = 100.0  # seconds for one case, below pytest's own limit

torch.set_num_threads(1)


class OneOfRanksAtATime(LoadScopeScheduling):
    """A file's tests stay in one process, so that what it has built is built once; and all tests
    with ranks in one, for ranks of two tests at once would wait for each other on few cores."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        ranks = file.startswith(("tests/distributed/", "tests/integration/"))
        return "ranks" if ranks else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return OneOfRanksAtATime(config, log)


class RankPool:
    """Gloo ranks on this machine. A case runs on a group of them, which need not be the first ones:
    an operator that confuses group ranks and global ranks is found."""

    def __init__(self, folder: Path, size: int = POOL) -> None:
        self.folder, self.size = folder, size
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def __call__(
        self, function: Callable[..., Any], world: int, *args: Any, first_rank: int | None = None
    ) -> list[Any]:
        """Runs function(group, *args) on `world` ranks; their results, or the first error."""
        if not self.processes:
            self.start()
        first = self.size - world if first_rank is None else first_rank
        for pipe in self.pipes:
            pipe.send((function, first, world, args))
        results: dict[int, Any] = {}
        deadline = monotonic() + PATIENCE
        while len(results) < self.size:
            ready = wait(set(self.pipes) - {self.pipes[r] for r in results}, deadline - monotonic())
            error = "" if ready else f"no answer from ranks {set(range(self.size)) - set(results)}"
            for pipe in (pipe for pipe in self.pipes if pipe in ready):
                rank = self.pipes.index(pipe)
                results[rank], said = pipe.recv()
                error = error or (said and f"rank {rank}: {said}")
            if error:  # the others may wait for the failed one: the next case gets a new pool
                self.stop()
                pytest.fail(error, pytrace=False)
        return [results[rank] for rank in range(first, first + world)]

    def start(self) -> None:
        context = get_context("fork")  # shares the imports
        rendezvous = self.folder / uuid4().hex
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, rendezvous, theirs), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _serve(rank: int, size: int, rendezvous: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    # One process and ranks that are threads have their shapes checked in the same code.
    jaxtyping.config.update("jaxtyping_disable", True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    # No port of any use: DeepSpeed's shared memory of this machine is named after it.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getppid() * 10 + size)}
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    groups: dict[tuple[int, int], Any] = {}
    while True:
        function, first, world, args = pipe.recv()
        if (first, world) not in groups:
            groups[first, world] = dist.new_group(list(range(first, first + world)))
        result, error = None, None
        try:
            if first <= rank < first + world:
                result = function(groups[first, world], *args)
        except BaseException:  # reported to the test, on every rank
            error = traceback.format_exc()
        pipe.send((result, error))


@pytest.fixture(scope="session")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def deepspeed_worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankPool]]:
    """Pools of 2 and of 4 ranks: DeepSpeed takes all that there are. They share its import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: F401
        import torch._dynamo  # noqa: F401  which the first optimiser imports
    pools = {world: RankPool(tmp_path_factory.mktemp("pool"), world) for world in (2, 4)}
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are not checked, where one case after the other runs the same code: that would take
    half of the time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_configure() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
