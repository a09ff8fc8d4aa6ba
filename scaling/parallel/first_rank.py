"""What the first rank says, and its errors, on every rank."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from data_pipeline.errors import RunError


def first_rank_says(function: Callable[[], Any]) -> Any:
    """Calls it on the first rank; every rank gets its result, or its error. Collective."""
    answer: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer[0] = function()
        except RunError as error:
            answer[1] = error
        except OSError as error:  # a full disk must not leave the others waiting
            answer[1] = RunError(f"cannot write to the run directory: {error}; make room and rerun")
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
