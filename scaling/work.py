"""The least work of a training step: what bounds its time on a given machine.

Every operator says, where it is defined, what it must compute, move and exchange: nothing that is
computed again, and no element-wise operation beside the products. `Model.work` hears it all from a
step on the meta device, on which matrix products are counted as they run. With n the length of a
transform:

    matrix products      2 i o a token and component for i channels to o; backward twice as many,
                         or as many where the inputs are data
    geometric products   2 a term, d·e terms for d and e components; backward twice as many
    pairs                matrix products between tokens; backward twice as many
    transforms           2.5 n log2 n each (real); every stream once forward and once backward
    frequency products   8 a complex term but 6 for each first one; backward by both operands
    bytes                every part reads what it is given and writes what it makes, once; a
                         transform and the frequency products are parts of their own
    exchange             what all ranks send to others: operands, results and their gradients
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Work:
    """Of one training step on full rows, a token: forward and backward."""

    matrix_flops: float = 0.0
    product_flops: float = 0.0
    """Of geometric products."""
    projection_bytes: float = 0.0
    """Of the pointwise modules."""
    pair_flops: float = 0.0
    """Of all pairs of tokens."""
    transform_flops: float = 0.0
    frequency_flops: float = 0.0
    transforms_bytes: float = 0.0
    """Of the long convolutions."""
    exchange_bytes: float = 0.0
    """Sent by all ranks together."""

    @property
    def fft_flops(self) -> float:
        """Of transforms and of the products of frequencies."""
        return self.transform_flops + self.frequency_flops

    @property
    def flops(self) -> float:
        """All that are counted."""
        return self.matrix_flops + self.product_flops + self.pair_flops + self.fft_flops


class WorkCounter:
    """Of the step that runs inside `counting`, for one row shared by `ranks` ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._row = Work()
        self._between_tokens = 0
        """Of the matrix products that are run forward."""

    def add(self, **amounts: float | int) -> None:
        """Amounts of the fields of `Work`, of the whole row and of forward and backward."""
        for name, amount in amounts.items():
            setattr(self._row, name, getattr(self._row, name) + amount)

    def row_sum(self, total: Tensor) -> None:
        """A sum over the ranks; a ring sends each byte twice, less the own share."""
        sent = self.ranks * (2 * (self.ranks - 1) * total.nbytes // self.ranks)
        self.add(exchange_bytes=(1 + total.requires_grad) * sent)

    def pointwise(self, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """The backward pass reads inputs and the results' gradients, and writes the inputs'."""
        inputs, results = (sum(x.nbytes for x in some) for some in (read, written))
        self.add(projection_bytes=3 * inputs + 2 * results)

    def shift(self, x: Tensor) -> None:
        """All tokens' numbers but the last one's, each from one rank to the next."""
        sent = (self.ranks > 1) * (x.nbytes - x[..., :1].nbytes)
        self.add(exchange_bytes=(1 + x.requires_grad) * sent)

    def redistributed(self, x: Tensor) -> None:
        """From one layout to the other: all but a rank's own share."""
        sent = x.nbytes * (self.ranks - 1) // self.ranks
        self.add(exchange_bytes=(1 + x.requires_grad) * sent)

    def halo(self, x: Shaped[Tensor, "n f"], tokens: int) -> None:
        """What so many tokens hold, of every rank for the one before and the one behind."""
        sent = 2 * (self.ranks - 1) * tokens * x[:1].nbytes
        self.add(exchange_bytes=(1 + x.requires_grad) * sent)

    def pairs(self, run: Callable[[], Tensor], keys: int, validity: int) -> Tensor:
        """run(), all pairs of tokens, with so many bytes of keys and of which of these are valid.
        Both go around the ring, and do so again backward, where the keys' gradients follow."""
        with FlopCounterMode(display=False) as products:
            result = run()
        self._between_tokens += products.get_total_flops()
        sent = 2 * (self.ranks - 1) * (keys + validity) + self.ranks * (self.ranks > 1) * keys
        self.add(pair_flops=3 * products.get_total_flops(), exchange_bytes=sent)
        return result

    def per_token(self, matrix_products: int, length: int) -> Work:
        """All that was counted; matrix products that have been run come from outside. Pairs have
        been computed once more for their gradients."""
        self.add(matrix_flops=matrix_products - 4 * self._between_tokens)
        return Work(**{name: value / length for name, value in asdict(self._row).items()})


_counter: ContextVar[WorkCounter | None] = ContextVar("work_counter", default=None)


def work_counter() -> WorkCounter | None:
    """The one that hears this step, if any; a compiler, which cannot look it up, sees none."""
    return None if torch.compiler.is_compiling() else _counter.get()


"""Who counts this thread's work; None: nobody."""


@contextmanager
def counting(length: int, ranks: int) -> Iterator[list[Work]]:
    """The work of a model's step inside, on one row of that length; there on leaving."""
    result: list[Work] = []
    counter = WorkCounter(ranks)
    token = _counter.set(counter)
    try:
        with FlopCounterMode(display=False) as matrix_products:
            yield result
    finally:
        _counter.reset(token)
    result.append(counter.per_token(matrix_products.get_total_flops(), length))
