"""The names that a sample and its members may have: webdataset splits a member's name at its first dot."""

from __future__ import annotations

import re

import numpy as np

MAX_NAME = 200  # bytes, of key and suffix each: an index keeps them in arrays as wide as the longest
KEY = re.compile(rb"[A-Za-z0-9_-]{1,%d}" % MAX_NAME)
SUFFIX = re.compile(rb"(?=[^\n]{1,%d}(?:\n|\Z))[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*" % MAX_NAME)


def matches(pattern: re.Pattern[bytes], name: str) -> bool:
    return pattern.fullmatch(name.encode(errors="replace")) is not None


def all_match(pattern: re.Pattern[bytes], names: np.ndarray) -> bool:
    """Whether every name of an array of bytes fits the pattern: one pass over all of them, a line each."""
    lines = b"\n".join([*names.tolist(), b""])
    return re.fullmatch(rb"(?:%s\n)*+" % pattern.pattern, lines) is not None
