"""Evaluation in the loop: held-out retrieval and next-token loss, where the spec holds a `val` split."""

from __future__ import annotations

import torch

from mmpt.config import RunConfig
from mmpt.data.index import Corpus
from mmpt.data.loader import sequential_batches
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import evaluating
from mmpt.evaluate.zero_shot import evaluate_retrieval
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.next_token import next_token_loss
from mmpt.parallel.mesh import World
from mmpt.train.step import autocast
from mmpt.types import IGNORE

SPLIT = "val"


def evaluate(model: MultimodalModel, config: RunConfig, world: World) -> dict[str, float]:
    """Figures of the held-out split by name; empty where the spec has none.

    Every rank runs the whole split: the forward pass is a collective, and the split is small beside a run.
    """
    spec = load_spec(config.data.spec)
    if SPLIT not in spec.split:
        return {}
    with autocast(config, world.device):
        result, _ = evaluate_retrieval(model, config, config.data.spec, SPLIT, world.device)
        figures = {"val/next_token": validation_loss(model, config, world)}
    for name, direction in (("image_to_text", result.item_to_text), ("text_to_image", result.text_to_item)):
        figures |= {f"retrieval/{name}/R@{k}": value for k, value in direction.ties_won.recall.items()}
    return figures


def validation_loss(model: MultimodalModel, config: RunConfig, world: World) -> float:
    """Mean next-token loss over the held-out split, nats per token; NaN where nothing is to be predicted."""
    corpus = Corpus.open(load_spec(config.data.spec), SPLIT)
    total, count = 0.0, 0
    with evaluating(model):
        for batch in sequential_batches(corpus, Tokenizer.load(config.data.tokenizer), config):
            batch = batch.to(world.device)
            output = model(batch)
            total += float(next_token_loss(output.hidden, output.output_weight, batch.labels))
            count += int((batch.labels != IGNORE).sum())
    return total / count if count else torch.nan
