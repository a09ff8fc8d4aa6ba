"""Commands that tests run."""

import os
import signal
import subprocess
from contextlib import suppress
from typing import Any


def run(command: list[str], timeout: float = 200, **options: Any) -> subprocess.CompletedProcess:
    """subprocess.run with captured text, but when time is up no descendant is left behind: a
    launcher is asked to end its ranks first."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)
            with suppress(ProcessLookupError):  # none of them is left
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)
