"""What is worth knowing of the embeddings of pairs beside their loss. Computed on logged steps alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mmpt.objectives.contrastive import Combo, pair_slots
from mmpt.objectives.gather import Shares
from mmpt.objectives.ring import Ring
from mmpt.types import MODALITIES, Embeddings, EmbeddingSlots

TILE = 1024  # rows and columns of the table of distances that exist at once


@torch.no_grad()
def contrastive_figures(
    embeddings: Embeddings, slots: EmbeddingSlots, combo: Combo, group: dist.ProcessGroup | None
) -> dict[str, Float[Tensor, ""]]:
    """Figures over the pairs of `combo` of all ranks of `group`; every rank calls it and gets the same. NaN without pairs.

    norm/MODALITY      mean length of the embeddings before they are brought to unit length
    alignment          mean squared distance between the two sides of a pair: 0 to 4 (arXiv 2005.10242, alpha 2)
    uniformity/...     log of the mean of exp(-2 * squared distance) over all pairs of different rows of one side: 0 where all
                       stand at one point, about -4 where they are spread over the sphere (arXiv 2005.10242, t 2); NaN for one row
    gap                distance between the mean vectors of the two sides (arXiv 2203.02053, the modality gap): 0 to 2
    """
    a, b = pair_slots(slots, combo)
    first, second = (embeddings.vectors.index_select(0, side) for side in (a, b))
    shares = Shares.of(first.shape[0], first.device, group)
    lengths = torch.stack([embeddings.norms[a].sum(dtype=torch.float64), embeddings.norms[b].sum(dtype=torch.float64)])
    sums = [
        lengths,
        (first - second).square().sum(dtype=torch.float64)[None],
        torch.stack([_potential(first, shares), _potential(second, shares)]),
        (first - second).sum(0, dtype=torch.float64),
    ]
    total = shares.reduce(torch.cat(sums))
    pairs = shares.all or torch.nan
    others = pairs * (pairs - 1) or torch.nan
    names = [MODALITIES[modality] for modality in combo]
    return {
        **{f"norm/{name}": norm for name, norm in zip(names, total[0:2] / pairs, strict=True)},
        "alignment": total[2] / pairs,
        # A row's potential with itself is 1.
        **{f"uniformity/{name}": value for name, value in zip(names, ((total[3:5] - pairs) / others).log(), strict=True)},
        "gap": (total[5:] / pairs).norm(),
    }


def _potential(vectors: Float[Tensor, "n E"], shares: Shares) -> Float[Tensor, ""]:
    """Sum of exp(-2 * squared distance) of this rank's rows, of unit length, to those of all ranks, which go round a ring."""
    total = vectors.new_zeros((), dtype=torch.float64)

    def add(_: int, block: Float[Tensor, "columns E"]) -> None:
        for rows in vectors.split(TILE):
            for columns in block.split(TILE):
                # Of unit vectors the squared distance is 2 - 2 * cosine.
                total.add_((rows @ columns.T).mul_(4).sub_(4).exp_().sum(dtype=torch.float64))

    with torch.autocast(vectors.device.type, enabled=False):
        Ring(shares).visit(vectors, add)
    return total
