"""Whether the second of two texts follows the first: BERT's next-sentence loss (arXiv 1810.04805)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.objectives.tokens import RowLoss
from mmpt.types import IGNORE


def sentence_loss(logits: Float[Tensor, "S 2"], labels: Int[Tensor, " S"]) -> RowLoss:
    """Sum of the cross-entropies, in nats, of the segments whose label is not IGNORE; they are the loss's positions."""
    positions = (labels != IGNORE).nonzero().flatten()
    exact = torch.promote_types(logits.dtype, torch.float32)
    rows = F.cross_entropy(logits.index_select(0, positions).to(exact), labels[positions], reduction="none")
    return RowLoss(rows.sum(), rows.detach(), positions)
