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
        self.dtype = torch.promote_types(dtype, torch.float32)  # of prepared tiles
        n = shares.sizes[shares.rank]
        self.diagonal = torch.zeros(n, dtype=torch.float64, device=device)
        self.row_sums = torch.zeros(n, dtype=torch.float64, device=device)  # over all but the pair itself

    def prepare(self, tile: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The whole logit, in place."""
        return tile.add_(self.bias)

    def add(self, tile: Float[Tensor, "rows columns"], rows: slice, columns: slice) -> None:
        """Take in a prepared tile whose own pairs and duplicates are `nothing`."""
        self.row_sums[rows].add_(F.softplus(tile, threshold=EXACT).sum(1))

    def settle(self) -> bool:
        """Every tile is in."""
        self.rows = self.row_sums + F.softplus(-self.diagonal, threshold=EXACT)
        self.diagonal_gradient = -torch.sigmoid(-self.diagonal)
        return True

    def gradient(self, tile: Float[Tensor, "rows columns"], rows: slice, columns: slice, spare: Tensor) -> Tensor:
        """d loss / d logit of a prepared tile, in place, the pairs themselves aside."""
        return tile.sigmoid_()
