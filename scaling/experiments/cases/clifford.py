"""What Clifford layers cost, beside the dense 8x8x8 table of their authors' code.

Eager and compiled. The dense side is that of the straightforward training step: multivectors last,
all 8 components throughout, weights expanded to the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from scaling.algebra.clifford import PATHS, CliffordMLP, embed, geometric_product
from scaling.experiments.experiment import Experiment, Point, joined, row
from scaling.experiments.naive import clifford_mlp, dense_product
from scaling.experiments.options import Checked, Count, Counts, Positive
from scaling.experiments.timing import medians
from scaling.parallel.collectives import Group
from scaling.runs.identity import NotIdentity
from scaling.runs.rows import Row

IN, OUT = 17, 51
"""Channels of a Clifford MLP: those of phi in the paper's recall model."""
SPEED = "speed-up over the dense table"
ERROR = "error against the dense table"


@dataclass
class CliffordOptions(Checked):
    """One rank; forward and backward in float32."""

    lengths: Annotated[Counts, NotIdentity()]
    """N, tokens of one row."""
    channels: Count = 128
    """Of the product."""
    hidden: Counts = field(default_factory=lambda: [128, 16])
    """Channels inside Clifford MLPs."""
    compiled: bool = True
    """Compile ours too, with torch.compile."""
    seconds: Positive = 5.0
    """Of every comparison; at least three rounds."""


def clifford_rows(case: CliffordOptions, group: Group, device: torch.device) -> list[Row]:
    """The product's error, and speed-ups over the dense side, for every length."""
    torch.manual_seed(0)
    rows = []
    for n in sorted(case.lengths):
        x, y, grad = torch.randn(3, 1, 8, case.channels, n, device=device)
        weights = torch.randn(PATHS, case.channels, device=device)
        dense = _step(dense_product, [*map(_components_last, (x, y)), weights], grad)
        sides = {"dense": dense} | _ours(case, geometric_product, [x, y, weights], grad)
        for name in sides.keys() - {"dense"}:
            error = _error(sides[name](), dense())
            rows.append(row(f"product, {name}: {ERROR}", 1, n, error, "", channels=case.channels))
        rows += _compare("product", sides, n, case.channels, case.seconds, group, device)
        for hidden in case.hidden:
            mlp = CliffordMLP(IN, hidden, OUT, grades=2).to(device)
            x = embed(torch.randn(1, IN, n, device=device), torch.randn(1, IN, 3, n, device=device))
            grad = torch.randn(1, 4, OUT, n, device=device)
            sides = {"dense": _step(partial(_dense_mlp, mlp), [x], grad, mlp)}
            sides |= _ours(case, mlp, [x], grad, mlp)
            rows += _compare(
                f"Clifford MLP of {hidden}", sides, n, hidden, case.seconds, group, device
            )
    return rows


Step = Callable[[], list[Tensor]]


def _ours(
    case: CliffordOptions,
    function: Callable[..., Tensor],
    given: list[Tensor],
    grad: Tensor,
    module: nn.Module | None = None,
) -> dict[str, Step]:
    sides = {"eager": _step(function, given, grad, module)}
    if case.compiled:
        torch._dynamo.reset()  # programs of other shapes would count against a limit
        fused = torch.compile(function, fullgraph=True, dynamic=False)
        sides["compiled"] = _step(fused, given, grad, module)
    return sides


def _step(
    function: Callable[..., Tensor],
    given: list[Tensor],
    grad: Tensor,
    module: nn.Module | None = None,
) -> Step:
    """The value, and gradients of what is given and of the module's parameters."""
    given = [x.detach().requires_grad_() for x in given]
    wanted = [*given, *(module.parameters() if module else ())]

    def step() -> list[Tensor]:
        value = function(*given)
        to_value = grad if value.shape == grad.shape else _components_last(grad)
        return [value, *torch.autograd.grad(value, wanted, to_value)]

    return step


def _compare(
    name: str,
    sides: dict[str, Step],
    length: int,
    channels: int,
    seconds: float,
    group: Group,
    device: torch.device,
) -> list[Row]:
    times = medians(sides, group, device, seconds)
    return [
        row(f"{name}, {side}: {SPEED}", 1, length, time, "s", times["dense"] / time, channels)
        for side, time in times.items()
        if side != "dense"
    ]


def _error(found: list[Tensor], dense: list[Tensor]) -> float:
    """Largest error of the value and the gradients, relative to their norms."""
    errors = []
    for x, y in zip(found, dense, strict=True):
        x = _components_last(x) if x.dim() == 4 else x
        errors.append((torch.linalg.norm(x - y) / torch.linalg.norm(y)).item())
    return max(errors)


def _dense_mlp(mlp: CliffordMLP, x: Tensor) -> Tensor:
    return clifford_mlp(mlp, nn.functional.pad(x, (0, 0, 0, 0, 0, 8 - x.shape[1])))[:, :4]


def _components_last(x: Tensor) -> Tensor:
    """(b, d, c, n) -> (tokens, c, d)."""
    return x.permute(0, 3, 2, 1).flatten(0, 1).contiguous()


GOALS = {
    f"product, eager: {SPEED}": (">=", 5.0),
    f"product, compiled: {SPEED}": (">=", 12.0),
    f"product, eager: {ERROR}": ("<=", 1e-6),
    f"product, compiled: {ERROR}": ("<=", 1e-6),
}
BENCH = Experiment(
    CliffordOptions,
    lambda case: [Point(joined(case.lengths), 1, case)],
    clifford_rows,
    GOALS,
)
