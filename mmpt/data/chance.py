"""Random numbers that follow from a key: the same on every machine, layout and resume, and under every version of numpy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(values: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): equal values stay equal, near ones fall far apart."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def fractions(values: UInt64[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Of random bits, evenly spread over [0, 1)."""
    return (values >> np.uint64(11)) * 2.0**-53


def draws(key: int, count: int) -> UInt64[np.ndarray, " count"]:
    """The first `count` numbers of the stream of a 63-bit key: splitmix64."""
    return mixed(np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def subset(key: int, size: int, count: int) -> Int[np.ndarray, " count"]:
    """`count` of range(size), in order; every choice is equally likely."""
    return np.sort(np.argsort(draws(key, size), kind="stable")[:count])
