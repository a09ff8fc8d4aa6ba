"""The benches by name."""

from scaling.bench import long_conv
from scaling.bench.family import Bench

BENCHES: dict[str, Bench] = {
    "long_conv": long_conv.BENCH,
}
