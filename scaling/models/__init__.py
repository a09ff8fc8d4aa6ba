"""One file a model; models hold no process group."""

from torch import nn

from data_pipeline.errors import ConfigError
from scaling.models.se3_hyena import SE3Hyena
from scaling.models.se3_hyena_paper import SE3HyenaPaper

MODELS: dict[str, type[nn.Module]] = {
    "se3_hyena": SE3Hyena,
    "se3_hyena_paper": SE3HyenaPaper,
}


def build(name: str, vectors: int, scalars: int, **options: object) -> nn.Module:
    """A model by name. model(batch, shard=None) gives new points, vectors and scalars.

    Args:
        vectors: free vector channels Cv of the batches it will see.
        scalars: scalar channels Cs.
        options: the model's own keyword arguments.

    Raises:
        ConfigError: no such model, or no such option.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    try:
        return MODELS[name](vectors=vectors, scalars=scalars, **options)
    except TypeError as error:
        raise ConfigError(f"model {name!r}: {error}") from error
