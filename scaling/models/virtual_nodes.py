"""Virtual nodes of bodies (FastEGNN): what tokens hear of them, and they of tokens.

C of them a body, with positions X that begin at its centroid x̄ and learned features H:

    M_ic = phi_e(h_i, H_c, |X_c - x_i|, (X_c - x̄)·(X_c' - x̄) for all c')
    x_i moves by mean_c (x_i - X_c) phi_x(M_ic), and all M_ic are handed on
    X_c <- X_c + mean_i (X_c - x_i) phi_out(M_ic),   H_c <- H_c + phi_h(H_c, mean_i M_ic)

Zhang et al., ICML 2024; distributed in DistEGNN (arXiv 2506.19482). Means over a body take one
exchange a layer, of a size that does not depend on the tokens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scaling.algebra.norms import smooth_sqrt
from scaling.models.layers import mlp
from scaling.ops.masked_rows import MaskedRows

Scalars = Float[Tensor, "b c n"]
Vectors = Float[Tensor, "b v 3 n"]
Moved = Float[Tensor, "b m 3 n"]
"""Displacements of the points, and of vectors."""


class VirtualNodes(nn.Module):
    """One layer's. Their state: centred points of the input; positions and features of the nodes of
    each token's body; and where the mean of its points is now.

    Args:
        first: features begin here, with learned ones.
        updated: positions and features change.
    """

    def __init__(
        self, hidden: int, nodes: int, moved: int, gain: float, first: bool, updated: bool
    ) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(1, hidden, nodes, 1)) if first else None
        c, self.nodes, self.updated = hidden, nodes, updated
        self.phi_e = mlp(2 * c + 1 + nodes, c, c, ends_in_silu=True)
        self.phi_x = mlp(c, c, moved, gain)
        if updated:
            self.phi_out, self.phi_h = mlp(c, c, 1, gain), mlp(2 * c, c, c)

    def entered(self, state: Sequence[Tensor]) -> Sequence[Tensor]:
        """The state that this layer begins with."""
        centred, at, features, mean = state
        return state if self.learned is None else (centred, at, features + self.learned, mean)

    def to_tokens(
        self,
        h: Scalars,
        w: Moved,
        centred: Float[Tensor, "b 3 n"],
        at: Float[Tensor, "b 3 z #n"],
        features: Float[Tensor, "b c z #n"],
        mean: Float[Tensor, "b 3 #n"],
    ) -> tuple[Tensor, ...]:
        """What each token hears, its push, and if the nodes are updated what it pulls them by."""
        away = at - (centred + w[:, 0]).unsqueeze(2)
        around = at - mean.unsqueeze(2)
        products = (around.unsqueeze(2) * around.unsqueeze(3)).sum(1)
        distances = smooth_sqrt(away.square().sum(1, keepdim=True))
        inputs = (h.unsqueeze(2), features, distances, products)
        m = self.phi_e(torch.cat([x.expand(-1, -1, self.nodes, h.shape[-1]) for x in inputs], 1))
        push = -(self.phi_x(m).unsqueeze(2) * away.unsqueeze(1)).mean(3)
        pull = [(self.phi_out(m) * away).flatten(1, 2)] if self.updated else []
        return m.flatten(1, 2), push, *pull

    def next_state(
        self, w: Moved, state: Sequence[Tensor], rows: MaskedRows, *told: Float[Tensor, "b _ n"]
    ) -> tuple[Tensor, ...]:
        """After the layer has moved the points; by one exchange.

        Args:
            told: what tokens heard, and pull by; not read if nodes are not updated.
        """
        if not self.updated:
            return tuple(state)
        centred, at, features, _ = state
        means = rows.body_mean(torch.cat([centred + w[:, 0], *told], 1))
        mean, heard, pull = means.split([3, *[x.shape[1] for x in told]], 1)
        at = at + pull.unflatten(1, (3, self.nodes))
        both = torch.cat([features, heard.unflatten(1, (-1, self.nodes))], 1)
        return centred, at, features + self.phi_h(both), mean


def state_at_centroid(
    points: Float[Tensor, "b 3 n"], rows: MaskedRows, nodes: int, hidden: int
) -> tuple[Tensor, ...]:
    """Before the first layer, without features."""
    centred, centre = rows.centre(points)
    mean = torch.zeros_like(centre)
    at = torch.stack([mean] * nodes, 2)
    return centred, at, mean.new_zeros(len(points), hidden, nodes, mean.shape[-1]), mean
