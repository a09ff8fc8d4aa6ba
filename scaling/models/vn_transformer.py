"""VN-Transformer: attention among tokens that are lists of vectors (arXiv 2206.04176).

A token is C vectors x_c of 3 + F numbers: three coordinates, which turn, and F scalars, which are
carried along ("early fusion"). All layers mix channels, alike for every number:

    linear       y_o = sum_c W_oc x_c
    non-linear   q = W x, k = U x;   q_c, or q_c - (q_c·k_c / |k_c|²) k_c where q_c·k_c < 0
    norm         LN(|x_1|, .., |x_C|)_c x_c / |x_c|
    attention    softmax_j(q_i·k_j / sqrt(d (3 + F))) over all numbers of a head's d channels
    block        x <- x + norm(out(attention(x)));  x <- x + norm(linear(non-linear(linear(x))))

so that each commutes with rotations and reflections. `attention="distance"` has the logits
-|q_i - k_j|² / sqrt(d (3 + F)) with k = q (Kim et al., arXiv 2006.04710). With `latents=M` a body
has M latents, linear maps of its mean token, which attend to its tokens, and these to them: O(N M)
instead of O(N²). `bias_epsilon` adds to each channel of a linear map a vector of that length that
does not turn: approximate equivariance; `symmetry` is "none" then, for no number type hides it.

Points are centred body by body. Each vector enters as a channel, and so do all scalars together:
the input's, log(1 + length) of each vector, and sines of the token's place (`positions`), without
which tokens are a set.

`reference_faults` computes what VN-transformer 0.1.0 of PyPI does, from whose weights
`from_package` makes a model. Its faults, mended by default:

- the non-linearity subtracts (q·k / |k|) k, which is no projection and hangs on the scale of U;
- weights are drawn with variance 1 at every width, so that softmaxes begin saturated;
- of -|q - k|² only q·k is scaled by 1 / sqrt(d (3 + F)), so that the result is no distance;
- points are centred, if at all, by the mean over all rows and their padding (here counted as 0);
- a bias is one number for all coordinates and scalars: a vector along (1, 1, 1) whose length is
  epsilon over all channels together;
- scalars share the channel of the points: a token is a single direction of 3 + F numbers, and all
  layers commute with rotations that turn points into scalars.

It has no places, no free vectors, and no way from latents back to tokens.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError, OptionError, ShapeError
from data_pipeline.options import check_arguments
from scaling.algebra.norms import smooth_sqrt
from scaling.models.blocks import Mask
from scaling.models.layers import ChannelLinear, sinusoids
from scaling.models.protocol import Channels, Model
from scaling.models.streams import Vectors
from scaling.models.vector_neurons import (
    Fused,
    LatentBlock,
    Logits,
    Variant,
    VNBlock,
    VNLayerNorm,
    VNLinear,
)
from scaling.ops.masked_rows import MaskedRows, zero_invalid
from scaling.ops.offload import offloading
from scaling.parallel.shard import SequenceShard


class VNTransformer(Model):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        channels: vectors of a token, C; the paper's and the package's dim.
        blocks: attention and feed-forward.
        heads: groups of channels that attend on their own.
        head_channels: channels of each; None: channels / heads.
        widening: channels inside a feed-forward are C times this.
        features: scalars that a token carries, F, linear maps of its scalars and places; None:
            these themselves.
        positions: sines and cosines of a token's place in its body; 0: tokens are a set.
        attention: logits by the product of queries and keys, or by their distance.
        latents: latents that a body's tokens attend to; 0: they attend to each other.
        centred: take the mean from a body's points first; else translations change the result.
        bias_epsilon: length of the biases, which do not turn with the input.
        readout: scale of the initial read-out; small where the answer is near the input.
        reference_faults: compute what the package VN-transformer computes.

    Raises:
        OptionError: heads that do not divide the channels.
    """

    width = "channels"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        channels: Annotated[int, Ge(1)] = 32,
        blocks: Annotated[int, Ge(1)] = 2,
        heads: Annotated[int, Ge(1)] = 4,
        head_channels: Annotated[int, Ge(1)] | None = 8,
        widening: Annotated[int, Ge(1)] = 4,
        features: Annotated[int, Ge(0)] | None = 8,
        positions: Annotated[int, Ge(0)] = 16,
        attention: Logits = "product",
        latents: Annotated[int, Ge(0)] = 0,
        centred: bool = True,
        bias_epsilon: Annotated[float, Ge(0)] = 0.0,
        readout: float = 1.0,
        reference_faults: bool = False,
    ) -> None:
        super().__init__(vectors, scalars)
        if head_channels is None and channels % heads:
            rule = f"must divide channels={channels}; or give head_channels"
            raise OptionError("heads", heads, rule)
        exact = centred and not bias_epsilon and not reference_faults
        self.symmetry = "E(3)" if exact else "none"
        self.positions, self.centred, self.fused = positions, centred, reference_faults
        kept = scalars + positions
        self.embed_scalars = self.read_scalars = None
        if features is not None:
            self.embed_scalars = ChannelLinear(kept + 1 + vectors, features, bias=True)
            self.read_scalars = ChannelLinear(features, scalars, bias=True, gain=readout)
        variant = Variant(bias_epsilon, reference_faults)
        inputs = 1 + vectors + (not self.fused)
        self.embed = VNLinear(inputs, channels, variant)
        sizes = channels, heads, head_channels or channels // heads, widening
        self.blocks = nn.ModuleList(
            VNBlock(*sizes, attention, variant)
            if not latents
            else LatentBlock(*sizes, attention, variant, latents)
            for _ in range(blocks)
        )
        self.read_norm = VNLayerNorm(channels, variant)
        self.read = VNLinear(channels, inputs, variant, gain=readout)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        shape = {"channels": 8, "blocks": 2, "heads": 2, "head_channels": 3, "widening": 2}
        return shape | {"features": 4, "positions": 4}

    def move(self, batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
        rows = MaskedRows.of(batch, shard)
        inputs = self._inputs(batch, rows)
        with offloading(self.execution):
            (x,) = self.in_tiles(self.enter, inputs, batch.scalars, rows.places, batch.mask)
            for block in self.blocks:
                (x,) = block(x, rows=rows)
            step, change = self.in_tiles(self.leave, x, batch.mask)
        return rows.moved(batch, step, change)

    def enter(
        self,
        inputs: Vectors,
        scalars: Float[Tensor, "b s n"],
        places: Int[Tensor, "b n"],
        mask: Mask,
    ) -> tuple[Fused]:
        """The vectors that the first block gets."""
        waves = sinusoids(places, self.positions, scalars)
        f = zero_invalid(torch.cat([scalars, waves], 1), mask)
        if self.embed_scalars is not None:
            lengths = torch.log1p(smooth_sqrt(inputs.square().sum(2)))
            f = self.embed_scalars(torch.cat([f, lengths], 1))
        x, f = pad(inputs, (0, 0, 0, f.shape[1])), pad(f.unsqueeze(1), (0, 0, 3, 0))
        x = torch.cat([x[:, :1] + f, x[:, 1:]] if self.fused else [x, f], 1)
        return (self.embed(x).to(inputs.dtype),)

    def leave(self, x: Fused, mask: Mask) -> tuple[Tensor, Tensor]:
        """What the last block's vectors add to the input."""
        y = zero_invalid(self.read(self.read_norm(x)), mask)
        f = y[:, 0 if self.fused else -1, 3:]
        if self.read_scalars is not None:
            f = zero_invalid(self.read_scalars(f), mask)
        return y[:, : 1 + self.vectors, :3], f[:, : self.scalars]

    def _inputs(self, batch: GeometricBatch, rows: MaskedRows) -> Vectors:
        if self.centred and not self.fused:
            return rows.centred_inputs(batch)
        inputs = rows.zero_invalid(torch.cat([batch.points.unsqueeze(1), batch.vectors], 1))
        if not self.centred:
            return inputs
        tokens = batch.points.shape[-1] if rows.shard is None else rows.shard.length
        mean = rows.sum(batch.points).sum(0) / max(len(inputs) * tokens, 1)
        points = rows.zero_invalid(batch.points - mean.unsqueeze(-1))
        return torch.cat([points.unsqueeze(1), inputs[:, 1:]], 1)


def from_package(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> VNTransformer:
    """The model that computes what the package's VNTransformer(**arguments) does, with its weights.

    The package's coordinates are what the model adds to the points, but for the mean point that
    translation_equivariance adds; its features are what the model adds to dim_feat scalars.

    Raises:
        ConfigError: arguments that the package does not have, or that have no equal here; weights
            that are missing or too many.
        ShapeError: a weight of another shape.
    """
    check_arguments("VN-transformer", _options, arguments)
    for key in {"dim", "depth"} - arguments.keys():
        raise ConfigError(f"VN-transformer cannot be built without {key}")
    options = _options(**arguments)
    model = VNTransformer(vectors=0, reference_faults=True, **options)
    given = dict(state_dict)
    tied = options["attention"] == "distance"
    for key in [key for key in given if tied and ".to_k." in key]:  # one map under two names
        query = given.get(key.replace("to_k", "to_q"))
        if query is None or not torch.equal(given.pop(key), query):
            raise ConfigError(f"{key} of the state dict differs from to_q: not l2_dist_attn")
    ours = {_package_name(name): x for name, x in model.state_dict().items()}
    saved = "give the arguments with which it was saved"
    for what, keys in (("lacks", ours.keys() - given), ("has an unknown", given.keys() - ours)):
        if keys:
            built = ", ".join(f"{key}={value}" for key, value in arguments.items())
            raise ConfigError(
                f"the state dict {what} {min(keys)} for VN-transformer({built}); {saved}"
            )
    for key, x in ours.items():
        if given[key].shape != x.shape:
            raise ShapeError(
                f"{key} is {tuple(given[key].shape)} in the state dict and {tuple(x.shape)} by the "
                f"arguments; {saved}"
            )
    model.to(given["vn_proj_in.1.weight"].dtype)
    model.load_state_dict({name: given[_package_name(name)] for name in model.state_dict()})
    return model


def _options(
    *,
    dim: Annotated[int, Ge(1)],
    depth: Annotated[int, Ge(1)],
    num_tokens: None = None,
    dim_feat: Annotated[int, Ge(0)] | None = None,
    dim_head: Annotated[int, Ge(1)] = 64,
    heads: Annotated[int, Ge(1)] = 8,
    dim_coor: Literal[3] = 3,
    reduce_dim_out: Literal[True] = True,
    bias_epsilon: Annotated[float, Ge(0)] = 0.0,
    l2_dist_attn: bool = False,
    flash_attn: bool = False,
    translation_equivariance: bool = False,
    translation_invariant: bool = False,
) -> dict[str, Any]:
    """The package's arguments as options of the model; flash attention has the same numbers."""
    return {
        "scalars": dim_feat or 0,
        "channels": dim,
        "blocks": depth,
        "heads": heads,
        "head_channels": dim_head,
        "features": None,
        "positions": 0,
        "attention": "distance" if l2_dist_attn else "product",
        "centred": translation_equivariance or translation_invariant,
        "bias_epsilon": bias_epsilon,
    }


PACKAGE_NAMES = {
    "embed": "vn_proj_in.1",
    "read_norm": "vn_proj_out.0.ln",
    "read": "vn_proj_out.1",
    "queries": "0.to_q",
    "keys": "0.to_k",
    "values": "0.to_v",
    "out": "0.to_out",
    "attention_norm": "1.ln",
    "widen": "2.0",
    "activation": "2.1",
    "narrow": "2.2",
    "feed_forward_norm": "3.ln",
    "gain": "gamma",
    "shift": "beta",
    "blocks": "encoder.layers",
}
"""Modules and weights of the model, as the package calls them."""


def _package_name(name: str) -> str:
    return ".".join(PACKAGE_NAMES.get(part, part) for part in name.split("."))
