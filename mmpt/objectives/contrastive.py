"""InfoNCE between the pictures and the texts of a global micro-batch, duplicates masked (CLIP, arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmpt.objectives.gather import gather_rows
from mmpt.types import IMAGE, TEXT, EmbeddingSlots


@dataclass(frozen=True, kw_only=True)
class ContrastiveReport:
    """What is worth watching, detached: numbers of this rank's pairs, to be summed over ranks."""

    correct: Float[Tensor, ""]  # of 2 * pairs searches within the batch, how many found their own first
    negatives: Float[Tensor, ""]  # negatives left after masking, summed over pairs


def pair_slots(slots: EmbeddingSlots) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Slots of the picture and of the text of every pair, in order of the pairs. Slots without a partner are left out."""
    images, texts = ((slots.modality == m).nonzero().flatten() for m in (IMAGE, TEXT))
    images = images[torch.isin(slots.pair[images], slots.pair[texts])]
    texts = texts[torch.isin(slots.pair[texts], slots.pair[images])]
    return images[slots.pair[images].argsort()], texts[slots.pair[texts].argsort()]


def contrastive_loss(
    embeddings: Float[Tensor, "P E"],
    slots: EmbeddingSlots,
    logit_scale: Float[Tensor, "1"],
    group: dist.ProcessGroup | None = None,
) -> tuple[Float[Tensor, ""], ContrastiveReport]:
    """Sum over this rank's pairs of the mean of both directions' cross-entropies, against the pairs of all ranks of `group`.

    A pair whose picture or text equals this pair's is no negative of it. Every rank of the group must call this,
    with pairs or without. Summing the results over ranks gives the value, and the gradients, of one process.
    """
    image_slots, text_slots = pair_slots(slots)
    images, own = gather_rows(embeddings.index_select(0, image_slots), group)
    texts, _ = gather_rows(embeddings.index_select(0, text_slots), group)
    contents, _ = gather_rows(torch.stack([slots.content[image_slots], slots.content[text_slots]], dim=1), group)
    duplicate = duplicates(contents, own)
    targets = torch.arange(own.start, own.stop, device=embeddings.device)
    loss, correct = embeddings.sum() * 0.0 + logit_scale.sum() * 0.0, embeddings.new_zeros(())
    for rows, columns in ((images, texts), (texts, images)):
        with torch.autocast(embeddings.device.type, enabled=False):  # cosines times 100 want more than bf16's three digits
            cosines = rows[own] @ columns.T
        logits = (logit_scale * cosines).masked_fill(duplicate, -torch.inf)
        loss = loss + 0.5 * F.cross_entropy(logits, targets, reduction="sum")
        if len(targets):
            correct = correct + (logits.detach().argmax(1) == targets).sum()
    negatives = (~duplicate).sum() - len(targets)
    return loss, ContrastiveReport(correct=correct, negatives=negatives)


def duplicates(contents: Int[Tensor, "all 2"], own: slice) -> Bool[Tensor, "n all"]:
    """True where another pair shares the picture or the text of one of the own pairs."""
    same = (contents[own, None] == contents[None]).any(-1)
    same[torch.arange(len(same)), torch.arange(own.start, own.stop)] = False
    return same
