"""Rows of all ranks at once: counts may differ from rank to rank, and may be 0."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

Visit = Callable[[int, Tensor], None]
"""What is done with a block of columns: the number of its first one among those of all ranks, and the block."""

VisitBack = Callable[[int, Tensor, Tensor], None]
"""The same, with room for this rank's part of the block's gradient, to be filled."""


class Shares:
    """Who owns which rows: `sizes[r]` of them stand with rank r, and all together are numbered in order of rank."""

    def __init__(self, sizes: list[int], group: dist.ProcessGroup | None) -> None:
        self.sizes, self.group = sizes, group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.starts = [0, *accumulate(sizes)]
        self.all = self.starts[-1]
        self.own = slice(self.starts[self.rank], self.starts[self.rank + 1])

    @classmethod
    def of(cls, n: int, device: torch.device, group: dist.ProcessGroup | None) -> Shares:
        """Every rank says how many rows it has."""
        if group is None:
            return cls([n], None)
        sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(sizes, torch.tensor([n], device=device), group=group)
        return cls(sizes.tolist(), group)

    def gather(self, rows: Shaped[Tensor, "n width"]) -> Shaped[Tensor, "all width"]:
        """All ranks' rows in order of rank, without a gradient. One collective, which wants equal shapes: padded, then cut."""
        if self.group is None or not self.all:
            return rows
        most = max(self.sizes)
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(len(self.sizes) * most, rows.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        if min(self.sizes) == most:
            return gathered
        return torch.cat([part[:size] for part, size in zip(gathered.split(most), self.sizes, strict=True)])

    def reduce_scatter(self, rows: Shaped[Tensor, "all width"]) -> Shaped[Tensor, "n width"]:
        """The sum over ranks of their values for this rank's own rows: what `gather` is to a gradient."""
        if self.group is None or not self.all:
            return rows
        most = max(self.sizes)
        if min(self.sizes) < most:
            padded = rows.new_zeros(len(self.sizes), most, rows.shape[1])
            for part, own in zip(padded, rows.split(self.sizes), strict=True):
                part[: len(own)] = own
            rows = padded.flatten(0, 1)
        total = rows.new_empty(most, rows.shape[1])
        dist.reduce_scatter_tensor(total, rows, group=self.group)
        return total[: self.sizes[self.rank]]

    def reduce(self, values: Shaped[Tensor, "..."], op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """`values` of all ranks added up, or what `op` says, in place."""
        if self.group is not None and self.all:
            dist.all_reduce(values, op=op, group=self.group)
        return values


class Gather:
    """Every rank holds the columns of all ranks, and sees them as one block. Memory grows with all of them."""

    blocks = 1

    def __init__(self, shares: Shares) -> None:
        self.shares = shares

    def open(self, columns: Float[Tensor, "n E"]) -> Float[Tensor, "all E"]:
        """What `visit` and `visit_back` want, and what the backward pass keeps."""
        return self.shares.gather(columns)

    def visit(self, opened: Float[Tensor, "all E"], work: Visit) -> None:
        work(0, opened)

    def visit_back(self, opened: Float[Tensor, "all E"], work: VisitBack, dtype: torch.dtype) -> Float[Tensor, "n E"]:
        """The gradient of this rank's own columns, from the work of all ranks."""
        grad = torch.empty_like(opened, dtype=dtype)
        work(0, opened, grad)
        return self.shares.reduce_scatter(grad)
