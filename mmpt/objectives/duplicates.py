"""Pairs that share content with another pair are no negatives of it: which they are, without a table of all against all."""

from __future__ import annotations

from bisect import bisect_left

import torch
from jaxtyping import Int, Num
from torch import Tensor


class Duplicates:
    """Which pairs share the content of either side, from the hashes of all pairs. Sorted once; without any, it costs no more."""

    def __init__(self, contents: Int[Tensor, "all 2"], own: slice) -> None:
        """`own`: the rows that tiles can have; their columns are all pairs."""
        self.positions: list[int] = []  # numbers of pairs that share something with another, rising
        pairs = len(contents)
        ordered = contents.sort(dim=0).values
        if not bool((ordered[1:] == ordered[:-1]).any()):
            self.negatives = contents.new_full((own.stop - own.start,), pairs - 1)
            return
        numbers, counts = zip(*(_groups(contents[:, side]) for side in (0, 1)), strict=True)
        _, both = _groups(numbers[0] * pairs + numbers[1])
        alike = counts[0] + counts[1] - both  # pairs with the first content or the second, itself among them
        self.numbers = torch.stack(numbers, dim=1)
        self.positions = (alike > 1).nonzero().flatten().tolist()
        self.negatives = pairs - alike[own]

    negatives: Int[Tensor, " n"]
    """How many pairs are left for each own pair to be told from."""

    def mask(self, tile: Num[Tensor, "rows columns"], row: int, column: int) -> None:
        """Fill with -inf where the pairs of a row and of a column share content, in place; equal pairs are left alone.

        `row` and `column`: numbers, among all pairs, of the tile's first.
        """
        rows, columns = self._within(row, tile.shape[0]), self._within(column, tile.shape[1])
        if not rows or not columns:
            return
        r, c = (torch.tensor(each, device=tile.device) for each in (rows, columns))
        alike = (self.numbers[r, None] == self.numbers[None, c]).any(-1) & (r[:, None] != c)
        places = (r[:, None] - row, c - column)
        tile[places] = tile[places].masked_fill(alike, -torch.inf)

    def _within(self, start: int, length: int) -> list[int]:
        return self.positions[bisect_left(self.positions, start) : bisect_left(self.positions, start + length)]


def _groups(values: Int[Tensor, " all"]) -> tuple[Int[Tensor, " all"], Int[Tensor, " all"]]:
    """For each value the number of its group of equal ones, and how many that group has."""
    _, number, count = values.unique(return_inverse=True, return_counts=True)
    return number, count[number]
