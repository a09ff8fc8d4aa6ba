"""The house: who imports whom, what is declared, how large things are, and the linters."""

import ast
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("launch", "scaling", "data_pipeline")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

FLOORS = (
    "launch",
    "launch.checks",
    "launch.cluster",
    "launch.config",
    "launch.ranks",
    "scaling.report",
    "scaling.experiments",
    "scaling.train",
    "scaling.cost",
    "scaling.checkpoint",
    "scaling.engine",
    "scaling.observe",
    "scaling.models",
    "scaling.ops",
    "scaling.long_conv",
    "scaling.algebra",
    "scaling.parallel",
    "scaling.runs",
    "scaling",
    "data_pipeline.prepare",
    "data_pipeline.inspect",
    "data_pipeline.stream",
    "data_pipeline.tasks",
    "data_pipeline.sources",
    "data_pipeline.store",
    "data_pipeline",
)
"""The house from the top down: a module imports its own floor and those below it, nothing above."""

QUIET = ("scaling.models", "scaling.ops", "scaling.long_conv", "scaling.algebra", "data_pipeline")
"""Floors that know no process group: they hand a shard on."""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> str:
    """The innermost room of the list that the module lies in."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(name for name in names if name in FLOORS)


def imported_modules(file: Path) -> Iterator[str]:
    """Every module or name in one that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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


def test_imports_lead_downwards():
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in FILES
        for module in imports(file)
        if module.partition(".")[0] in PACKAGES
        and FLOORS.index(floor_of(module)) < FLOORS.index(floor_of(module_name(file)))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_is_a_floor():
    packages = [module_name(file) for file in FILES if file.name == "__init__.py"]
    assert {".".join(name.split(".")[:2]) for name in packages} <= set(FLOORS)


LONGEST_CHAIN = 6
"""Imports in a row inside data_pipeline, from one module to the next."""


def test_no_circle_of_imports_and_no_long_chain():
    modules = {module_name(file): file for file in FILES}
    below = {
        name: {m if m in modules else m.rpartition(".")[0] for m in imported_modules(file)}
        for name, file in modules.items()
    }
    chains: dict[str, list[str]] = {}

    def longest(name: str, above: tuple[str, ...] = ()) -> list[str]:
        assert name not in above, " -> ".join((*above, name))
        if name not in chains:
            others = [longest(other, (*above, name)) for other in below[name] & modules.keys()]
            chains[name] = [name, *max(others, key=len, default=[])]
        return chains[name]

    for name in modules:
        chain = longest(name)
        if name.startswith("data_pipeline"):
            assert len(chain) - 1 <= LONGEST_CHAIN, " -> ".join(chain)


def test_models_know_no_process_group():
    for file in FILES:
        if floor_of(module_name(file)).startswith(QUIET):
            for module in imports(file):
                assert not module.startswith(("torch.distributed", "deepspeed")), (file, module)


def test_every_third_party_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = (extras[name] for name in ("equiformer", "proteins", "sidechainnet"))
    wanted = [*project["dependencies"], *chain.from_iterable(optional)]
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


HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
"""What is checked before every commit, and here: one list."""


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_what_is_checked_before_a_commit_holds(hook: dict[str, Any]):
    """Over all files, with the programs of this environment."""
    programs = f"{Path(sys.executable).parent}/"
    command = [word.replace(".venv/bin/", programs) for word in shlex.split(hook["entry"])]
    if hook.get("pass_filenames", True):
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        kinds = (".py",) if "python" in hook.get("types_or", ["python"]) else ("",)
        command += [name for name in listed.stdout.splitlines() if name.endswith(kinds)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
