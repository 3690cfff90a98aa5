"""What a model makes of a split: embeddings of both sides, and captions.

PackedBatch -> model -> embeddings by slot -> Embeddings(items, texts, owner)
pictures -> <image>... <emb> <bos> -> the likeliest next token, again and again -> captions
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mmpt.config import ImageEncoderConfig
from mmpt.data.media.images import patchify
from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    IGNORE,
    IMAGE,
    NOTHING,
    TEXT,
    DocumentRef,
    EmbeddingSlots,
    LoaderState,
    LoadReport,
    MediaBatch,
    PackedBatch,
    PlanCursor,
)


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Both sides of a split, on the CPU in fp32, in the order in which the batches brought them."""

    items: Float[Tensor, "N E"]
    texts: Float[Tensor, "M E"]
    owner: Int[Tensor, " M"]  # row of `items` that each text belongs to
    keys: tuple[str, ...]  # document of each item
    documents: Int[Tensor, " N"]  # number of that document in the order of the batches, from 0


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


def embed(model: nn.Module, batches: Iterable[PackedBatch], device: torch.device | str) -> Embeddings:
    """Embed every document that has both a picture and a text: its IMAGE slot is an item, its TEXT slots are texts.

    Equal texts are all kept; documents with one side only are left out. Precision is the caller's (autocast).
    Raises ValueError for a document with two items, and where no document has both sides.
    """
    items, texts, owners, keys, documents, seen = [], [], [], [], [], 0
    with evaluating(model):
        for batch in batches:
            embeddings = model(batch.to(device)).embeddings.float().cpu()
            item_slots, text_slots, owner = _pair_up(batch)
            in_batch = batch.slots.pair[item_slots].cpu()
            items.append(embeddings[item_slots])
            texts.append(embeddings[text_slots])
            owners.append(len(keys) + owner)
            documents.append(seen + in_batch)
            keys += [batch.provenance[document].key for document in in_batch.tolist()]
            seen += batch.documents
    if not keys:
        raise ValueError(f"none of {seen} documents has both a picture and a text")
    return Embeddings(
        items=torch.cat(items), texts=torch.cat(texts), owner=torch.cat(owners), keys=tuple(keys), documents=torch.cat(documents)
    )


def _pair_up(batch: PackedBatch) -> tuple[Int[Tensor, " items"], Int[Tensor, " texts"], Int[Tensor, " texts"]]:
    """Slots of the items and of the texts of documents that have both, and which of those items each text belongs to."""
    modality, pair = batch.slots.modality.cpu(), batch.slots.pair.cpu()
    n_items, n_texts = (torch.bincount(pair[modality == kind], minlength=batch.documents) for kind in (IMAGE, TEXT))
    if (n_items > 1).any():
        twice = batch.provenance[int(n_items.argmax())]
        raise ValueError(f"document {twice.key} of {twice.source} has {int(n_items.max())} items; retrieval needs one")
    both = ((n_items > 0) & (n_texts > 0))[pair]
    item_slots, text_slots = (((modality == kind) & both).nonzero().flatten() for kind in (IMAGE, TEXT))
    row = torch.full((batch.documents,), NOTHING)
    row[pair[item_slots]] = torch.arange(len(item_slots))
    return item_slots, text_slots, row[pair[text_slots]]


def captions(
    model: nn.Module,
    tokenizer: Tokenizer,
    images: UInt8[Tensor, "B 3 size size"],
    config: ImageEncoderConfig,
    device: torch.device | str,
    max_tokens: int = 24,
) -> list[str]:
    """The likeliest continuation of each picture, one token at a time until <eos> or `max_tokens`.

    All pictures go side by side as segments of one flat batch. Each step computes the whole prefix anew: names are
    a few tokens long, and a cache of keys and values would be a second path through every attention layer.
    """
    patches = patchify(images, config.patch).view(len(images), config.patches_per_side**2, -1)
    special = [tokenizer.pad, tokenizer.bos, tokenizer.media, tokenizer.emb]  # only <eos> and text may follow
    prompt = torch.tensor([tokenizer.media] * config.tokens_per_image + [tokenizer.emb, tokenizer.bos])
    tokens = prompt.repeat(len(images), 1)
    written: list[list[int]] = [[] for _ in range(len(images))]
    active = torch.arange(len(images))
    with evaluating(model):
        for _ in range(max_tokens):
            if not len(active):
                break
            output = model(_prompts(tokens, patches[active], config).to(device))
            last = output.hidden.view(*tokens.shape, -1)[:, -1]
            logits = last.float() @ output.output_weight.float().T
            logits[:, special] = -torch.inf
            logits[:, len(tokenizer) :] = -torch.inf  # rows of the embedding beyond the vocabulary
            chosen = logits.argmax(dim=1).cpu()
            going = chosen != tokenizer.eos
            active, tokens = active[going], torch.cat([tokens[going], chosen[going, None]], dim=1)
            for picture, token in zip(active.tolist(), chosen[going].tolist(), strict=True):
                written[picture].append(token)
    return [tokenizer.decode(ids) for ids in written]


def _prompts(tokens: Int[Tensor, "B L"], patches: UInt8[Tensor, "B patches values"], config: ImageEncoderConfig) -> PackedBatch:
    """Each row of `tokens` as a segment that begins with the slots of its picture and their `<emb>`."""
    rows, length = tokens.shape
    media = config.tokens_per_image
    media_index = torch.full((rows, length), NOTHING)
    media_index[:, :media] = torch.arange(rows * media).view(rows, media)
    numbers = torch.arange(rows)
    pool_index = torch.full((rows, length), NOTHING)
    pool_index[:, media] = numbers
    return PackedBatch(
        tokens=tokens.flatten(),
        labels=torch.full((rows * length,), IGNORE),
        position_ids=torch.arange(length).repeat(rows),
        document_ids=numbers.repeat_interleave(length),
        media_index=media_index.flatten(),
        pool_index=pool_index.flatten(),
        images=MediaBatch(
            values=patches.flatten(0, 1),
            cu_seqlens=torch.arange(rows + 1) * patches.shape[1],
            grid=torch.tensor([[1, config.patches_per_side, config.patches_per_side]]).repeat(rows, 1),
            times=torch.zeros(rows),
        ),
        audios=_no_media(),
        videos=_no_media(),
        slots=EmbeddingSlots(modality=torch.full((rows,), IMAGE), pair=numbers, content=numbers),
        provenance=tuple(
            DocumentRef(source="prompt", key=str(row), epoch=0, piece=0, pack=0, position=row * length, seed=0)
            for row in range(rows)
        ),
        state=LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0),
        report=LoadReport(milliseconds={}, tokens={}, faults=()),
    )


def _no_media() -> MediaBatch:
    return MediaBatch(
        values=torch.empty(0, 0), cu_seqlens=torch.zeros(1, dtype=torch.int64), grid=torch.empty(0, 3), times=torch.empty(0)
    )
