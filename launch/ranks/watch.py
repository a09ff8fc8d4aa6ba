"""Finds the rank for which the others wait.

While a run trains, every rank writes where it is to <run>/ranks/<rank>.json, from a thread of its
own: the step, the ranges and the exchange that telemetry knows, the line of our code. A rank that
waits in vain (parallel.timeout_s of the process group), or whose partner closed its connection,
reads what all have written, and gives the cause one line; so do the others.

Files, not the store at which the ranks met: checkpoints need the shared folder anyway, no process
has to answer for it (the store lives in the first rank or the launcher, which may be what hangs),
and the last words are there to read when all have ended. A step pays nothing for it.
"""

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread, main_thread
from time import monotonic, sleep
from types import TracebackType

from psutil import STATUS_STOPPED, STATUS_ZOMBIE, Error, NoSuchProcess, Process

from data_pipeline.errors import LongfoldError, RunError
from launch.ranks.discovery import who
from launch.ranks.origin import described, origin, place_of
from launch.ranks.process import leave, lost_rank
from scaling.observe.memory import out_of_memory
from scaling.parallel.collectives import first_rank_says, group_rank, group_size
from scaling.parallel.telemetry import progress
from scaling.runs.folder import RunFolder, RunWriter

WAITING = (
    f"{os.sep}torch{os.sep}distributed{os.sep}",
    f"{os.sep}torch{os.sep}autograd{os.sep}graph.py",  # a backward averages gradients
    f"{os.sep}deepspeed{os.sep}",
    f"scaling{os.sep}parallel{os.sep}collectives.py",
)
"""Files in whose functions a rank waits for others."""
SILENT = 3
"""Periods after which a rank that has written nothing does not run."""
LEAVING_S = 15.0
"""Longest that a rank may take to end by itself once the cause is known."""
SHOWN = 4


@dataclass(frozen=True)
class Word:
    """What a rank says of itself."""

    host: str
    pid: int
    beat: int = 0
    """Counts the times that it was written."""
    step: int = 0
    moves: int = 0
    """Ranges entered and left in that step."""
    doing: str = "nothing yet"
    waits: bool = False
    """For other ranks."""
    ended: str = ""
    """The error of its own with which it ended."""

    @property
    def place(self) -> tuple[int, int]:
        """How far it is."""
        return self.step, self.moves


class Watch:
    """Around what all ranks do together; see the top. Collective to enter.

    Args:
        timeout_s: what the process group waits.
        by_device: who does not move waits, whatever it does; with NCCL the host waits for the
            device, and the device for other ranks.

    Raises:
        RunError: in place of an error that another rank caused, with the cause; or of one that
            nobody foresaw, whose traceback is in the rank's log.
    """

    def __init__(self, run: RunFolder, timeout_s: float, by_device: bool = False) -> None:
        self._run, self._folder = run, run.path / "ranks"
        self._timeout_s, self._by_device = timeout_s, by_device
        self._rank, self._world = group_rank(None), group_size(None)
        self._period = min(max(timeout_s / 60, 0.5), 10.0)
        self._word = Word(socket.gethostname(), os.getpid())
        self._waits_since, self._line = monotonic(), (0, 0)
        self._frozen = False
        self._end = Event()
        self._thread = Thread(target=self._look_on, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        def fresh() -> None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()

        if self._world > 1:
            first_rank_says(fresh)
            self._write(self._word)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._world == 1:
            return
        self._frozen = True  # where it was, not where it goes from here
        bug = None  # what nobody foresaw
        if isinstance(error, Exception) and not isinstance(error, LongfoldError):
            bug = error
        if bug is not None and lost_rank(bug):
            at = " in ".join(filter(None, [progress.exchange(), f"step {progress.step}"]))
            doing = at + origin(bug)
            self._word = replace(self._word, step=progress.step, doing=doing, waits=True)
            raise RunError(self._conclude()) from error
        self._end.set()
        self._thread.join()
        if error is None:
            with suppress(OSError):
                self._file(self._rank).unlink()
                self._folder.rmdir()  # by the last
            return
        text = described(bug) if bug is not None else " ".join(str(error).split())
        self._write(replace(self._word, ended=text or type(error).__name__))
        if bug is not None and not out_of_memory(bug):
            logs = self._run.path / "logs"
            raise RunError(f"{text}; the traceback is in this rank's log in {logs}") from error

    def _look_on(self) -> None:
        """In the thread: writes, and leaves in place of a rank that cannot."""
        known_since = None
        while not self._end.wait(self._period):
            self._write(self._look())
            if not self._frozen and monotonic() - self._waits_since > self._timeout_s:
                self._conclude()
            if not self._cause_file.exists():
                continue
            known_since = known_since or monotonic()
            if not self._frozen or monotonic() - known_since > LEAVING_S:
                line = self._cause_file.read_text()
                if isinstance(self._run, RunWriter):
                    with suppress(LongfoldError):
                        self._run.set_status("failed", error=line)
                leave(2, f"error: {line}")

    def _look(self) -> Word:
        """What the main thread does now."""
        frame = sys._current_frames().get(main_thread().ident or 0)
        if self._frozen or frame is None:
            return self._word
        exchange, ranges, file = progress.exchange(), progress.ranges(), frame.f_code.co_filename
        ranges = [exchange or "", *(name for name in reversed(ranges) if name != "comm")]
        word = replace(
            self._word,
            step=progress.step,
            moves=progress.moves(),
            doing=" in ".join([*filter(None, ranges), f"step {progress.step}"]) + place_of(frame),
            waits=exchange is not None or any(each in file for each in WAITING),
        )
        before, self._line = self._line, (hash(frame.f_code), frame.f_lineno)
        still = (word.place, self._line) == (self._word.place, before)
        if not still or not (word.waits or self._by_device):
            self._waits_since = monotonic()
        return word

    def _write(self, word: Word) -> None:
        self._word = replace(word, beat=self._word.beat + 1)
        file = self._file(self._rank)
        with suppress(OSError):  # a full disk is not what this is about
            file.with_suffix(".tmp").write_text(json.dumps(asdict(self._word)))
            file.with_suffix(".tmp").replace(file)

    def _file(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"

    @property
    def _cause_file(self) -> Path:
        return self._folder / "cause"

    def _words(self) -> dict[int, Word]:
        words = {self._rank: self._word}
        for rank in range(self._world):
            with suppress(OSError, ValueError, TypeError):
                words.setdefault(rank, Word(**json.loads(self._file(rank).read_text())))
        return words

    def _conclude(self) -> str:
        """The cause, and the way out; in a file for ranks that do not ask."""
        line = f"{self._cause()}; the same command goes on from the last checkpoint"
        mine = self._folder / f"cause.{self._rank}"
        with suppress(OSError):
            mine.write_text(line)
            mine.replace(self._cause_file)
        return line

    def _cause(self) -> str:
        before, end = self._words(), monotonic() + SILENT * self._period
        while True:
            words = self._words()
            for rank, word in sorted(words.items()):
                if word.ended:
                    return f"{self._who([rank], words)} ended first: {word.ended}"
            gone = {rank for rank in words if rank != self._rank and self._state(words[rank]) == ""}
            if gone:
                return (
                    f"{self._who(gone, words)} is gone without a word: killed, perhaps for want of "
                    f"memory; it was last at {words[min(gone)].doing}"
                )
            if monotonic() > end:
                return self._hanging(before, words)
            sleep(self._period / 2)

    def _hanging(self, before: Mapping[int, Word], words: Mapping[int, Word]) -> str:
        """Of ranks that all are there: one that does not write; else one that does not wait; else
        one that is behind the others."""
        beats = [{rank: word.beat for rank, word in each.items()} for each in (before, words)]
        silent = {rank for rank in range(self._world) if rank != self._rank
                  and beats[0].get(rank) == beats[1].get(rank)}  # fmt: skip
        busy = {rank for rank, word in words.items() if not word.waits}
        least = min(word.place for word in words.values())
        behind = {rank for rank, word in words.items() if word.place == least}
        some = (ranks for ranks in (silent, busy, behind) if 0 < len(ranks) < self._world)
        hanging = next(some, set(words))
        texts = []
        for rank in sorted(hanging)[:SHOWN]:
            mute, word = "", words.get(rank)
            if rank in silent:
                stopped = word is not None and self._state(word) == STATUS_STOPPED
                mute = ", stopped by a signal" if stopped else " and does not answer"
            last = f"last in {word.doing}" if word else "it has said nothing yet"
            name = self._who([rank], words)
            texts.append(f"{name} has not moved for {self._timeout_s:g} s{mute}: {last}")
        if len(hanging) > SHOWN:
            texts.append(f"{len(hanging) - SHOWN} more")
        if waiting := set(words) - hanging:
            wait = "waits" if len(waiting) == 1 else "wait"
            texts.append(f"{self._who(waiting, words)} {wait} in {words[min(waiting)].doing}")
        if hanging.isdisjoint(silent | busy):
            texts.append("all wait: is the network between them whole?")
        return "; ".join(texts)

    def _who(self, ranks: set[int] | list[int], words: Mapping[int, Word]) -> str:
        return who(sorted(ranks), {rank: word.host for rank, word in words.items()})

    def _state(self, word: Word) -> str | None:
        """Of the process, if it is on this machine; empty: it is gone."""
        if word.host != self._word.host:
            return None
        try:
            state = Process(word.pid).status()
        except NoSuchProcess:
            return ""
        except Error:
            return None
        return "" if state == STATUS_ZOMBIE else state
