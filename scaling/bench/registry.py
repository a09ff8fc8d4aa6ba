"""The benches by name."""

from scaling.bench import long_conv, train_step
from scaling.bench.family import Bench

BENCHES: dict[str, Bench] = {
    "long_conv": long_conv.BENCH,
    "train_step": train_step.BENCH,
}
