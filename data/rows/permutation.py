"""Random orders that depend on a seed only, not on the machine or the version of numpy."""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """Mixes 64 bits by the finaliser of splitmix64 (Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers, their order included."""
    key = 0
    for part in parts:
        key = mix64(key ^ mix64(part & _MASK))
    return key


def shuffled(count: int, key: int) -> NDArray[np.int64]:
    """0 … count-1 in an order given by `key`; takes O(count) memory."""
    return np.argsort(hashes(np.arange(count), key), kind="stable").astype(np.int64)


def hashes(numbers: NDArray[np.int64], key: int) -> NDArray[np.uint64]:
    """`mix64(number + key)` of every number."""
    value = numbers.astype(np.uint64) + np.uint64(key)  # wraps around, as intended
    value += np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniforms(numbers: NDArray[np.int64], key: int) -> NDArray[np.float64]:
    """For each number a uniform value in [0, 1), given by `key`."""
    return (hashes(numbers, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
