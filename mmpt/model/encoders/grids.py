"""Where the patches of pictures and frames lie: index arithmetic over a whole batch, without a loop over items.

Patches stand item after item, within an item frame after frame, within a frame row after row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.model.attention import Reorder


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where each patch lies within its item."""

    cu_seqlens: Int[Tensor, "M_plus_1"]  # of the items
    item: Int[Tensor, " N"]
    start: Int[Tensor, " N"]  # the first patch of its item
    local: Int[Tensor, " N"]  # its number within the item
    height: Int[Tensor, " N"]  # of its item, in patches
    width: Int[Tensor, " N"]

    @classmethod
    def of(cls, grid: Int[Tensor, "M 3"], cu_seqlens: Int[Tensor, "M_plus_1"], patches: int) -> Places:
        """`patches` is cu_seqlens[-1], which an accelerator then need not be asked for."""
        items = torch.arange(len(grid), device=grid.device)
        item = items.repeat_interleave(cu_seqlens.diff(), output_size=patches)
        start = cu_seqlens[item]
        local = torch.arange(patches, device=grid.device) - start
        sides = {"height": grid[item, 1], "width": grid[item, 2]}
        return cls(cu_seqlens=cu_seqlens, item=item, start=start, local=local, **sides)

    def within_frame(self) -> Int[Tensor, " N"]:
        return self.local % (self.height * self.width)

    def positions(self) -> Int[Tensor, "2 N"]:
        """Row and column of every patch within its frame."""
        number = self.within_frame()
        return torch.stack([number // self.width, number % self.width])

    def squares(self, side: int) -> Int[Tensor, " N"]:
        """The patches, those of a `side` x `side` square next to one another; squares, and patches within one, row by row."""
        number, inner = self.local // side**2, self.local % side**2
        across, down = self.width // side, self.height // side
        frame, square_row, square_column = number // (across * down), number // across % down, number % across
        row = frame * self.height + square_row * side + inner // side  # counted over the frames of the item
        return self.start + row * self.width + square_column * side + inner % side

    def class_first(self) -> ClassRows:
        """One row more at the head of each item."""
        starts = self.cu_seqlens[:-1]
        items = torch.arange(len(starts), device=starts.device)
        order = torch.cat([starts + items, self.start + self.local + self.item + 1])
        return ClassRows(order=order, inverse=order.argsort(), items=len(starts))


@dataclass(frozen=True, kw_only=True)
class ClassRows:
    """Rows of class tokens among those of patches: each item's stands before its patches."""

    order: Int[Tensor, " rows"]  # where the class tokens, and then the patches, stand
    inverse: Int[Tensor, " rows"]
    items: int

    def insert(self, tokens: Float[Tensor, "M dim"], patches: Float[Tensor, "N dim"]) -> Float[Tensor, "rows dim"]:
        return Reorder.apply(torch.cat([tokens, patches]), self.inverse, self.order)

    def tokens(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "M dim"]:
        return x.index_select(0, self.order[: self.items])

    def patches(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "N dim"]:
        return Reorder.apply(x, self.order, self.inverse)[self.items :]


def merge_neighbours(x: Float[Tensor, "N dim"], places: Places, side: int) -> Float[Tensor, "rows merged"]:
    """Concatenate the features of every `side` x `side` square of a frame's patches; none reaches into another frame."""
    if side == 1:
        return x
    order = places.squares(side)
    return Reorder.apply(x, order, order.argsort()).unflatten(0, (-1, side**2)).flatten(1)
