"""DeepSpeed's CPU extension: where it lives, building it once, and locks left by dead builds.

DeepSpeed compiles its shared-memory collectives at first use (one to two minutes) and every
start takes a lock file there. A process killed in between leaves the lock, and all later starts
would wait for it forever without a word.

    python -m launch.ranks.extension      builds it, once
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from data_pipeline.errors import ConfigError

NAME = "deepspeed_shm_comm"
BUILD_TIMEOUT_S = 600.0
_YOUNG_S = 60.0
"""A lock this young may belong to a start on another machine that shares the folder."""

_BUILD = (
    "from deepspeed.accelerator import get_accelerator as a;"
    "a().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
)


def cache_folder() -> Path:
    """The user's TORCH_EXTENSIONS_DIR, else a private folder of this Python environment."""
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen)
    # Another torch has other headers and symbols: never load what was built for one with another.
    build = f"torch-{version('torch')}-deepspeed-{version('deepspeed')}"
    inside = Path(sys.prefix) / "var" / "longfold" / "extensions"
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "longfold"
    tag = f"{sys.implementation.cache_tag}-{re.sub('[^a-zA-Z0-9]+', '-', sys.prefix).strip('-')}"
    return _first_writable([inside, home / "extensions" / tag]) / build


def _first_writable(folders: list[Path]) -> Path:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise ConfigError(f"no writable folder for DeepSpeed's CPU extension: tried {folders[0]} and "
                      f"{folders[1]}; set TORCH_EXTENSIONS_DIR, or use engine=ddp")  # fmt: skip


def require_extension(timeout_s: float = BUILD_TIMEOUT_S) -> Path:
    """Make sure that the extension is built and that no stale lock waits; the library's path.

    Sets TORCH_EXTENSIONS_DIR for DeepSpeed. Any number of processes may call this at once: one
    builds, the others wait for it.

    Raises:
        ConfigError: stale lock, no compiler, failed build, or longer than `timeout_s` seconds.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(cache_folder())
    folder = cache_folder() / NAME
    library = folder / f"{NAME}.so"
    deadline = time.monotonic() + timeout_s
    if library.exists() and not (folder / "lock").exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write DeepSpeed's CPU extension to {folder}: {error}") from None
    with _one_at_a_time(folder / "longfold.lock", deadline):
        _await_lock(folder / "lock", library, deadline)
        if not library.exists():
            _build(folder, deadline)
    return library


@contextmanager
def _one_at_a_time(path: Path, deadline: float) -> Iterator[None]:
    """A lock of the kernel's, which dies with its holder."""
    with path.open("w") as handle:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                told = told or _say("waiting for another process to build DeepSpeed's extension")
                _check_deadline(deadline, path.parent)
                time.sleep(0.2)
        yield


def _await_lock(lock: Path, library: Path, deadline: float) -> None:
    """Wait while somebody holds torch's lock. One that nobody holds goes if the library is whole,
    else it is an error: another machine may be at work."""
    told = False
    while lock.exists():
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age > _YOUNG_S and not _is_open_somewhere(lock):
            stale = f"stale build lock, {age:.0f} s old and held by no process"
            if not _loads(library):
                raise ConfigError(f"{stale}, beside no library that loads; DeepSpeed would wait "
                                  f"for it forever, remove it: rm {lock}")  # fmt: skip
            lock.unlink(missing_ok=True)
            _say(f"{stale}, beside a library that loads: removed {lock}")
            return
        told = told or _say(f"waiting for whoever builds DeepSpeed's extension: {lock}")
        _check_deadline(deadline, lock.parent)
        time.sleep(0.2)


def _loads(library: Path) -> bool:
    """Whether a child process can load it: half a library may end whoever tries."""
    script = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1])"
    command = [sys.executable, "-c", script, str(library)]
    return library.exists() and subprocess.run(command, capture_output=True).returncode == 0


def _is_open_somewhere(path: Path) -> bool:
    """Whether a process of this machine holds the file open, as torch does while it builds."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(path):
                return True
        except OSError:  # ended meanwhile, or another user's
            continue
    return False


def _build(folder: Path, deadline: float) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise ConfigError("DeepSpeed's CPU extension needs a C++ compiler: install g++, or use "
                          "engine=ddp, which needs none")  # fmt: skip
    _say("building DeepSpeed's CPU extension, once (one to two minutes on 2 cores) ...")
    began = time.monotonic()
    log = folder / "build.log"
    environ = os.environ | {"DS_ACCELERATOR": "cpu"}
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", _BUILD], stdout=output, stderr=subprocess.STDOUT,
            env=environ, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(timeout=max(0.0, deadline - time.monotonic()))
        except BaseException as stop:
            # The compilers too, or they would go on holding the folder.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            (folder / "lock").unlink(missing_ok=True)
            if isinstance(stop, subprocess.TimeoutExpired):
                _check_deadline(time.monotonic(), folder)
            raise
    if code != 0 or not (folder / f"{NAME}.so").exists():
        (folder / "lock").unlink(missing_ok=True)
        raise ConfigError(f"DeepSpeed's CPU extension did not build (it needs g++ and Python's "
                          f"headers, python3-dev); see {log}, or use engine=ddp")  # fmt: skip
    _say(f"built in {time.monotonic() - began:.0f} s: {folder}")


def _check_deadline(deadline: float, folder: Path) -> None:
    if time.monotonic() >= deadline:
        raise ConfigError(f"time ran out waiting for DeepSpeed's CPU extension in {folder}; "
                          "build it alone first: python -m launch.ranks.extension")  # fmt: skip


def _say(text: str) -> bool:
    print(text, file=sys.stderr, flush=True)
    return True


def main(_arguments: list[str]) -> None:
    """Build the extension if it is missing."""
    require_extension()


if __name__ == "__main__":
    from launch.ranks.exit import run_command

    sys.exit(run_command(main, sys.argv[1:]))
