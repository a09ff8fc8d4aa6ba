"""Random numbers that are functions of a key and a place: any slice, on any rank, is the same."""

import hashlib

import numpy as np
from jaxtyping import Float64, UInt64


def hash64(*values: int | str) -> int:
    """64 bits from integers and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest())


def evaluation_key(split: str, item: int) -> int:
    """The key of a sample wherever it is evaluated."""
    return hash64("evaluation", split, item)


def raw64(key: int, count: int) -> UInt64[np.ndarray, " n"]:
    """64 random bits for each place in range(count)."""
    return np.random.Philox(key=key).random_raw(count)


def uniforms(key: int, start: int, stop: int) -> Float64[np.ndarray, "n 4"]:
    """Four numbers in (0, 1) for each place in [start, stop): one Philox block a place."""
    # The generator must not carry over between places: each reads its own counter.
    bits = np.random.Philox(key=key, counter=start).random_raw(4 * (stop - start))
    return ((bits >> np.uint64(11)).reshape(-1, 4) + 0.5) * 2.0**-53


def normals(key: int, start: int, stop: int) -> Float64[np.ndarray, "n 4"]:
    """Four independent N(0, 1) for each place in [start, stop), by Box and Muller."""
    u = uniforms(key, start, stop)
    radius, angle = np.sqrt(-2 * np.log(u[:, :2])), 2 * np.pi * u[:, 2:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def rotations(key: int, start: int, stop: int) -> Float64[np.ndarray, "n 3 3"]:
    """A uniformly random rotation for each place in [start, stop): of a random unit quaternion."""
    q = normals(hash64("rotation", key), start, stop)
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def permuted(place: int, count: int, key: int) -> int:
    """Where a random permutation of range(count), given by the key, sends `place`.

    A Feistel network over the next power of four; results outside the range are sent on.
    No memory, so that order is arithmetic.
    """
    assert 0 <= place < count, f"{place} is not in range({count})"  # else nothing ends the loop
    bits = max((count - 1).bit_length() + 1, 2) // 2
    low = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & low
        for turn in range(6):
            left, right = right, left ^ (hash64(key, turn, right) & low)
        place = left << bits | right
        if place < count:
            return place
