"""Asking a run to stop: by a signal, or by a file named STOP in its directory."""

import os
import signal
from pathlib import Path
from threading import Thread
from time import monotonic
from types import FrameType, TracebackType
from typing import Any

INSISTENT = (signal.SIGTERM, signal.SIGINT)
"""Sent again, these end the process at once."""
SIGNALS = (*INSISTENT, signal.SIGUSR1)
SAME_REQUEST_S = 1.0
"""Seconds within which a signal that comes again is still the same request: of one Ctrl-C, a rank
hears from the terminal and from its launcher."""


class StopRequest:
    """Notes that this process was asked; the ranks agree on it elsewhere.

    A handler only sets a flag: a rank that left at once would leave the others waiting. Whoever
    asks again later wants no agreement: the process ends with the code 128 + signal, even while it
    waits for a rank that never comes. Outside the `with`, signals do what they did before.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Python runs handlers between bytecodes, so never inside a wait for another rank. The
        # interpreter's own handler writes to this pipe at once, and a thread listens.
        self._listens, self._tells = os.pipe()
        os.set_blocking(self._tells, False)
        self._told_before = signal.set_wakeup_fd(self._tells, warn_on_full_buffer=False)
        self._listener = Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._told_before)
        os.write(self._tells, b"\0")  # no signal: the listener leaves
        self._listener.join()
        os.close(self._tells)
        os.close(self._listens)

    def asked(self) -> bool:
        """A signal has come, or the file is there."""
        return self._signal is not None or self._file.exists()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _listen(self) -> None:
        first: float | None = None
        while heard := ord(os.read(self._listens, 1)):
            if heard not in INSISTENT:
                continue
            first = monotonic() if first is None else first
            if monotonic() - first > SAME_REQUEST_S:
                os.write(2, b"asked again: stopping at once, without a checkpoint\n")
                os._exit(128 + heard)
