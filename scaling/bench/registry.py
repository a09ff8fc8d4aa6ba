"""The benches by name."""

from scaling.bench import long_conv, machine, train_step
from scaling.bench.family import Bench

BENCHES: dict[str, Bench] = {
    "long_conv": long_conv.BENCH,
    "machine": machine.BENCH,
    "train_step": train_step.BENCH,
}
