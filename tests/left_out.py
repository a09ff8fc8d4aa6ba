"""Which tests this machine can run, and by name those that it cannot.

Every test is marked by its folder: unit, equivariance, distributed, integration. Further marks name
what a test needs: `gpu`, `slurm` (a running SLURM), `browser` (Chromium), `mmseqs`, `mpirun` (Open
MPI and MPICH), `root`, `nodes` (root and what makes network namespaces), `package("name")` (an
optional Python package; a test with the parameter `name=` of a model that needs one has it
unmarked). `slow` and `soak` tests run only where they are asked for: make test ARGS="-m slow".
"""

import os
import shutil
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent
MPIRUNS = ("mpirun.openmpi", "mpirun.mpich")
MODEL_PACKAGES = {"equiformer": "e3nn"}
ASKED_FOR = ("slow", "soak")
_left_out: defaultdict[str, list[str]] = defaultdict(list)


def missing() -> dict[str, str]:
    """Mark -> why this machine cannot run tests that have it."""
    reasons = {
        "gpu": None if torch.cuda.is_available() else "PyTorch sees no GPU",
        "slurm": _why_no_slurm(),
        "browser": None if shutil.which("chromium") else "Chromium is not installed",
        "mmseqs": None if shutil.which("mmseqs") else "MMseqs2 is not installed",
        "mpirun": None
        if all(map(shutil.which, MPIRUNS))
        else "Open MPI and MPICH are not installed",
        "root": None if os.geteuid() == 0 else "it needs root",
        "nodes": _why_no_nodes(),
    }
    return {mark: reason for mark, reason in reasons.items() if reason}


def _why_no_slurm() -> str | None:
    if not shutil.which("sinfo"):
        return "SLURM is not installed"
    asked = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=60)
    return "no SLURM is running here: make test-slurm" if asked.returncode else None


def _why_no_nodes() -> str | None:
    from data_pipeline.errors import ConfigError  # jaxtyping must see packages imported
    from scaling.experiments.two_nodes import check_tools

    try:
        check_tools()
    except ConfigError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = missing()
    for mark in ASKED_FOR:
        if mark not in str(config.getoption("markexpr")):
            reasons[mark] = f"{mark}: make test ARGS='-m {mark}' runs it"
    runs = []
    for item in items:
        item.add_marker(item.path.relative_to(TESTS).parts[0])
        why = [reason for mark, reason in reasons.items() if item.get_closest_marker(mark)]
        packages = [mark.args[0] for mark in item.iter_markers("package")]
        callspec = getattr(item, "callspec", None)
        model = callspec.params.get("name") if callspec else None
        packages += [MODEL_PACKAGES[model]] if model in MODEL_PACKAGES else []
        why += [f"{name} is not installed" for name in packages if not find_spec(name)]
        if why:
            _left_out[why[0]].append(item.nodeid)
        else:
            runs.append(item)
    items[:] = runs


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # one of several processes, which prints nothing
        output["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _left_out:
        return
    terminalreporter.section(f"{sum(map(len, _left_out.values()))} tests left out")
    for reason, names in _left_out.items():
        terminalreporter.line(f"{reason}:")
        for name in names:
            terminalreporter.line(f"    {name}")
