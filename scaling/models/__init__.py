"""One file a model; models hold no process group."""

from bisect import bisect_left
from typing import Any

import torch

from data_pipeline.errors import ConfigError, OptionError
from data_pipeline.options import check_arguments
from scaling.models.egnn import EGNN
from scaling.models.protocol import Model as Model
from scaling.models.protocol import equivariance_error as equivariance_error
from scaling.models.se3_hyena import SE3Hyena
from scaling.models.se3_hyena_paper import SE3HyenaPaper

MODELS: dict[str, type[Model]] = {
    "se3_hyena": SE3Hyena,
    "se3_hyena_paper": SE3HyenaPaper,
    "egnn": EGNN,
}
WIDTHS = range(1, 1 << 16)
"""That `build(parameters=...)` chooses from."""


def build(
    name: str, vectors: int, scalars: int, parameters: int | None = None, **options: Any
) -> Model:
    """A model by name. model(batch, shard=None) gives new points, vectors and scalars.

    Args:
        vectors: free vector channels Cv of the batches it will see.
        scalars: scalar channels Cs.
        parameters: choose the model's width so that it has about this many.
        options: the model's own keyword arguments.

    Raises:
        ConfigError: no such model, no such option, or a value that cannot be.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    chosen: dict[str, Any] = {"vectors": vectors, "scalars": scalars, **options}
    check_arguments(f"model {name}", MODELS[name], chosen)
    if parameters is not None:
        chosen[MODELS[name].width] = nearest_width(name, parameters, chosen)
    return MODELS[name](**chosen)


def nearest_width(name: str, parameters: int, options: dict[str, Any]) -> int:
    """The width with which a model's number of parameters comes nearest to `parameters`.

    Raises:
        OptionError: the width is given too, or `parameters` is not positive.
    """
    width = MODELS[name].width
    if width in options:
        raise OptionError("parameters", parameters, f"chooses {width}; give one of the two")
    if not isinstance(parameters, int) or parameters < 1:
        raise OptionError("parameters", parameters, "must be a whole number from 1")

    def count(value: int) -> int:
        with torch.device("meta"):
            model = MODELS[name](**(options | {width: value}))
        return sum(p.numel() for p in model.parameters())

    above = bisect_left(WIDTHS, parameters, key=count)
    return min(WIDTHS[max(above - 1, 0) : above + 1], key=lambda w: abs(count(w) - parameters))
