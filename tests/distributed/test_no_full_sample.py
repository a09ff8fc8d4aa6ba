"""No rank ever holds a whole sample: its largest tensor is its share of one process's."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.stream.stream import evaluation_batches
from data_pipeline.tasks.needles import Needles
from scaling.engine.build import build_engine
from scaling.engine.loss import engine_loss
from scaling.models import build
from scaling.parallel.mesh import Mesh
from scaling.train.evaluate import Evaluation
from scaling.train.objective import Objective
from scaling.train.settings import TrainSettings

TOKENS = 1 << 12


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator saw or made."""

    bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        for x in tree_leaves((args, result)):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def largest_tensor(group: Any, sp: int) -> int:
    """Of loading, forward, backward, optimiser and evaluation."""
    task = Needles(TOKENS, pairs=64, held_out_size=1)
    model = build("se3_hyena", 1, 3, channels=4, hidden=4, gate_hidden=4, operators=2)
    objective = Objective(model, mesh := Mesh(1, sp))
    engine = build_engine(
        "ddp",
        objective,
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        gradient_clipping=1.0,
        micro_batch_size=1,
        accumulation=1,
        environment={},
    )
    settings = TrainSettings(micro_batch_size=1)
    with Largest() as seen:
        (batch,) = evaluation_batches(
            task, "validation", micro_batch_size=1, max_length=TOKENS, slot=mesh.slot,
        )  # fmt: skip
        local_sum, *_ = engine(*objective.enter(batch))
        engine.backward(engine_loss(local_sum, 64, engine.world))
        engine.step(1e-3)
        Evaluation(engine, objective, task, settings).row(1)
    return seen.bytes


def test_loading_training_and_evaluation_hold_shares(distributed):
    whole = largest_tensor(None, 1)
    assert whole > TOKENS * 4 * 8
    for share in distributed(largest_tensor, 8, 8):
        assert share < 1.3 * whole / 8
