"""Evaluation in the loop: losses and retrieval on the held-out splits, of those specs that have one named `val`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

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
from mmpt.objectives.sentence import sentence_loss
from mmpt.objectives.tokens import token_loss
from mmpt.parallel.mesh import World
from mmpt.train.step import autocast
from mmpt.types import MODALITIES, TASKS, TEXT, Fault, PackedBatch

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

    with autocast(config, world.device):
        figures = validation_loss(model, watched(), world, TASKS.index(part.task))
        refuse_too_many(corpus.name, len(faults), len(corpus), corpus.spec.on_bad, faults)
        figures |= {"val/faults": len(faults)} if faults else {}
        described = [b for (a, b), count in zip(COMBOS, pairs.tolist(), strict=True) if a == TEXT and count]
        for item in described if with_retrieval else ():
            for level in config.model.levels:
                figures |= retrieval_figures(model, sequential_batches(corpus, tokenizer, config), world, level, item)
    return figures


def validation_loss(model: MultimodalModel, batches: Iterable[PackedBatch], world: World, task: int) -> dict[str, float]:
    """Mean losses: of a task, nats per labelled token, and of pairs of texts. Without those that nothing is asked for."""
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with evaluating(model):
        for batch in (batch.to(world.device) for batch in batches):
            output = model(batch)
            losses = {TASKS[task]: token_loss(output, batch, task)}
            if output.sentence_logits is not None:
                losses["next_sentence"] = sentence_loss(output.sentence_logits, batch.segments.next_sentence)
            for name, loss in losses.items():
                sums[name] += float(loss.sum)
                counts[name] += len(loss.rows)
    return {f"val/{name}": sums[name] / count for name, count in counts.items() if count}


def retrieval_figures(
    model: MultimodalModel, batches: Iterable[PackedBatch], world: World, level: Level, item: int
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions."""
    embedded = embed(model, batches, world.device, level=level, item=item)
    result = retrieval(embedded.items, embedded.texts, embedded.owner)
    name = MODALITIES[item]
    directions = {f"{name}_to_text": result.item_to_text, f"text_to_{name}": result.text_to_item}
    return {
        f"retrieval/{level}/{direction}/R@{k}": value
        for direction, ranking in directions.items()
        for k, value in ranking.ties_won.recall.items()
    }
