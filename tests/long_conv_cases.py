"""Calls of the long convolutions, and how far a rank's share is from one process's result."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scaling.long_conv.operators import geometric_long_conv, scalar_long_conv, vector_long_conv
from scaling.parallel.shard import SequenceShard

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
TERMS = {  # names of the operands that they take
    None: ("qs", "ks", "q", "k"),
    ("scalar",): ("qs", "ks"),
    ("dot", "cross"): ("q", "k"),
    ("scale",): ("qs", "k"),
    ("scalar", "scale"): ("qs", "ks", "q"),
}


@dataclass
class Case:
    """A call and what one process makes of it."""

    operator: str
    length: int
    channels: int
    rows: int
    static: bool
    dtype: torch.dtype
    options: dict[str, Any]
    seed: int
    operands: dict[str, Tensor] = field(default_factory=dict, repr=False)
    weights: list[Tensor] = field(default_factory=list, repr=False)
    expected: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        q = (self.rows, self.channels)
        k = (self.channels,) if self.static else q
        vectors, n = {"scalar": (), "vector": (3,)}.get(self.operator), self.length
        if vectors is not None:
            self.operands = {"q": numbers(*q, *vectors, n), "k": numbers(*k, *vectors, n)}
        else:
            shapes = {"qs": (*q, n), "ks": (*k, n), "q": (*q, 3, n), "k": (*k, 3, n)}
            names = TERMS[self.options.get("terms")]
            self.operands = {name: numbers(*shapes[name]) for name in names}
        whole = {name: x.clone().requires_grad_() for name, x in self.operands.items()}
        results = self.call(whole, None)
        self.weights = [numbers(*u.shape) for u in results]
        torch.autograd.backward(results, self.weights)
        self.expected = [*(u.detach() for u in results), *gradients(whole)]

    def call(self, x: dict[str, Tensor], shard: SequenceShard | None) -> tuple[Tensor, ...]:
        if self.operator == "geometric":
            q, k = (x.get("qs"), x.get("q")), (x.get("ks"), x.get("k"))
            return geometric_long_conv(q, k, shard, **self.options)
        one = scalar_long_conv if self.operator == "scalar" else vector_long_conv
        return (one(x["q"], x["k"], shard, **self.options),)

    def error(self, group: Any, device: str = "cpu") -> float:
        """Largest one of this rank's values and gradients, relative to the whole tensor's norm."""
        shard = SequenceShard(self.length, group)

        def local(x: Tensor) -> Tensor:
            return shard.scatter(x).to(device)

        operands = {name: local(x).requires_grad_() for name, x in self.operands.items()}
        results = self.call(operands, shard)
        torch.autograd.backward(results, [local(x) for x in self.weights])
        errors = [
            ((a - local(b)).double().norm() / b.double().norm().clamp(min=1e-9)).item()
            for a, b in zip([*results, *gradients(operands)], self.expected, strict=True)
        ]
        return max(errors) if all(error == error for error in errors) else float("inf")


def gradients(tensors: dict[str, Tensor]) -> list[Tensor]:
    assert all(x.grad is not None for x in tensors.values())
    return [x.grad for x in tensors.values() if x.grad is not None]
