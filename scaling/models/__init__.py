"""One file a model; models hold no process group."""

from typing import get_args

from torch import nn

from data_pipeline.errors import ConfigError
from scaling.long_conv.operators import Padding
from scaling.models.se3_hyena import SE3Hyena
from scaling.models.se3_hyena_paper import SE3HyenaPaper

MODELS: dict[str, type[nn.Module]] = {
    "se3_hyena": SE3Hyena,
    "se3_hyena_paper": SE3HyenaPaper,
}

SIZES = {"channels", "hidden", "operators", "gate_hidden"}
PADDINGS = get_args(Padding)


def build(name: str, vectors: int, scalars: int, **options: object) -> nn.Module:
    """A model by name. model(batch, shard=None) gives new points, vectors and scalars.

    Args:
        vectors: free vector channels Cv of the batches it will see.
        scalars: scalar channels Cs.
        options: the model's own keyword arguments.

    Raises:
        ConfigError: no such model, no such option, or a size that cannot be.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    if vectors < 0 or scalars < 0:
        raise ConfigError(f"vectors={vectors} and scalars={scalars} cannot be negative")
    for option in SIZES & options.keys():
        if not isinstance(size := options[option], int) or size < 1:
            raise ConfigError(f"model.{option}={size}: {name} needs a whole number from 1")
    if (padding := options.get("padding", PADDINGS[0])) not in PADDINGS:
        raise ConfigError(f"model.padding={padding!r}: use one of {', '.join(PADDINGS)}")
    try:
        return MODELS[name](vectors=vectors, scalars=scalars, **options)
    except TypeError as error:
        raise ConfigError(f"model {name!r}: {error}") from error
