"""One file a model; models hold no process group."""

from bisect import bisect_left
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import ConfigError, OptionError
from data_pipeline.options import check_arguments, parameters_of
from scaling.models.clifford_mlp import CliffordMLPModel
from scaling.models.egnn import EGNN
from scaling.models.equiformer import Equiformer
from scaling.models.equivariant_transformer import EquivariantTransformer
from scaling.models.frame_averaged_hyena import FrameAveragedHyena
from scaling.models.geometric_hyena import GeometricHyena
from scaling.models.hyena import Hyena
from scaling.models.linear_motion import LinearMotion
from scaling.models.pretrained import read_pretrained
from scaling.models.protocol import Model as Model
from scaling.models.protocol import equivariance_error as equivariance_error
from scaling.models.se3_hyena import SE3Hyena
from scaling.models.se3_hyena_paper import SE3HyenaPaper
from scaling.models.transformer import Transformer
from scaling.models.vector_transformer import VectorTransformer
from scaling.models.vn_transformer import VNTransformer

MODELS: dict[str, type[Model]] = {
    "se3_hyena": SE3Hyena,
    "se3_hyena_paper": SE3HyenaPaper,
    "geometric_hyena": GeometricHyena,
    "vector_transformer": VectorTransformer,
    "equivariant_transformer": EquivariantTransformer,
    "vn_transformer": VNTransformer,
    "hyena": Hyena,
    "transformer": Transformer,
    "frame_averaged_hyena": FrameAveragedHyena,
    "clifford_mlp": CliffordMLPModel,
    "linear_motion": LinearMotion,
    "egnn": EGNN,
    "equiformer": Equiformer,
}
MOST_WIDTHS = 1 << 16
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
        width, nearest = reachable_widths(name, parameters, chosen)
        chosen[width] = min(nearest, key=lambda value: abs(nearest[value] - parameters))
    return MODELS[name](**chosen)


def from_pretrained(folder: Path | str) -> Model:
    """The model that `python -m launch export` wrote into a folder, in float32 on the CPU.

    Raises:
        RunError: no exported model is there, or it is damaged.
        ConfigError: this version has no such model or option.
    """
    saved = read_pretrained(Path(folder))
    channels = {key: saved.config[key] for key in ("vectors", "scalars")}
    model = build(**saved.config["model"], **channels)
    saved.fill(model)
    return model


def reachable_widths(
    name: str, parameters: int, options: dict[str, Any]
) -> tuple[str, dict[int, int]]:
    """The option that is a model's width, and the two of its values, with their numbers of
    parameters, between which `parameters` lies.

    Raises:
        OptionError: the width is given too, there is none, or `parameters` is not positive.
    """
    kind = MODELS[name]
    width = kind.width
    if width is None:
        raise OptionError("parameters", parameters, f"{name} has no width to choose")
    if width in options:
        raise OptionError("parameters", parameters, f"chooses {width}; give one of the two")
    if not isinstance(parameters, int) or parameters < 1:
        raise OptionError("parameters", parameters, "must be a whole number from 1")
    step = 1
    if divisor := kind.width_divisor:
        step = options.get(divisor, parameters_of(kind)[divisor].default)

    def count(value: int) -> int:
        with torch.device("meta"):
            model = kind(**(options | {width: value}))
        return sum(p.numel() for p in model.parameters())

    widths = range(step, step * MOST_WIDTHS, step)
    above = bisect_left(widths, parameters, key=count)
    return width, {value: count(value) for value in widths[max(above - 1, 0) : above + 1]}
