"""The house: who imports whom, what is declared, how large things are, and the linters."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("launch", "scaling", "data_pipeline")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

BELOW = {"launch": {"scaling", "data_pipeline"}, "scaling": {"data_pipeline"}, "data_pipeline": ()}
"""Which of the three packages each may import."""

_LOCAL = {"algebra", "parallel", "ops", "models"}
INSIDE_SCALING = {
    "algebra": set(),
    "parallel": {"algebra"},
    "ops": {"parallel", "algebra"},
    "models": {"ops", "parallel", "algebra"},
    "observe": _LOCAL,
    "train": _LOCAL | {"observe"},
    "bench": _LOCAL | {"observe"},
    "curves": _LOCAL | {"observe", "bench"},
}
"""train, bench, curves, observe -> models -> ops -> parallel; algebra is a leaf."""


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too, by its full name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_packages_import_downwards_only():
    wrong = []
    for file in FILES:
        package, *rest = file.relative_to(ROOT).with_suffix("").parts
        for module in imports(file):
            target, *inside = module.split(".")
            if target in PACKAGES and target != package and target not in BELOW[package]:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
            if package == target == "scaling" and inside and len(rest) > 1:
                room, other = rest[0], inside[0]
                if other in INSIDE_SCALING and other not in INSIDE_SCALING[room] | {room}:
                    wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_rooms_of_scaling_are_known():
    rooms = {
        file.relative_to(ROOT / "scaling").parts[0] for file in FILES if "scaling" in file.parts
    }
    assert rooms - {"__init__.py", "execution.py"} == set(INSIDE_SCALING)


def test_models_know_no_process_group():
    """Models, algebra and ops hand a shard on; data_pipeline knows files alone."""
    quiet = [ROOT / "scaling" / room for room in ("models", "algebra", "ops")]
    quiet.append(ROOT / "data_pipeline")
    for file in FILES:
        if any(folder in file.parents for folder in quiet):
            for module in imports(file):
                assert not module.startswith(("torch.distributed", "deepspeed")), (file, module)


def test_every_third_party_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["proteins"], *extras["sidechainnet"]]
    declared = {_normal(requirement) for requirement in wanted}
    providers = packages_distributions()
    for file in FILES:
        for module in imports(file):
            top = module.partition(".")[0]
            if top in sys.stdlib_module_names or top in PACKAGES:
                continue
            names = {_normal(name) for name in providers.get(top, [top])}
            assert names & declared, f"{file.relative_to(ROOT)} imports {top}: declare {names}"


def _normal(requirement: str) -> str:
    name = requirement
    for mark in "<>=!~[; ":
        name = name.partition(mark)[0]
    return name.lower().replace("_", "-")


def test_pinned_versions_satisfy_what_is_declared():
    """constraints.txt names every direct dependency but torch, at an exact version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {_normal(name) for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {_normal(r) for r in project["dependencies"] + project["optional-dependencies"]["dev"]}
    assert "torch" not in pinned
    assert direct - pinned == {"torch"}


def test_files_and_functions_are_small():
    for file in FILES:
        text = file.read_text()
        assert len(text.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno < 80, (file, node.name)


def test_only_packages_have_init_files():
    for folder in ("configs", "slurm", "tests"):
        assert not list((ROOT / folder).rglob("__init__.py"))
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()


LINTERS = {
    "ruff check": ["--no-cache"],
    "ruff format --check": ["--no-cache"],
    "pyright": ["--pythonpath", sys.executable],
    "codespell_lib": [],
}


@pytest.mark.parametrize("tool", LINTERS)
def test_linters_are_content(tool: str):
    command = [sys.executable, "-m", *tool.split(), *LINTERS[tool]]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
