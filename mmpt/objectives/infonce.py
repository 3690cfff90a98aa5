"""InfoNCE over tiles of logits: both directions from one exponential (CLIP, arXiv 2103.00020)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mmpt.objectives.gather import Shares

LARGEST = {torch.float32: 70.0, torch.float64: 600.0}
"""Exponents up to it: in fp32, e^70 times a million pairs is finite, and e^-70 keeps all its digits."""

SMALLEST = 1e-24
"""Sums below it have terms that fp32 may have lost."""


class InfoNCE:
    """The mean over both directions of -log softmax at the pair itself, summed over pairs.

    Softmax needs no maximum where logits have a bound, and cosines times the scale do. So exp(logit - shift) of a tile serves the
    sums of its rows and of its columns, and the gradient of both directions: that times (1 / row sum + 1 / column sum) / 2.
    A scale up to LARGEST wants no shift. Beyond it logits span more than fp32 does, and those far below zero are given up; should
    a sum consist of such alone (a pair all of whose cosines are below about -0.25), all is computed once more in fp64.
    """

    nothing = 0.0  # a prepared logit that counts for nothing
    bias = None

    def __init__(self, shares: Shares, scale: Float[Tensor, "1"], bias: None, dtype: torch.dtype, device: torch.device) -> None:
        assert bias is None
        self.shares = shares
        self.scale, self.dtype = float(scale), torch.promote_types(dtype, torch.float32)  # of prepared cells
        n = shares.sizes[shares.rank]
        self.diagonal = torch.zeros(n, dtype=torch.float64, device=device)
        self.row_sums = torch.zeros(n, dtype=torch.float64, device=device)  # over all but the pair itself
        self.column_sums = torch.zeros(shares.all, dtype=torch.float64, device=device)

    @property
    def shift(self) -> float:
        return max(self.scale - LARGEST[self.dtype], 0.0)

    def prepare(self, logits: Float[Tensor, "rows columns"], out: Tensor) -> Float[Tensor, "rows columns"]:
        """exp(logit - shift)."""
        if self.shift:
            return out.copy_(logits).sub_(self.shift).exp_()
        return torch.exp(logits, out=out) if logits.dtype == out.dtype else out.copy_(logits).exp_()

    def add(self, cells: Float[Tensor, "rows columns"], rows: slice, columns: slice) -> None:
        """Take in prepared cells, of which pairs themselves and duplicates are `nothing`."""
        self.row_sums[rows].add_(cells.sum(1))
        self.column_sums[columns].add_(cells.sum(0))

    def settle(self) -> bool:
        """Every tile is in: bring the ranks together. False: all must be done again, in fp64 from now on."""
        own = self.shares.own
        self.column_sums[own].add_(self.diagonal)
        self.row_sums += self.diagonal
        self.shares.reduce(self.column_sums)
        if self.shift and self.dtype == torch.float32 and self._lost():
            self.dtype = torch.float64
            self.row_sums.zero_()
            self.column_sums.zero_()
            return False
        column_sums = self.column_sums[own]
        self.rows = (self.row_sums * column_sums).sqrt_().div_(self.diagonal).log_()
        row_factors, column_factors = 0.5 / self.row_sums, 0.5 / self.column_sums
        self.diagonal_gradient = (row_factors + column_factors[own]).mul_(self.diagonal).sub_(1.0)
        self.row_factors, self.column_factors = row_factors.to(self.dtype)[:, None], column_factors.to(self.dtype)
        return True

    def _lost(self) -> bool:
        """Whether, on any rank, a sum is too small for what fp32 lost to be nothing."""
        if not self.shares.all:
            return False
        smallest = torch.cat([self.row_sums, self.column_sums, self.diagonal / 1e-6]).min()
        return bool(self.shares.reduce(smallest, dist.ReduceOp.MIN) < SMALLEST)

    def gradient(self, cells: Float[Tensor, "rows columns"], rows: slice, columns: slice, spare: Tensor, out: Tensor) -> None:
        """d loss / d logit of prepared cells, the pairs themselves aside, into `out`, which may be the cells."""
        torch.mul(cells, torch.add(self.row_factors[rows], self.column_factors[columns], out=spare), out=out)
