"""Contrast between two modalities of a global micro-batch, duplicates masked: InfoNCE and the sigmoid loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.objectives.pairs import pair_losses
from mmpt.types import AUDIO, IMAGE, TEXT, VIDEO, Embeddings, EmbeddingSlots

Combo = tuple[int, int]

COMBOS: tuple[Combo, ...] = ((TEXT, IMAGE), (TEXT, AUDIO), (TEXT, VIDEO), (IMAGE, AUDIO), (IMAGE, VIDEO), (AUDIO, VIDEO))
"""The pairs of modalities that can be contrasted."""


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """The loss of one combination on this rank, and what is worth watching: numbers to be summed over ranks."""

    sum: Float[Tensor, ""]  # over this rank's pairs; carries the graph
    rows: Float[Tensor, " n"]  # what `sum` is the sum of; detached
    documents: Int[Tensor, " n"]  # number within the batch of the document of each pair
    correct: Float[Tensor, ""]  # of 2 * n searches within the batch, how many found their own first
    negatives: Float[Tensor, ""]  # negatives left after masking, summed over pairs


def count_pairs(slots: EmbeddingSlots) -> Int[Tensor, "6"]:
    """How many pairs a batch has of each of COMBOS."""
    return torch.tensor([len(pair_slots(slots, combo)[0]) for combo in COMBOS], device=slots.pair.device)


def pair_slots(slots: EmbeddingSlots, combo: Combo) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Slots of both sides of every pair, in order of the documents. Slots without a partner are left out."""
    first, second = ((slots.modality == m).nonzero().flatten() for m in combo)
    first = first[torch.isin(slots.pair[first], slots.pair[second])]
    second = second[torch.isin(slots.pair[second], slots.pair[first])]
    return first[slots.pair[first].argsort()], second[slots.pair[second].argsort()]


def contrast(
    embeddings: Embeddings,
    slots: EmbeddingSlots,
    combo: Combo,
    *,
    loss: Literal["infonce", "sigmoid"],
    exchange: Literal["gather", "ring"],
    group: dist.ProcessGroup | None,
) -> PairLoss:
    """The loss of this rank's pairs of `combo` against the pairs of all ranks of `group`.

    A pair that shares content with this pair, on either side, is no negative of it. A batch has at most one slot for each
    document and modality. Every rank calls this, with pairs or without, and differentiates the sum with the same factor before
    it: then sums over ranks are the value and the gradients of one process, of the scale and the bias each rank's part.
    """
    first, second = pair_slots(slots, combo)
    total, rows, correct, negatives = pair_losses(
        embeddings.vectors.index_select(0, first),
        embeddings.vectors.index_select(0, second),
        embeddings.scale,
        embeddings.bias,
        torch.stack([slots.content[first], slots.content[second]], dim=1),
        loss=loss,
        exchange=exchange,
        group=group,
    )
    return PairLoss(sum=total, rows=rows, documents=slots.pair[first], correct=correct, negatives=negatives.sum())
