"""Scalar features of a token's place in its sequence."""

import numpy as np
from jaxtyping import Float32, Int

DECAYS = (2.0, 8.0, 32.0)
"""Tokens over which the distance from an end decays by e."""
EDGES = 1 + 2 * len(DECAYS)
"""Number of edge features."""


def edges(
    index: Int[np.ndarray, "#b #n"], lengths: Int[np.ndarray, "#b #n"]
) -> Float32[np.ndarray, "b s n"]:
    """Parity, and exp(-d/decay) for the distances d from both ends of rows of `lengths` tokens.

    Unlike sinusoids they mean the same at any length. Zero outside the row.
    """
    n = index.astype(np.float32)
    last = (lengths - 1).astype(np.float32)
    rows, tokens = np.broadcast_shapes(index.shape, lengths.shape)
    out = np.zeros((rows, EDGES, tokens), np.float32)
    out[:, 0] = 1 - 2 * (index % 2)
    for i, decay in enumerate(DECAYS):
        out[:, 1 + 2 * i] = np.exp(-n / np.float32(decay))
        out[:, 2 + 2 * i] = np.exp(np.minimum(n - last, 0) / np.float32(decay))
    return out * ((index >= 0) & (index < lengths))[:, None]
