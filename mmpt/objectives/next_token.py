"""Next-token prediction: cross-entropy summed over the labelled positions, a chunk of logits at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmpt.types import IGNORE

CHUNK = 4096  # positions whose logits exist at once


def next_token_loss(
    hidden: Float[Tensor, "T D"], output_weight: Float[Tensor, "vocabulary D"], labels: Int[Tensor, " T"]
) -> Float[Tensor, ""]:
    """Sum of -log p(label) in nats over positions whose label is not IGNORE. Labels are shifted already.

    Logits are made for labelled positions alone, CHUNK at a time, and made again in the backward pass
    rather than kept; a single chunk is kept.
    """
    labelled = (labels != IGNORE).nonzero().flatten()
    if not len(labelled):
        return hidden.sum() * 0.0 + output_weight.sum() * 0.0  # keeps the graph on a rank that has nothing to predict
    rows, targets = hidden.index_select(0, labelled), labels[labelled]
    if len(labelled) <= CHUNK:
        return _chunk_loss(rows, output_weight, targets)
    losses = [
        checkpoint(_chunk_loss, r, output_weight, t, use_reentrant=False)
        for r, t in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss(rows: Float[Tensor, "n D"], output_weight: Float[Tensor, "vocabulary D"], targets: Int[Tensor, " n"]) -> Tensor:
    return F.cross_entropy(F.linear(rows, output_weight).float(), targets, reduction="sum")
