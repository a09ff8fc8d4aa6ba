"""How a command ends: its exit code, its last line, and who of several ranks says it."""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from data_pipeline.errors import LongfoldError
from launch.ranks import group
from launch.ranks.discovery import Ranks, discover

BAD_INPUT = 2
"""Exit code of a LongfoldError."""
_PATIENCE_S = 3.0
"""Longer than a launcher needs to end the other ranks after one has failed."""


def run_command(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command; its exit code. A LongfoldError becomes one line on stderr and code 2.

    Every rank leaves at once, the launcher ends the others. Rank 0 speaks first; another rank
    speaks only if it is still there a moment later, that is, if rank 0 does not share the error.
    """
    try:
        command(arguments)
    except LongfoldError as error:
        return _fail(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has enough
        _silence(sys.stdout)
        return 1
    except Exception as error:
        return _fail(_lost_rank(error) or traceback.format_exc().rstrip(), 1)
    if group.met_others:
        # A thread of gloo that lets go of its last tensor while the interpreter shuts down aborts
        # the process, rarely and on busy machines: no shutting down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


class Unheard:
    """An output whose reader may go, as a launcher's pipe does with it; the command goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            _silence(self._stream)
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _silence(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _lost_rank(error: Exception) -> str | None:
    """One line where the cause is another rank, whose own message says more than our traceback."""
    text = str(error)
    if re.search(r"[Cc]onnection (closed|reset) by peer", text):
        return "error: another rank ended first; its message says why"
    if re.search(r"[Tt]imed out (waiting|after)", text):
        return (
            f"error: another rank did not come within parallel.timeout_s ({text.splitlines()[0]}); "
            "its message, if any, says why"
        )
    return None


def _fail(text: str, code: int) -> int:
    ranks = Ranks()
    with contextlib.suppress(LongfoldError):
        ranks = discover()
    if ranks.rank > 0:
        time.sleep(_PATIENCE_S)
        text = f"rank {ranks.rank}: {text}"
    sys.stdout.flush()
    sys.stderr.write(text + "\n")  # one write, so that lines of several ranks do not mix
    sys.stderr.flush()
    if ranks.world > 1:
        # No destructors: those of a process group may wait for ranks that never come.
        os._exit(code)
    return code
