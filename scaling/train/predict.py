"""Where a denoising model puts the atoms of chains, each shared by ranks of a sequence group."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32

from data_pipeline.chains import Chain
from data_pipeline.errors import RunError
from data_pipeline.tasks.backbone import BackboneInputs
from scaling.parallel.collectives import sum_over_ranks
from scaling.parallel.shard import SequenceShard
from scaling.train.evaluate import evaluating
from scaling.train.objective import Objective


def denoised(
    objective: Objective, inputs: BackboneInputs, chains: Sequence[Chain]
) -> list[Float32[np.ndarray, "length atoms 3"]]:
    """The chosen atoms of each chain, Å, on every rank; zero where one is missing. Each chain is a
    row of its own. Collective.

    Raises:
        RunError: the model gives a coordinate that is no number (names the chain).
    """
    slot, device = objective.mesh.slot, objective.device
    atoms = len(inputs.atoms)
    lengths = [len(chain.sequence) * atoms for chain in chains]
    # Every token is one rank's: the sum over ranks puts them together, and changes none.
    places = torch.zeros(3, sum(lengths), device=device)
    with evaluating(objective):
        for number in slot.rows(len(chains), 1):
            length = lengths[number]
            start, stop = slot.tokens(length)
            shard = SequenceShard(length, objective.mesh.sequence_group, "contiguous")
            batch = inputs.batch(chains[number], start, stop).to(device, objective.dtype)
            points = objective.moved(batch, shard).points[0]
            before = sum(lengths[:number])
            own = places[:, before + start : before + stop]
            own.copy_(points.masked_fill(~batch.mask, 0))
    sum_over_ranks(places)
    whole = [x.T.reshape(-1, atoms, 3).numpy() for x in places.cpu().split(lengths, 1)]
    for chain, x in zip(chains, whole, strict=True):
        if not np.isfinite(x).all():
            raise RunError(f"the model's coordinates of {chain.id} are no numbers: say "
                           "precision=float32, or choose another run")  # fmt: skip
    return whole
