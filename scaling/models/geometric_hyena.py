"""Geometric Hyena by switches of SE(3)-Hyena: messages, context tokens, normalised keys, chirality.

Geometric Hyena (arXiv 2505.22560, ICML 2025) multiplies scalars and vectors of a channel at once,

    a = a_q*a_k + r_q·r_k,   r = a_q*r_k + a_k*r_q + r_q×r_k,

with * a long convolution: SE3Hyena's products with `chiral`, which lets the axial vector join. The
other switches are second-hand, from descriptions and not from its text or code, which is not
published: queries, keys and values come from messages between neighbours with global context tokens
(here one local branch before the first block: scaling/models/messages.py), and keys and values have
norm 1. It is no reproduction.
"""

from typing import Annotated, Any

from annotated_types import Ge

from scaling.models.messages import Messages
from scaling.models.protocol import Channels
from scaling.models.se3_hyena import SE3Hyena


class GeometricHyena(SE3Hyena):
    """
    Args:
        options: the others of `SE3Hyena`, as there.
    """

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        chiral: bool = True,
        normalise: bool = True,
        messages: Messages = "neighbours",
        context: Annotated[int, Ge(0)] = 4,
        **options: Any,
    ) -> None:
        switches: dict[str, Any] = {"normalise": normalise, "messages": messages}
        switches |= {"chiral": chiral, "context": context}
        super().__init__(vectors, scalars, **switches, **options)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return super().tiny() | {"neighbours": 4, "context": 2}
