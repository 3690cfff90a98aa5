"""Batches of labels alone, for losses that look at nothing else, and outputs of no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmpt.types import (
    IGNORE,
    NEXT_TOKEN,
    NOTHING,
    DocumentRef,
    EmbeddingSlots,
    LoaderState,
    LoadReport,
    MediaBatch,
    ModelOutput,
    PackedBatch,
    PlanCursor,
    Segments,
)

NO_MEDIA = MediaBatch(
    values=torch.zeros(0, 1),
    cu_seqlens=torch.zeros(1, dtype=torch.int64),
    grid=torch.zeros(0, 3, dtype=torch.int64),
    times=torch.zeros(0),
)
NO_SLOTS = EmbeddingSlots(**{name: torch.zeros(0, dtype=torch.int64) for name in ("modality", "item", "pair", "content")})


def label_batch(
    segments: Sequence[Sequence[int]],
    *,
    tasks: Sequence[int] | None = None,
    next_sentence: Sequence[int] | None = None,
    documents: Sequence[int] | None = None,
    sources: Sequence[str] | None = None,
    slots: EmbeddingSlots = NO_SLOTS,
    padding: int = 0,
    packs: int = 1,
) -> PackedBatch:
    """One document per segment unless told otherwise; `padding` tokens at the end; packs are numbered from 7."""
    numbers = torch.arange(len(segments))
    labels = torch.tensor([*(label for segment in segments for label in segment), *[IGNORE] * padding], dtype=torch.int64)
    lengths = torch.tensor([len(segment) for segment in segments], dtype=torch.int64)
    ids = torch.cat([numbers.repeat_interleave(lengths), torch.full((padding,), NOTHING)])
    document = numbers if documents is None else torch.tensor(documents)
    nothing = torch.full_like(labels, NOTHING)
    starts = lengths.cumsum(0) - lengths
    per_pack = max(len(labels) // packs, 1)
    refs = []
    for d in range(int(document.max()) + 1 if len(document) else 0):
        pack = 7 + int(starts[document == d][0]) // per_pack
        source = sources[d] if sources else "made"
        refs.append(DocumentRef(source=source, key=str(d), epoch=0, piece=0, pack=pack, position=0, seed=0))
    return PackedBatch(
        tokens=torch.zeros_like(labels),
        labels=labels,
        position_ids=torch.arange(len(labels))[None],
        token_types=torch.zeros_like(labels),
        document_ids=ids,
        media_index=nothing,
        pool_index=nothing,
        span_ids=nothing,
        images=NO_MEDIA,
        audios=NO_MEDIA,
        videos=NO_MEDIA,
        slots=slots,
        segments=Segments(
            document=document,
            task=torch.full_like(numbers, NEXT_TOKEN) if tasks is None else torch.tensor(tasks),
            next_sentence=torch.full_like(numbers, IGNORE) if next_sentence is None else torch.tensor(next_sentence),
            pack=starts // per_pack,
            first=starts,
        ),
        packs=packs,
        kinds=torch.zeros(len(refs), dtype=torch.int64),
        provenance=tuple(refs),
        state=LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0),
        report=LoadReport(milliseconds={}, tokens={}, faults=()),
    )


def made_output(tokens: int, *, vocabulary: int = 11, dim: int = 6, bias: bool = False, seed: int = 0, **others) -> ModelOutput:
    """Random hidden states and output layer in fp64, all leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    hidden = draw(tokens, dim)
    plain = {"sentence_logits": None, "embeddings": {}, "routing": ()}
    return ModelOutput(
        hidden=hidden,
        output_hidden=hidden,
        output_weight=draw(vocabulary, dim),
        output_bias=draw(vocabulary) if bias else None,
        **(plain | others),
    )


def leaves(output: ModelOutput) -> list[torch.Tensor]:
    return [t for t in (output.output_hidden, output.output_weight, output.output_bias) if t is not None]
