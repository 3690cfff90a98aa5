"""All objectives of a run: counts over the whole step, then named terms of each micro-batch, then one number.

batches --global_counts, one all-reduce--> counts
ModelOutput, batch, counts --local_terms, contrast_losses--> LossTerms --combine--> what is differentiated

A loss with a weight of 0, or without data anywhere in the step, is left out. Counts are global and levels those of the config,
so every rank leaves out the same ones, and runs the same collectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.config import ContrastiveConfig, ObjectivesConfig
from mmpt.objectives.balance import pack_balance
from mmpt.objectives.contrastive import COMBOS, Combo, PairLoss, contrast, count_pairs
from mmpt.objectives.distillation import distillation_loss
from mmpt.objectives.sentence import sentence_loss
from mmpt.objectives.tokens import RowLoss, token_loss
from mmpt.types import (
    IGNORE,
    MODALITIES,
    NEXT_TOKEN,
    NOTHING,
    TASKS,
    Embeddings,
    EmbeddingSlots,
    LossTerm,
    LossTerms,
    ModelOutput,
    PackedBatch,
)

Counts = Mapping[str, int]
"""What a step has of everything that is counted, by the names in COUNTED, over all ranks and micro-batches."""


def pair_name(combo: Combo) -> str:
    return "_".join(MODALITIES[modality] for modality in combo)


COUNTED = (*TASKS, "next_sentence", "packs", "documents", *map(pair_name, COMBOS))
"""Labelled tokens of each task, labelled segments, packs, documents, and pairs of each combination."""


def global_counts(batches: Sequence[PackedBatch], group: dist.ProcessGroup | None = None) -> Counts:
    """What the losses of a step are divided by, over its micro-batches and the ranks of `group`: one all-reduce for all."""
    total = torch.stack([_counts(batch) for batch in batches]).sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    return dict(zip(COUNTED, total.tolist(), strict=True))


def _counts(batch: PackedBatch) -> Int[Tensor, " counted"]:
    """As COUNTED, of one batch."""
    segments, ids = batch.segments, batch.document_ids[batch.labels != IGNORE]
    asked = ((segments.next_sentence != IGNORE) & (segments.first >= 0)).sum().item()
    whole = batch.split is None or batch.split.part == 0  # packs and documents are every part's: counted once
    sizes = [asked, batch.packs * whole, batch.documents * whole]
    return torch.cat([torch.bincount(segments.task[ids], minlength=len(TASKS)), ids.new_tensor(sizes), count_pairs(batch.slots)])


def local_terms(
    config: ObjectivesConfig, output: ModelOutput, batch: PackedBatch, counts: Counts, teacher: ModelOutput | None = None
) -> LossTerms:
    """All terms of a micro-batch but contrast: those that need nothing of other ranks."""
    terms: dict[str, LossTerm] = {}

    def add(name: str, loss: RowLoss, segments: Int[Tensor, " n"], count: int, weight: float) -> None:
        documents = batch.segments.document[segments]
        terms[name] = LossTerm(sum=loss.sum, count=count, weight=weight, rows=loss.rows, documents=documents)

    for task, name in enumerate(TASKS):
        weight = getattr(config, name).weight
        if weight and counts[name]:
            loss = token_loss(output, batch, task, config.next_token.z_loss if task == NEXT_TOKEN else 0.0)
            add(name, loss, batch.document_ids[loss.positions], counts[name], weight)
    if config.next_sentence.weight and counts["next_sentence"] and output.sentence_logits is not None:
        loss = sentence_loss(output.sentence_logits, batch.segments)
        add("next_sentence", loss, loss.positions, counts["next_sentence"], config.next_sentence.weight)
    if config.distillation and config.distillation.weight and counts["next_token"]:
        assert teacher is not None, "objectives.distillation without the teacher's output"
        loss = distillation_loss(output, teacher, batch, config.distillation)
        segments = batch.document_ids[loss.positions]
        add("distillation", loss, segments, counts["next_token"], config.distillation.weight)
    balance = pack_balance(output.routing) if config.balance.weight else None
    if balance is not None:
        documents = batch.document_ids.new_full((len(balance),), NOTHING)
        rows, weight = balance.detach(), config.balance.weight
        terms["balance"] = LossTerm(sum=balance.sum(), count=counts["packs"], weight=weight, rows=rows, documents=documents)
    return terms


def contrasted(config: ContrastiveConfig, levels: Sequence[str], counts: Counts) -> list[tuple[str, Combo]]:
    """The levels, of those given, and the pairs of modalities that a step contrasts."""
    combos = [combo for combo in COMBOS if counts[pair_name(combo)]]
    return [(level, combo) for level in levels if getattr(config, level).weight for combo in combos]


def contrast_losses(
    config: ContrastiveConfig,
    embeddings: Mapping[str, Embeddings],
    slots: EmbeddingSlots,
    counts: Counts,
    group: dist.ProcessGroup | None = None,
) -> dict[str, PairLoss]:
    """Contrast of a micro-batch with those that the other ranks of `group` compute at the same time, by the names of terms.

    Every rank calls it as often, with pairs or without.
    """
    return {
        f"contrastive/{level}/{pair_name(combo)}": contrast(
            embeddings[level], slots, combo, loss=getattr(config, level).loss, exchange=config.exchange, group=group
        )
        for level, combo in contrasted(config, tuple(embeddings), counts)
    }


def contrast_terms(config: ContrastiveConfig, losses: Mapping[str, PairLoss], counts: Counts) -> LossTerms:
    """The terms of `contrast_losses`."""
    terms = {}
    for name, loss in losses.items():
        _, level, pair = name.split("/")
        weight = getattr(config, level).weight
        terms[name] = LossTerm(sum=loss.sum, count=counts[pair], weight=weight, rows=loss.rows, documents=loss.documents)
    return terms


def combine(terms: LossTerms) -> dict[str, Float[Tensor, ""]]:
    """The weighted sum of the terms of each objective, all contrast together. Their total over objectives, micro-batches and
    ranks is the loss of the step."""
    objectives: dict[str, list[Tensor]] = {}
    for name, term in terms.items():
        objectives.setdefault(name.split("/")[0], []).append(term.weight * term.value)
    return {name: torch.stack(parts).sum() for name, parts in objectives.items()}
