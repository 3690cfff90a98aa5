"""All objectives of a run: counts over the whole step, then one sum of (sum / count * weight) per micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mmpt.config import ObjectivesConfig
from mmpt.objectives.contrastive import ContrastiveReport, contrastive_loss, pair_slots
from mmpt.objectives.next_token import next_token_loss
from mmpt.types import IGNORE, LossTerm, LossTerms, ModelOutput, PackedBatch

Counts = dict[str, int]


def global_counts(batches: Sequence[PackedBatch], group: dist.ProcessGroup | None = None) -> Counts:
    """What the losses of a step are divided by: labelled tokens and pairs, and the documents, over micro-batches and ranks."""
    local = torch.tensor(
        [
            sum(int((b.labels != IGNORE).sum()) for b in batches),
            sum(len(pair_slots(b.slots)[0]) for b in batches),
            sum(b.documents for b in batches),
        ]
    )
    if group is not None:
        local = local.to(batches[0].tokens.device)
        dist.all_reduce(local, group=group)
    return dict(zip(("next_token", "contrastive", "documents"), local.tolist(), strict=True))


def loss_terms(
    config: ObjectivesConfig, output: ModelOutput, batch: PackedBatch, counts: Counts, group: dist.ProcessGroup | None = None
) -> tuple[LossTerms, ContrastiveReport]:
    """The named terms of one micro-batch: local sums over the step's global counts."""
    next_token = next_token_loss(output.hidden, output.output_weight, batch.labels)
    contrast, report = contrastive_loss(output.embeddings, batch.slots, output.logit_scale, group)
    terms = {
        "next_token": LossTerm(sum=next_token, count=counts["next_token"], weight=config.next_token.weight),
        "contrastive": LossTerm(sum=contrast, count=counts["contrastive"], weight=config.contrastive.weight),
    }
    return terms, report


def combine(terms: LossTerms) -> Float[Tensor, ""]:
    """The number that is differentiated. Its sum over micro-batches and ranks is the loss of the step."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()
