"""What is kept for the backward pass, out of the way until then."""

import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from data_pipeline.errors import RunError
from scaling.execution import Execution

LEAST_BYTES = 1 << 16
"""Smaller tensors stay where they are."""


def offloading(execution: Execution) -> AbstractContextManager[object]:
    """While it is entered, tensors kept for the backward pass go where `execution.offload` says.

    host: to pinned memory, by torch's own means. file: to a temporary file in TMPDIR that has no
    name, so that nothing is left behind; mapped for the write and for the read alone.

    Raises:
        RunError: the file cannot be written.
    """
    if execution.offload == "host":
        return save_on_cpu(pin_memory=torch.cuda.is_available())
    if execution.offload == "file":
        return saved_tensors_hooks(_to_file, _from_file)
    return nullcontext()


class _Filed:
    """A tensor in a file without a name."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.file = tempfile.TemporaryFile(prefix="longfold-")  # noqa: SIM115 - closed at its end
        # Room first: a full disk would kill the process that writes to a mapping.
        os.posix_fallocate(self.file.fileno(), 0, x.nbytes)
        _map(self.file, x.nbytes).copy_(_bytes(x.detach().contiguous()))

    def load(self) -> Tensor:
        x = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        _bytes(x).copy_(_map(self.file, x.nbytes))
        return x

    def __del__(self) -> None:
        self.file.close()


def _to_file(x: Tensor) -> Tensor | _Filed:
    if x.nbytes < LEAST_BYTES or isinstance(x, torch.nn.Parameter):
        return x
    try:
        return _Filed(x)
    except OSError as error:
        raise RunError(
            f"execution.offload=file cannot write {x.nbytes} bytes to {tempfile.gettempdir()}: "
            f"{error.strerror}; set TMPDIR to a folder with room"
        ) from error


def _from_file(kept: Tensor | _Filed) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.load()


def _map(file: IO[bytes], size: int) -> Tensor:
    return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,)))


def _bytes(x: Tensor) -> Tensor:
    """The numbers of a contiguous tensor as bytes."""
    return x.flatten().view(torch.uint8)
