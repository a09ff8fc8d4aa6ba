"""What is kept for the backward pass, out of the way until then."""

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from io import BufferedRandom

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from data_pipeline.errors import RunError
from scaling.execution import Execution

LEAST_BYTES = 1 << 16
"""Smaller tensors stay where they are."""


def offloading(execution: Execution) -> AbstractContextManager[object]:
    """While it is entered, tensors kept for the backward pass go where `execution.offload` says.

    host: to pinned memory, by torch's own means. file: to one temporary file in TMPDIR that has no
    name, so that nothing is left behind.

    Raises:
        RunError: the file cannot be written.
    """
    if execution.offload == "host":
        return save_on_cpu(pin_memory=torch.cuda.is_available())
    if execution.offload == "file":
        return saved_tensors_hooks(
            _File().keep, lambda kept: kept if isinstance(kept, Tensor) else kept()
        )
    return nullcontext()


class _File:
    """A file without a name: tensors one behind the other, until the last is no longer needed."""

    def __init__(self) -> None:
        self.file: BufferedRandom | None = None

    def keep(self, x: Tensor) -> Tensor | Callable[[], Tensor]:
        if x.nbytes < LEAST_BYTES or isinstance(x, torch.nn.Parameter):
            return x
        # Where TMPDIR cannot be written tempfile would go elsewhere without a word.
        folder = os.environ.get("TMPDIR") or tempfile.gettempdir()
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed at its end
            start = self.file.seek(0, os.SEEK_END)
            # Room first: on a full disk a buffered write would fail again when the file is closed.
            os.posix_fallocate(self.file.fileno(), start, x.nbytes)
            self.file.write(_bytes(x.detach().cpu().contiguous()))
            self.file.flush()
        except OSError as error:
            raise RunError(
                f"execution.offload=file cannot write {x.nbytes} bytes to {folder}: "
                f"{error.strerror}; set TMPDIR to a folder with room"
            ) from error
        return partial(self._load, start, x.shape, x.dtype, x.device)

    def _load(
        self, start: int, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        assert self.file is not None
        x = torch.empty(shape, dtype=dtype)
        self.file.seek(start)
        self.file.readinto(_bytes(x))
        return x.to(device)

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()


def _bytes(x: Tensor) -> memoryview:
    """The numbers of a contiguous tensor on the CPU as bytes."""
    return x.flatten().view(torch.uint8).numpy().data
