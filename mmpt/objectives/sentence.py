"""Whether the second of two texts follows the first: BERT's next-sentence loss (arXiv 1810.04805)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmpt.objectives.tokens import RowLoss
from mmpt.types import IGNORE, Segments


def sentence_loss(logits: Float[Tensor, "n 2"], segments: Segments) -> RowLoss:
    """Sum of the cross-entropies, in nats, of the segments that have a label and begin here; they are the loss's positions.

    `logits` are those of the segments that begin here.
    """
    here = (segments.first >= 0).nonzero().flatten()
    asked = (segments.next_sentence[here] != IGNORE).nonzero().flatten()
    positions = here[asked]
    exact = torch.promote_types(logits.dtype, torch.float32)
    rows = F.cross_entropy(logits.index_select(0, asked).to(exact), segments.next_sentence[positions], reduction="none")
    return RowLoss(rows.sum(), rows.detach(), positions)
