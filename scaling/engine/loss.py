"""Global means out of local sums: the loss that a rank hands to its engine.

Invariant: an engine averages gradients over all ranks, sequence ranks included, so the average of
the ranks' losses must be the objective. With local_sum_r over the tokens that rank r counts,

    objective = sum_r local_sum_r / global_weight
    loss_r    = world · local_sum_r / global_weight

for one micro-batch; with accumulation the same holds for the sum over the window's micro-batches,
if `global_weight` is the weight of the whole window. Neither the number of ranks, nor how tokens
are spread over them, nor empty ranks change the objective.
"""

import math

from torch import Tensor

from data_pipeline.errors import RunError

Number = float | int


def engine_loss(local_sum: Tensor, global_weight: Number | Tensor, world: int) -> Tensor:
    """world · local_sum / global_weight: what a rank gives to `engine.backward`.

    Args:
        local_sum: scalar, this rank's weighted sum over one micro-batch; a rank without weight
            passes a zero that hangs on the graph, so that its collectives run backward too.
        global_weight: weight of the whole accumulation window, summed over all ranks; a tensor
            stays on its device, and who reads it there asks `check_weight`.
        world: ranks whose gradients the engine averages.

    Raises:
        RunError: see check_weight.
    """
    if not isinstance(global_weight, Tensor):
        check_weight(global_weight)
        return local_sum * (world / global_weight)
    return local_sum * (world / global_weight).to(local_sum.dtype)


def check_weight(global_weight: Number) -> None:
    """Raises RunError where nothing has weight, so that the mean does not exist."""
    if not (global_weight > 0 and math.isfinite(global_weight)):
        raise RunError(
            f"the loss weights sum to {global_weight:g}, so there is no mean loss; "
            "look for samples without a single observed token"
        )
