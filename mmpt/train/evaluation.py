"""Evaluation in the loop: losses and retrieval on the held-out splits, of those specs that have one named `val`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import cache_of, sequential_batches
from mmpt.data.quarantine import refuse_too_many
from mmpt.data.spec import MixturePart, load_mixture
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import Level, embed, evaluating
from mmpt.evaluate.retrieval import retrieval
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.contrastive import COMBOS, count_pairs
from mmpt.objectives.gather import Shares
from mmpt.objectives.sentence import sentence_loss
from mmpt.objectives.tokens import token_loss
from mmpt.parallel.apply import splitter_of
from mmpt.parallel.mesh import World
from mmpt.parallel.sequence import Splitter, refuse_unequal
from mmpt.train.step import autocast
from mmpt.types import MODALITIES, TASKS, TEXT, Fault, ModelOutput, PackedBatch

SPLIT = "val"


def evaluate(model: MultimodalModel, config: RunConfig, world: World) -> dict[str, float]:
    """Figures of the held-out splits by name; empty where no spec has one, without retrieval where it holds no pair.

    Where several sources of a mixture have one, the names say whose; retrieval is measured once a spec. Every rank runs all of
    it: the forward pass is a collective, and these splits are small beside a run.
    """
    tokenizer = Tokenizer.of(config.data)
    mixture = load_mixture(config.data.spec)
    held_out = [(part, spec) for part, spec in zip(mixture.mixture, mixture.specs(), strict=True) if SPLIT in spec.split]
    figures: dict[str, float] = {}
    seen: set[str] = set()
    for part, spec in held_out:
        corpus = Corpus.open(spec, SPLIT, cache_of(config.data))
        of = f"{part.source_name(spec.name)}/" if len(held_out) > 1 else ""
        found = _evaluate(model, corpus, part, tokenizer, config, world, with_retrieval=spec.name not in seen)
        figures |= {of + name: value for name, value in found.items()}
        seen.add(spec.name)
    return figures


def _evaluate(
    model: MultimodalModel,
    corpus: Corpus,
    part: MixturePart,
    tokenizer: Tokenizer,
    config: RunConfig,
    world: World,
    *,
    with_retrieval: bool,
) -> dict[str, float]:
    """Of one split. Its batches are made anew for each figure: all of them at once may be more than memory holds."""
    pairs = torch.zeros(len(COMBOS), dtype=torch.int64)
    faults: list[Fault] = []

    def watched() -> Iterator[PackedBatch]:
        for batch in sequential_batches(corpus, tokenizer, config, part):
            pairs.add_(count_pairs(batch.slots))
            faults.extend(batch.report.faults)
            yield batch

    split = splitter_of(config.model, world)
    whole = WholeBatches(model, split, world)
    with autocast(config, world.device):
        parts = (part_of(batch, split, world) for batch in watched())
        figures = validation_loss(model, parts, world, TASKS.index(part.task))
        refuse_too_many(corpus.name, len(faults), len(corpus), corpus.spec.on_bad, faults)
        figures |= {"val/faults": len(faults)} if faults else {}
        described = [b for (a, b), count in zip(COMBOS, pairs.tolist(), strict=True) if a == TEXT and count]
        for item in described if with_retrieval else ():
            for level in config.model.levels:
                figures |= retrieval_figures(whole, sequential_batches(corpus, tokenizer, config), level, item)
    return figures


def part_of(batch: PackedBatch, split: Splitter | None, world: World) -> PackedBatch:
    """What this rank has, on the device, of a batch that its sequence group is given. Raises UserError where batches differ."""
    if split is None:
        return batch.to(world.device)
    part = split(batch).to(world.device)
    refuse_unequal([part], world.sequence_group)
    return part


def validation_loss(model: MultimodalModel, batches: Iterable[PackedBatch], world: World, task: int) -> dict[str, float]:
    """Mean losses: of a task, nats per labelled token, and of pairs of texts. Without those that nothing is asked for.

    Batches are this rank's parts of those that its sequence group is given.
    """
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with evaluating(model):
        for batch in batches:
            output = model(batch)
            losses = {TASKS[task]: token_loss(output, batch, task)}
            if output.sentence_logits is not None:
                losses["next_sentence"] = sentence_loss(output.sentence_logits, batch.segments)
            for name, loss in losses.items():
                sums[name] += float(loss.sum)
                counts[name] += len(loss.rows)
    totals = torch.tensor([[sums[name], counts[name]] for name in counts], dtype=torch.float64, device=world.device)
    if world.sequence_group is not None:
        dist.all_reduce(totals, group=world.sequence_group)
    return {f"val/{name}": total / count for name, (total, count) in zip(counts, totals.tolist(), strict=True) if count}


class WholeBatches(nn.Module):
    """The model, to be given whole batches, the same on every rank: its embeddings are those of all slots."""

    def __init__(self, model: MultimodalModel, split: Splitter | None, world: World) -> None:
        super().__init__()
        self.model, self.split, self.world = model, split, world
        self.train(model.training)

    def forward(self, batch: PackedBatch) -> ModelOutput:
        """`batch` on the CPU; on the device what is this rank's of it, but for the embeddings."""
        part = part_of(batch, self.split, self.world)
        output = self.model(part)
        if part.split is None:
            return output
        shares = Shares.of(len(part.split.slot_numbers), self.world.device, self.world.sequence_group)
        order = shares.gather(part.split.slot_numbers[:, None]).flatten().argsort()
        whole = {}
        for level, found in output.embeddings.items():
            vectors, norms = (shares.gather(rows)[order] for rows in (found.vectors, found.norms[:, None]))
            whole[level] = replace(found, vectors=vectors, norms=norms.flatten())
        return replace(output, embeddings=whole)


def retrieval_figures(model: WholeBatches, batches: Iterable[PackedBatch], level: Level, item: int) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions."""
    embedded = embed(model, batches, "cpu", level=level, item=item)
    result = retrieval(embedded.items, embedded.texts, embedded.owner)
    name = MODALITIES[item]
    directions = {f"{name}_to_text": result.item_to_text, f"text_to_{name}": result.text_to_item}
    return {
        f"retrieval/{level}/{direction}/R@{k}": value
        for direction, ranking in directions.items()
        for k, value in ranking.ties_won.recall.items()
    }
