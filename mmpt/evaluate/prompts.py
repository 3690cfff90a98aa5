"""Batches of segments that no corpus holds: class names, further captions, and captions in the making.

texts --text_batches--> `<bos> words <emb>`, as a document's contrasted text is --prompt_batch--> PackedBatch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmpt.config import ModelConfig, RunConfig
from mmpt.data.collate import Item, PackEntry, collate
from mmpt.data.form import Form
from mmpt.data.packing import next_fit
from mmpt.data.segments import Segmenter
from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    NOTHING,
    DocumentRef,
    LoaderState,
    LoadReport,
    PackedBatch,
    PlanCursor,
    Text,
    TokenizedDocument,
)

STATE = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
REPORT = LoadReport(milliseconds={}, tokens={}, faults=())


def prompt_batch(
    segments: Sequence[TokenizedDocument], config: ModelConfig, pad: int, items: Sequence[Item] = (), modality: int = NOTHING
) -> PackedBatch:
    """The segments as documents of one pack, in order and without padding; `items`, of `modality`, one for each or none."""
    entries, position = [], 0
    for number, segment in enumerate(segments):
        place = {"epoch": 0, "piece": 0, "pack": 0, "position": position, "seed": 0}
        ref = DocumentRef(source="prompt", key=str(number), **place)
        media = {modality: [items[number]]} if items else {}
        entries.append(PackEntry(ref=ref, tokens=len(segment.tokens), segments=(segment,), items=media))
        position += len(segment.tokens)
    return collate([entries], model=config, pack_tokens=position, pad=pad, state=STATE, report=REPORT)


def text_batches(texts: Sequence[str], tokenizer: Tokenizer, config: RunConfig) -> Iterator[PackedBatch]:
    """The texts in order, each as a document whose one embedding slot is its own; a batch has as many as a batch of the run.

    A text that is longer than the run's longest segment is cut to it.
    """
    segmenter = Segmenter(Form.of(config.model, config.data.pack_tokens), tokenizer)
    segments = [segmenter.embedded_text(Text(text=text)) for text in texts]
    lengths = [len(segment.tokens) for segment in segments]
    for members in next_fit(lengths, config.data.pack_tokens * config.data.packs_per_batch):
        yield prompt_batch([segments[i] for i in members], config.model, tokenizer.pad)
