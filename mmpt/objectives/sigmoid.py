"""The sigmoid loss over tiles of logits: every cell of the table is a yes or a no of its own (SigLIP, arXiv 2303.15343)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmpt.objectives.gather import Shares

EXACT = 40.0
"""From here on log(1 + e^x) is x, to the last digit of fp64; torch would take it to be so from 20 on."""


class Sigmoid:
    """-log sigmoid(logit) of the pairs plus -log sigmoid(-logit) of all others, summed; logit = scale * cosine + bias."""

    nothing = -torch.inf  # a prepared logit that counts for nothing

    def __init__(
        self, shares: Shares, scale: Float[Tensor, "1"], bias: Float[Tensor, "1"], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.bias = float(bias)
        self.dtype = torch.promote_types(dtype, torch.float32)  # of prepared cells
        n = shares.sizes[shares.rank]
        self.diagonal = torch.zeros(n, dtype=torch.float64, device=device)
        self.row_sums = torch.zeros(n, dtype=torch.float64, device=device)  # over all but the pair itself

    def prepare(self, logits: Float[Tensor, "rows columns"], out: Tensor) -> Float[Tensor, "rows columns"]:
        """With the bias."""
        return out.copy_(logits).add_(self.bias)

    def add(self, cells: Float[Tensor, "rows columns"], rows: slice, columns: slice) -> None:
        """Take in prepared cells, of which pairs themselves and duplicates are `nothing`."""
        self.row_sums[rows].add_(F.softplus(cells, threshold=EXACT).sum(1))

    def settle(self) -> bool:
        """Every tile is in."""
        self.rows = self.row_sums + F.softplus(-self.diagonal, threshold=EXACT)
        self.diagonal_gradient = -torch.sigmoid(-self.diagonal)
        return True

    def gradient(self, cells: Float[Tensor, "rows columns"], rows: slice, columns: slice, spare: Tensor, out: Tensor) -> None:
        """d loss / d logit of prepared cells, the pairs themselves aside, into `out`, which may be the cells."""
        torch.sigmoid(cells, out=out)
