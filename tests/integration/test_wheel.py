"""What is installed: three packages with their configurations and data, and nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("launch", "scaling", "data_pipeline")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = folder.glob("longfold-*.whl")
    return path


def test_wheel_holds_the_packages_their_configurations_and_data(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    expected = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    configs = {f"launch/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.*")}
    slurm = {"job.sbatch.j2", "site.env.example", "stand_in/srun", "stand_in/scontrol"}
    configs |= {f"launch/slurm/{name}" for name in slurm}
    assert {name for name in names if info not in name} == expected | configs
    assert f"{info}/licenses/LICENSE" in names
    assert f"{info}/entry_points.txt" in names


def test_wheel_composes_its_own_configuration_away_from_the_checkout(wheel: Path, tmp_path: Path):
    place = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(place)
    environ = os.environ | {"PYTHONPATH": str(place)}
    printed = [
        subprocess.run(
            [sys.executable, "-m", "launch", "train", "--cfg", "train.steps=7"],
            cwd=folder, env=env, capture_output=True, text=True, timeout=100,
        )
        for folder, env in ((tmp_path, environ), (ROOT, os.environ))
    ]  # fmt: skip
    assert printed[0].returncode == 0, printed[0].stderr
    assert "steps: 7" in printed[0].stdout
    assert printed[0].stdout == printed[1].stdout
    where = [
        sys.executable,
        "-c",
        "from launch.config.compose import config_folder as c; print(c())",
    ]
    said = subprocess.run(where, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert said.stdout.strip() == str(place / "launch" / "configs")
