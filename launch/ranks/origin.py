"""Where in our code a thread is, and an error came from."""

import os
import traceback
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / package}{os.sep}" for package in ("launch", "scaling", "data_pipeline"))


def place_of(frame: FrameType | None, line: int | None = None) -> str:
    """The innermost place of ours in a stack, as the end of a phrase.

    Args:
        line: the frame's, if it has gone on since.
    """
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame, line = frame.f_back, None
    if frame is None:
        return ""
    file = Path(frame.f_code.co_filename).relative_to(ROOT)
    return f", at {file}:{line or frame.f_lineno} ({frame.f_code.co_name})"


def described(error: BaseException) -> str:
    """An error that nobody foresaw in one line, with the place in our code that it came from."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300] + origin(error)


def origin(error: BaseException) -> str:
    """The innermost place of ours that an error came through, as the end of a phrase."""
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        if frame.f_code.co_filename.startswith(OURS):
            return place_of(frame, line)
    return ""
