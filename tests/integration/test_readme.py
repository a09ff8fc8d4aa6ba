"""What the README tells users to type works as it stands there."""

import os
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split(" # ")[0].strip()
    for line in README.splitlines()
    if re.match(r"    (make|python|torchrun|accelerate|deepspeed|source)\b", line)
]
MAKE = [*(c for c in COMMANDS if c.startswith("make")), *re.findall(r"`(make [^`]+)`", README)]
LAUNCHES = [command for command in COMMANDS if re.search(r"-m launch|--module launch", command)]


def execute(command: list[str], cwd: Path):
    return run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_the_lists_are_not_empty():
    assert len(MAKE) >= 4 and len(LAUNCHES) >= 6


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command):
    ended = execute([*shlex.split(command), "--dry-run"], cwd=ROOT)
    assert ended.returncode == 0, ended.stderr


def test_files_that_commands_and_links_name_exist():
    named = re.findall(r"\]\(([^)#:]+)\)", README)
    named += re.findall(r"(?:configs|slurm|tests|docs|data_pipeline)/[\w./-]*\w", README)
    named = [name for name in named if name != "slurm/site.env"]  # which the user makes
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("command", LAUNCHES)
def test_configurations_compose(command, tmp_path):
    """Whatever the launcher, its overrides make a configuration."""
    arguments = re.split(r"(?:-m launch\.|-m launch |--module launch\.)", command)[1]
    ended = execute(
        [sys.executable, "-m", "launch", *shlex.split(arguments), "--cfg"], cwd=tmp_path
    )
    assert ended.returncode == 0 and re.match(r"\w+:", ended.stdout), ended.stderr


@pytest.mark.parametrize("page", ["data", "store"])
def test_commands_of_the_data_pages_compose(page, tmp_path, monkeypatch):
    """Their options exist and have such values."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    commands = re.findall(r"^    python -m launch (prepare|train) (.*)", text, re.M)
    assert commands
    for name, arguments in commands:
        known = arguments.replace("source=NAME source.option=value", "").replace("...", "a")
        with pytest.raises(SystemExit) as ended:
            import_module(f"launch.{name}").main([*shlex.split(known, comments=True), "--cfg"])
        assert not ended.value.code


def test_the_example_runs_on_two_ranks(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (example,) = (x for x in examples if "vector_long_conv" in x)
    example += "assert u.shape == q.shape and q.grad.norm() > 0\ndist.destroy_process_group()\n"
    (tmp_path / "example.py").write_text(example)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = execute([*launcher, "--nproc-per-node", "2", "example.py"], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_the_convolution_works_outside_the_trainer(tmp_path):
    """The example of docs/long_convolution.md, as it stands there, on two ranks."""
    text = (ROOT / "docs" / "long_convolution.md").read_text()
    (example,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 15
    (tmp_path / "example.py").write_text(example)
    (options,) = re.findall(r"# torchrun (.+)", example)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = execute([*launcher, *shlex.split(options)], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = sorted(re.findall(r"rank (\d): (\d+) tokens, loss (\S+)", ended.stdout))
    assert [line[0] for line in lines] == ["0", "1"]
    assert sum(int(line[1]) for line in lines) == 1_000_003
    # Of independent standard normal numbers: 6 N² expected, (2 products) · (3 components).
    assert sum(float(line[2]) for line in lines) == pytest.approx(6, rel=0.01)
