"""Places of the tokens of a segment, as rotary angles and tables of positions count them.

One axis: 0, 1, 2, ...  Three (time, row, column): Qwen2-VL's (arXiv 2409.12191, section 2.1): a text advances on all of them
at once; the slots of a medium stand at its steps, rows and columns from where it begins; behind it all go on one above the
largest so far. So a text alone has the same on every axis, which is one axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

Grid = tuple[int, int, int]
"""Tokens of a medium along time, height and width: their product is its slots."""


def positions(length: int, axes: int, grids: Mapping[int, Grid]) -> Int[np.ndarray, "axes length"]:
    """Of a segment of `length` tokens; `grids`: of its media, in order, by their first token. A medium without one is as text."""
    if axes == 1 or not grids:
        return np.broadcast_to(np.arange(length), (axes, length))
    stretches, start, following = [], 0, 0
    for first, grid in grids.items():
        text, count = first - start, int(np.prod(grid))
        stretches.append(np.broadcast_to(np.arange(following, following + text), (axes, text)))
        stretches.append(following + text + np.indices(grid).reshape(axes, count))
        start, following = first + count, following + text + max(grid)
    stretches.append(np.broadcast_to(np.arange(following, following + length - start), (axes, length - start)))
    return np.concatenate(stretches, axis=1)
