"""What every model of MODELS is: a function of a batch and a shard that says what it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from data_pipeline.counter_rng import hash64, normals, rotations
from data_pipeline.errors import ConfigError, OptionError, ShapeError
from scaling.execution import Execution
from scaling.ops.tiles import Tiled, set_execution
from scaling.parallel.collectives import global_sums
from scaling.parallel.shard import Layout, SequenceShard, redistribute_batch
from scaling.work import Work, counting

Symmetry = Literal["E(3)", "SE(3)", "none"]
TRANSLATION = 100.0
"""Length of the translation that equivariance is tried with; Å for molecules."""
Channels = Annotated[int, Ge(0)]


class Model(Tiled, ABC):
    """A model on batches: new points, vectors and scalars from old ones.

    It works alike on one process and on a shard: neither its outputs nor their gradients tell how
    many ranks there are. Rotations act on points and vectors, translations on points.

    Args:
        vectors: free vector channels of the batches, besides the points.
        scalars: their scalar channels.
    """

    symmetry: Symmetry = "E(3)"
    """Motions under which the output moves with the input; options may leave fewer."""
    layout: Layout = "cyclic"
    """Of the shards that it works on; others are brought into it, and the result back."""
    width: ClassVar[str | None] = None
    """The option that `build(parameters=...)` chooses."""
    width_divisor: ClassVar[str | None] = None
    """The option that must divide it."""
    neighbours: int = 0
    """That it looks for, of each token; 0: none."""
    gathers_whole = False

    def __init__(self, vectors: int, scalars: int) -> None:
        super().__init__()
        self.vectors, self.scalars = vectors, scalars

    @classmethod
    @abstractmethod
    def tiny(cls) -> dict[str, Any]:
        """Options of a small one for tests; freshly built it moves its input by a tenth or more."""

    @abstractmethod
    def move(self, batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
        """The model, on a shard of its own layout."""

    def check_longest(self, tokens: int) -> None:
        """Raises OptionError if sequences of that many tokens at most have too few neighbours; a
        batch of short ones among longer is none."""
        if self.neighbours and self.neighbours >= tokens:
            rule = f"no sequence is longer than {tokens} tokens: {tokens - 1} others at most"
            raise OptionError("neighbours", self.neighbours, rule)

    def work(self, length: int, ranks: int = 1) -> Work:
        """What a training step must compute, move and exchange for a full row of that many tokens
        on that many ranks, layer by layer; float32."""
        if length < 1 or ranks < 1:
            raise ConfigError(f"work(length={length}, ranks={ranks}): both must be at least 1")
        shapes = ((3,), (self.vectors, 3), (self.scalars,))
        fields = [torch.empty(1, *shape, length, device="meta") for shape in shapes]
        batch = GeometricBatch(*fields, lengths=(length,))
        weights = {
            name: torch.empty_like(x, dtype=torch.float32, device="meta", requires_grad=True)
            for name, x in self.named_parameters()
        } | {name: x.to("meta") for name, x in self.named_buffers()}
        usual = self.execution
        set_execution(self, Execution())
        try:
            with counting(length, ranks) as work:
                out = torch.func.functional_call(self, weights, (batch,))
                (out.points.sum() + out.vectors.sum() + out.scalars.sum()).backward()
        finally:
            set_execution(self, usual)
        return work[0]

    def forward(self, batch: GeometricBatch, shard: SequenceShard | None = None) -> GeometricBatch:
        """
        Args:
            batch: this rank's tokens.
            shard: which of the whole rows these are; None: all, on one process.

        Raises:
            ShapeError: the batch has other channels, tokens, number types or devices than the model
                and the shard.
            ConfigError: the parameters are half-precision numbers.
        """
        self._check(batch, shard)
        if shard is None or shard.layout == self.layout:
            return self.move(batch, shard)
        own = SequenceShard(shard.length, shard.group, self.layout)
        moved = self.move(redistribute_batch(batch, shard, own), own)
        return redistribute_batch(moved, own, shard)

    def _check(self, batch: GeometricBatch, shard: SequenceShard | None) -> None:
        if not isinstance(batch, GeometricBatch) or not isinstance(shard, SequenceShard | None):
            raise ShapeError(
                "a model takes a GeometricBatch and a SequenceShard or None, not "
                f"{type(batch).__name__} and {type(shard).__name__}"
            )
        came = (batch.vectors.shape[1], batch.scalars.shape[1])
        if came != (self.vectors, self.scalars):
            raise ShapeError(
                f"the batch has {came[0]} vector and {came[1]} scalar channels, the model was built"
                f" for vectors={self.vectors} and scalars={self.scalars}"
            )
        tokens = batch.points.shape[-1]
        if shard is not None and shard.n_local != tokens:
            raise ShapeError(f"the batch has {tokens} tokens, {shard} holds {shard.n_local}")
        if not shard and batch.lengths and max(batch.lengths) > tokens:
            raise ShapeError(f"the batch has {tokens} tokens, but rows of {batch.lengths}")
        half = {p.dtype for p in self.parameters()} & {torch.float16, torch.bfloat16}
        if half:
            raise ConfigError(
                f"the model has {half.pop()} parameters, in which its norms overflow; keep them in "
                "float32 and run it under torch.autocast (precision=bf16 does so in training)"
            )
        weight = next(self.parameters(), batch.points)
        for name in ("points", "vectors", "scalars"):
            x: Tensor = getattr(batch, name)
            if (x.dtype, x.device) != (weight.dtype, weight.device):
                raise ShapeError(
                    f"{name} are {x.dtype} on {x.device}, the model's parameters {weight.dtype} on "
                    f"{weight.device}: move one with .to(device, dtype)"
                )


@torch.no_grad()
def equivariance_error(
    model: Callable[[GeometricBatch, SequenceShard | None], GeometricBatch],
    batch: GeometricBatch,
    shard: SequenceShard | None = None,
    *,
    mirrored: bool = False,
) -> float:
    """rms of f(Rx + t) - (R f(x) + t) over valid tokens, divided by that of f(x) - x.

    The error is of points, vectors and scalars together, what it is divided by of points and
    vectors, for a random rotation R and a translation t by 100. Collective over the world. nan
    where the model moves nothing.

    Args:
        model: f; a function of a batch and a shard.
        batch: x; this rank's tokens of it.
        mirrored: R is a rotation and a reflection.
    """
    key = hash64("equivariance")
    like = {"dtype": torch.float64, "device": batch.points.device}
    turn = torch.tensor(rotations(key, 0, 1)[0], **like) * (-1 if mirrored else 1)
    shift = torch.tensor(normals(key, 0, 1)[0, :3], **like).unsqueeze(-1)
    shift = TRANSLATION * shift / shift.norm()

    def moved(x: GeometricBatch) -> GeometricBatch:
        points, vectors = turn @ x.points.double() + shift, turn @ x.vectors.double()
        return x.replace(points=points, vectors=vectors)

    def distance(x: GeometricBatch, y: GeometricBatch, *names: str) -> Tensor:
        """Sum of squares over valid tokens."""
        total = torch.zeros((), **like)
        for name in ("points", "vectors", *names):
            a, b = getattr(x, name), getattr(y, name)
            valid = batch.mask.reshape(len(a), *[1] * (a.ndim - 2), a.shape[-1])
            total += torch.where(valid, a.double() - b.double(), 0.0).square().sum()
        return total

    answer = model(batch, shard)
    turned = model(moved(batch).to(like["device"], batch.points.dtype), shard)
    error, change = global_sums(
        distance(turned, moved(answer), "scalars"), distance(answer, batch), device=like["device"]
    )
    return (error / change) ** 0.5 if change > 0 else float("nan")
