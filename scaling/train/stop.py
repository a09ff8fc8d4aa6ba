"""Asking a run to stop: by a signal, or by a file named STOP in its directory."""

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes that this process was asked; the ranks agree on it elsewhere.

    A handler only sets a flag: under some launchers it runs twice, and a rank that left at once
    would leave the others waiting. Outside the `with`, signals do what they did before.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
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

    def asked(self) -> bool:
        """A signal has come, or the file is there."""
        return self._signal is not None or self._file.exists()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
