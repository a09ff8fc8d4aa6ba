"""The experiments by name."""

from scaling.experiments.cases import (
    attention,
    clifford,
    convert,
    data,
    long_conv,
    machine,
    scaling,
    sweep,
    train_step,
)
from scaling.experiments.experiment import Experiment

BENCHES: dict[str, Experiment] = {
    "attention": attention.BENCH,
    "clifford": clifford.BENCH,
    "convert": convert.BENCH,
    "data": data.BENCH,
    "long_conv": long_conv.BENCH,
    "machine": machine.BENCH,
    "scaling": scaling.BENCH,
    "train_step": train_step.BENCH,
}
"""Those of `python -m launch bench`."""
EXPERIMENTS = BENCHES | {"sweep": sweep.SWEEP}
