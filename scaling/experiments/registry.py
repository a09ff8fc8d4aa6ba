"""The benches by name."""

from scaling.experiments.cases import attention, clifford, long_conv, machine, scaling, train_step
from scaling.experiments.family import Bench

BENCHES: dict[str, Bench] = {
    "attention": attention.BENCH,
    "clifford": clifford.BENCH,
    "long_conv": long_conv.BENCH,
    "machine": machine.BENCH,
    "scaling": scaling.BENCH,
    "train_step": train_step.BENCH,
}
