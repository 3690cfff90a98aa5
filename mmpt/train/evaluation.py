"""Evaluation in the loop: next-token loss and retrieval on the held-out splits, of those specs that have one named `val`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import cache_of, sequential_batches
from mmpt.data.quarantine import refuse_too_many
from mmpt.data.spec import load_mixture
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import embed, evaluating
from mmpt.evaluate.retrieval import retrieval
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.contrastive import pair_slots
from mmpt.objectives.next_token import next_token_loss
from mmpt.parallel.mesh import World
from mmpt.train.step import autocast
from mmpt.types import IGNORE, Fault, PackedBatch, UserError

SPLIT = "val"


def evaluate(model: MultimodalModel, config: RunConfig, world: World) -> dict[str, float]:
    """Figures of the held-out splits by name; empty where no spec has one, without retrieval where it holds no pair.

    Where several specs of a mixture have one, the names say whose. Every rank runs all of it: the forward pass is a collective,
    and these splits are small beside a run.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer)
    specs = [spec for spec in load_mixture(config.data.spec).specs() if SPLIT in spec.split]
    figures: dict[str, float] = {}
    for spec in specs:
        corpus = Corpus.open(spec, SPLIT, cache_of(config.data))
        of = f"{spec.name}/" if len(specs) > 1 else ""
        figures |= {of + name: value for name, value in _evaluate(model, corpus, tokenizer, config, world).items()}
    return figures


def held_out_spec(config: RunConfig) -> Path:
    """The first spec of the run's mixture that has a held-out split. Raises UserError where none has."""
    for spec in load_mixture(config.data.spec).specs():
        if SPLIT in spec.split:
            return spec.path
    raise UserError(f"data.spec = {config.data.spec}: no split {SPLIT!r} in it; name one with --spec and --split")


def _evaluate(model: MultimodalModel, corpus: Corpus, tokenizer: Tokenizer, config: RunConfig, world: World) -> dict[str, float]:
    """Of one split. Its batches are made anew for each figure: all of them at once may be more than memory holds."""
    pairs: list[int] = []
    faults: list[Fault] = []

    def watched() -> Iterator[PackedBatch]:
        for batch in sequential_batches(corpus, tokenizer, config):
            pairs.append(len(pair_slots(batch.slots)[0]))
            faults.extend(batch.report.faults)
            yield batch

    with autocast(config, world.device):
        figures = {"val/next_token": validation_loss(model, watched(), world)}
        refuse_too_many(corpus.name, len(faults), len(corpus), corpus.spec.on_bad, faults)
        figures |= {"val/faults": len(faults)} if faults else {}
        if any(pairs):
            figures |= retrieval_figures(model, sequential_batches(corpus, tokenizer, config), world)
    return figures


def validation_loss(model: MultimodalModel, batches: Iterable[PackedBatch], world: World) -> float:
    """Mean next-token loss, nats per token; NaN where nothing is to be predicted."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in (batch.to(world.device) for batch in batches):
            output = model(batch)
            total += float(next_token_loss(output.hidden, output.output_weight, batch.labels))
            count += int((batch.labels != IGNORE).sum())
    return total / count if count else torch.nan


def retrieval_figures(model: MultimodalModel, batches: Iterable[PackedBatch], world: World) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions."""
    embeddings = embed(model, batches, world.device)
    result = retrieval(embeddings.items, embeddings.texts, embeddings.owner)
    directions = {"image_to_text": result.item_to_text, "text_to_image": result.text_to_item}
    return {
        f"retrieval/{name}/R@{k}": value
        for name, direction in directions.items()
        for k, value in direction.ties_won.recall.items()
    }
