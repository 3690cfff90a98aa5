"""Cross-entropy over the vocabulary: next tokens, masked tokens, and the spans that sentinels stand for.

What the labels ask for is the data's business; the loss is the same for all three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.objectives.chunked import ChunkLoss, chunked_loss
from mmpt.types import IGNORE, NEXT_TOKEN, ModelOutput, PackedBatch


class RowLoss(NamedTuple):
    """A loss over some positions of a batch."""

    sum: Float[Tensor, ""]  # carries the graph
    rows: Float[Tensor, " n"]  # what `sum` is the sum of; detached
    positions: Int[Tensor, " n"]  # of the rows within the batch


def labelled(batch: PackedBatch, task: int = NEXT_TOKEN) -> Int[Tensor, " n"]:
    """Positions that have a label, in segments of `task`."""
    positions = (batch.labels != IGNORE).nonzero().flatten()
    return positions[batch.segments.task[batch.document_ids[positions]] == task]


def token_loss(output: ModelOutput, batch: PackedBatch, task: int = NEXT_TOKEN, z_loss: float = 0.0) -> RowLoss:
    """Sum of -log p(label) + z_loss * (log Z)^2 in nats over the labelled positions of `task`.

    Z is the sum of exponentials that softmax divides by; its logarithm drifts unless something holds it (PaLM,
    arXiv 2204.02311). Labels are shifted already. Logits are made for these positions alone, see `chunked`.
    """
    positions = labelled(batch, task)
    hidden = output.output_hidden.index_select(0, positions)
    total, rows = chunked_loss(hidden, output.output_weight, output.output_bias, _cross_entropy(batch.labels[positions], z_loss))
    return RowLoss(total, rows, positions)


def _cross_entropy(labels: Int[Tensor, " n"], z_loss: float) -> ChunkLoss:
    def loss_of(logits: Float[Tensor, "n vocabulary"], part: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        own = torch.arange(len(logits), device=logits.device), labels[part]
        log_p = F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
        rows = -log_p[own]
        log_z = logits[own] + rows
        gradient = log_p.exp_() if differentiate else None
        if gradient is not None and z_loss:
            gradient *= (1 + 2 * z_loss * log_z)[:, None]
        if gradient is not None:
            gradient[own] -= 1
        return rows + z_loss * log_z.square() if z_loss else rows, gradient

    return loss_of
