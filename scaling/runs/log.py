"""What one rank of a run says, in a file of its own; one rank alone speaks on the screen.

    runs/<name>/logs/rank-00000.jsonl       a line a record: time (unix seconds), level, rank, host,
                                            step (the last that was done), source, text, and of an
                                            error its traceback

The file has what goes through Python's logging (from INFO on) and its warnings, later starts behind
earlier ones. One that has grown to `LARGEST` is renamed to rank-00000.jsonl.1, in place of the one
before. What is said before there is a run's folder waits for it.
"""

import json
import logging
import os
import shlex
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler, RotatingFileHandler
from typing import IO

from scaling.runs.folder import RunFolder

LARGEST = 4 << 20
"""Bytes of a file; a rank keeps two at most."""
LONGEST = 1 << 16
"""Characters of a record's text and of its traceback; what is cut is counted."""

_log = logging.getLogger(__name__)


class RankLog:
    """Inside the `with`, records and warnings of this process are kept; the first rank's from
    WARNING on are on the screen, too."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._early = MemoryHandler(capacity=1000, flushLevel=sys.maxsize)
        self._screen = logging.StreamHandler()
        self._screen.setLevel(logging.WARNING)
        self._screen.addFilter(lambda record: record.name != __name__)  # who ends says it once
        self._handlers = [self._early, self._screen][: 2 if rank == 0 else 1]

    def __enter__(self) -> "RankLog":
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        for handler in self._handlers:
            root.addHandler(handler)
        logging.captureWarnings(True)
        return self

    def __exit__(self, *_: object) -> None:
        logging.captureWarnings(False)
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
        root.setLevel(self._level)
        if self._rank > 0:  # without a folder nothing may be lost, either
            for record in self._early.buffer:
                if record.levelno >= self._screen.level:
                    self._screen.handle(record)

    @contextmanager
    def written_to(self, run: RunFolder, what: str) -> Iterator[None]:
        """Inside, records go to the run's folder, those first that were kept; so does an error that
        leaves the body, which is told where.

        Args:
            what: of this process, for the first line.
        """
        file = _File(run, self._rank)
        root = logging.getLogger()
        self._early.setTarget(file)
        self._early.flush()
        root.removeHandler(self._early)
        root.addHandler(file)
        command = shlex.join([sys.executable, *sys.argv])
        _log.info("process %d begins, %s: %s", os.getpid(), what, command)
        try:
            yield
            _log.info("process %d ends", os.getpid())
        except BaseException as error:
            _log.critical("process %d ends by an error", os.getpid(), exc_info=True)
            error.add_note(f"this rank's log is {file.path}")
            raise
        finally:
            root.removeHandler(file)
            file.close()


class _File(RotatingFileHandler):
    """A disk that takes no more is said once, and does not end the run."""

    def __init__(self, run: RunFolder, rank: int) -> None:
        self.path = run.path / "logs" / f"rank-{rank:05d}.jsonl"
        self._failed = False
        super().__init__(self.path, maxBytes=LARGEST, backupCount=1, encoding="utf-8", delay=True)
        self.setFormatter(_Lines(run, rank))

    def _open(self) -> IO[str]:
        """Behind what is there; half a line that a killed process left is ended."""
        self.path.parent.mkdir(exist_ok=True)
        file = super()._open()
        if file.tell() and not self.path.read_bytes().endswith(b"\n"):
            file.write("\n")
        return file

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            said = f"{self.path} cannot be written ({sys.exception()}); the run goes on without\n"
            sys.stderr.write(said)


class _Lines(logging.Formatter):
    """A record as a line of JSON."""

    def __init__(self, run: RunFolder, rank: int) -> None:
        super().__init__()
        self._run, self._rank, self._host = run, rank, socket.gethostname()

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "rank": self._rank,
            "host": self._host,
            "step": self._run.step,
            "source": record.name,
            "text": _cut(record.getMessage().rstrip()),
        }
        if record.exc_info:
            said["traceback"] = _cut("".join(traceback.format_exception(*record.exc_info)))
        return json.dumps(said, ensure_ascii=False)


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} characters more)"
