"""What a model makes of a split: embeddings of both sides.

PackedBatch --model--> embeddings of a level, by slot --embed--> Embedded(items, texts, owner)
texts --text_batches, model--> embed_texts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.config import RunConfig
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.prompts import text_batches
from mmpt.types import MODALITIES, NOTHING, TEXT, PackedBatch

Level = Literal["backbone", "tower"]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Both sides of a split, on the CPU in fp32, in the order in which the batches brought them."""

    items: Float[Tensor, "N E"]
    texts: Float[Tensor, "M E"]
    owner: Int[Tensor, " M"]  # row of `items` that each text belongs to
    keys: tuple[str, ...]  # document of each item


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; its mode is restored.

    no_grad and not inference_mode: FSDP2 keeps its gathered parameters for the next step, and tensors made in
    inference mode cannot be trained.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def embed(model: nn.Module, batches: Iterable[PackedBatch], device: torch.device | str, *, level: Level, item: int) -> Embedded:
    """Embed every document that has both an item of modality `item` (IMAGE, AUDIO or VIDEO) and a text.

    Its slot of that modality is an item, its TEXT slots are the item's texts, at `level`; slots of other modalities are passed
    over. Equal texts are all kept; documents with one side only are left out. Precision is the caller's (autocast).
    Raises ValueError for a document with two items, and where no document has both sides.
    """
    items, texts, owners, keys, seen = [], [], [], [], 0
    with evaluating(model):
        for batch in batches:
            vectors = _vectors(model, batch, device, level)
            item_slots, text_slots, owner = _pair_up(batch, item)
            items.append(vectors[item_slots])
            texts.append(vectors[text_slots])
            owners.append(len(keys) + owner)
            keys += _keys(batch, item_slots)
            seen += batch.documents
    if not keys:
        raise ValueError(f"none of {seen} documents has embeddings of both an item ({MODALITIES[item]}) and a text")
    return Embedded(items=torch.cat(items), texts=torch.cat(texts), owner=torch.cat(owners), keys=tuple(keys))


def embed_items(
    model: nn.Module, batches: Iterable[PackedBatch], device: torch.device | str, *, level: Level, item: int
) -> tuple[Float[Tensor, "N E"], tuple[str, ...]]:
    """The items of modality `item` as in `embed`, with a text beside them or without, and the keys of their documents.

    Raises ValueError where no document has one.
    """
    items, keys, seen = [], [], 0
    with evaluating(model):
        for batch in batches:
            slots = (batch.slots.modality.cpu() == item).nonzero().flatten()
            items.append(_vectors(model, batch, device, level)[slots])
            keys += _keys(batch, slots)
            seen += batch.documents
    if not keys:
        raise ValueError(f"none of {seen} documents has an embedding of an item ({MODALITIES[item]})")
    return torch.cat(items), tuple(keys)


def _vectors(model: nn.Module, batch: PackedBatch, device: torch.device | str, level: Level) -> Float[Tensor, "P E"]:
    """The embeddings of a batch's slots, on the CPU in fp32."""
    return model(batch.to(device)).embeddings[level].vectors.float().cpu()


def _keys(batch: PackedBatch, slots: Int[Tensor, " n"]) -> list[str]:
    return [batch.provenance[document].key for document in batch.slots.pair[slots].tolist()]


def _pair_up(batch: PackedBatch, item: int) -> tuple[Int[Tensor, " items"], Int[Tensor, " texts"], Int[Tensor, " texts"]]:
    """Slots of the items and of the texts of documents that have both, and which of those items each text belongs to."""
    modality, pair = batch.slots.modality.cpu(), batch.slots.pair.cpu()
    n_items, n_texts = (torch.bincount(pair[modality == kind], minlength=batch.documents) for kind in (item, TEXT))
    if (n_items > 1).any():
        twice = batch.provenance[int(n_items.argmax())]
        raise ValueError(f"document {twice.key} of {twice.source} has {int(n_items.max())} items; retrieval needs one")
    both = ((n_items > 0) & (n_texts > 0))[pair]
    item_slots, text_slots = (((modality == kind) & both).nonzero().flatten() for kind in (item, TEXT))
    row = torch.full((batch.documents,), NOTHING)
    row[pair[item_slots]] = torch.arange(len(item_slots))
    return item_slots, text_slots, row[pair[text_slots]]


def embed_texts(
    model: nn.Module, texts: Sequence[str], tokenizer: Tokenizer, config: RunConfig, device: torch.device | str, *, level: Level
) -> Float[Tensor, "M E"]:
    """Embed texts that stand by themselves, as `embed` does those of documents: unit length, on the CPU in fp32."""
    with evaluating(model):
        return torch.cat([_vectors(model, batch, device, level) for batch in text_batches(texts, tokenizer, config)])
