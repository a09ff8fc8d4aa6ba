"""What asks a run to stop: a signal, a file named STOP in its directory, its launcher's end."""

import logging
import os
import re
import signal
from functools import cache
from itertools import pairwise
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from psutil import Error, NoSuchProcess, Process

_log = logging.getLogger(__name__)

INSISTENT = (signal.SIGTERM, signal.SIGINT)
"""Sent again, these end the process at once."""
SIGNALS = (*INSISTENT, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST_S = 1.0
"""Seconds within which a signal that comes again is still the same request: of one Ctrl-C, a rank
hears from the terminal and from its launcher."""


LAUNCHERS = re.compile(
    r"torchrun|torch\.distributed\.(run|launch)|accelerate|deepspeed(\.launcher\.\w+)?"
    r"|mpi(run|exec)(\.\w+)?|orterun|orted|prterun|prted|hydra_pmi_proxy"
)
"""Programs, or Python's scripts and modules, whose ranks are nobody's without them."""


@cache
def launcher_chain() -> tuple[Process, ...]:
    """This process and those above it, up to the launcher that started it; at the first call.

    This process alone where no launcher is above it: plainly started, in the background, by srun.
    """
    chain = [Process(), *Process().parents()]
    launchers = [n for n, process in enumerate(chain[1:], 2) if _is_launcher(process)]
    return tuple(chain[: max(launchers, default=1)])


def launcher_ended() -> bool:
    """A process between this one and its launcher has another parent than at the beginning."""
    chain = launcher_chain()
    try:
        return any(process.ppid() != above.pid for process, above in pairwise(chain))
    except NoSuchProcess:
        return True


def _is_launcher(process: Process) -> bool:
    """By the name of its program; where that is Python, of its script or module."""
    try:
        words = [Path(word).name for word in process.cmdline() if not word.startswith("-")]
    except Error:
        return False
    if words and words[0].startswith("python"):
        words = words[1:]
    return bool(words and LAUNCHERS.fullmatch(words[0]))


class StopRequest:
    """Notes that this process was asked; the ranks agree on it elsewhere.

    A handler only sets a flag: a rank that left at once would leave the others waiting. Whoever
    asks again later wants no agreement: the process ends with the code 128 + signal. Outside the
    `with`, signals do what they did before.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._asked_at: float | None = None
        self._asked_by, self._said = "", False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        launcher_chain()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """A signal has come, the file is there, or the launcher has ended."""
        if self._asked_at is not None:
            why = self._asked_by
        elif self._file.exists():
            why = str(self._file)
        else:
            why = "the end of its launcher" if launcher_ended() else ""
        if why and not self._said:
            self._said = True
            _log.info("asked to stop by %s", why)
        return bool(why)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at, self._asked_by = monotonic(), signal.Signals(number).name
        elif number in INSISTENT and monotonic() - self._asked_at > SAME_REQUEST_S:
            os.write(2, b"asked again: stopping at once, without a checkpoint\n")
            os._exit(128 + number)
