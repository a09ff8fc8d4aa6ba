"""Products of vectors."""

import torch
from torch import Tensor


def cross(a: Tensor, b: Tensor, dim: int = -2) -> Tensor:
    """Cross product along `dim`; measured faster than torch.linalg.cross."""
    (a0, a1, a2), (b0, b1, b2) = a.unbind(dim), b.unbind(dim)
    components = [
        torch.addcmul(a1 * b2, a2, b1, value=-1),
        torch.addcmul(a2 * b0, a0, b2, value=-1),
        torch.addcmul(a0 * b1, a1, b0, value=-1),
    ]
    return torch.stack(components, dim)
