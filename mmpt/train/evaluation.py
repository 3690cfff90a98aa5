"""Evaluation in the loop: next-token loss and retrieval on the held-out split, where the spec has one named `val`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import sequential_batches
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import embed, evaluating
from mmpt.evaluate.retrieval import retrieval
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.contrastive import pair_slots
from mmpt.objectives.next_token import next_token_loss
from mmpt.parallel.mesh import World
from mmpt.train.step import autocast
from mmpt.types import IGNORE, PackedBatch

SPLIT = "val"


def evaluate(model: MultimodalModel, config: RunConfig, world: World) -> dict[str, float]:
    """Figures of the held-out split by name; empty where the spec has none, without retrieval where it holds no pair.

    Every rank runs the whole split: the forward pass is a collective, and the split is small beside a run.
    """
    spec = load_spec(config.data.spec)
    if SPLIT not in spec.split:
        return {}
    corpus, tokenizer = Corpus.open(spec, SPLIT), Tokenizer.load(config.data.tokenizer)
    batches = list(sequential_batches(corpus, tokenizer, config))
    with autocast(config, world.device):
        figures = {"val/next_token": validation_loss(model, batches, world)}
        if any(len(pair_slots(batch.slots)[0]) for batch in batches):
            figures |= retrieval_figures(model, batches, world)
    return figures


def validation_loss(model: MultimodalModel, batches: Sequence[PackedBatch], world: World) -> float:
    """Mean next-token loss, nats per token; NaN where nothing is to be predicted."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in (batch.to(world.device) for batch in batches):
            output = model(batch)
            total += float(next_token_loss(output.hidden, output.output_weight, batch.labels))
            count += int((batch.labels != IGNORE).sum())
    return total / count if count else torch.nan


def retrieval_figures(model: MultimodalModel, batches: Sequence[PackedBatch], world: World) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions."""
    embeddings = embed(model, batches, world.device)
    result = retrieval(embeddings.items, embeddings.texts, embeddings.owner)
    directions = {"image_to_text": result.item_to_text, "text_to_image": result.text_to_item}
    return {
        f"retrieval/{name}/R@{k}": value
        for name, direction in directions.items()
        for k, value in direction.ties_won.recall.items()
    }
