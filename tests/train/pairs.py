"""Documents with texts, pictures and sounds to be contrasted, as batches for the Toy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from token_batches import label_batch

from mmpt.types import AUDIO, IMAGE, NOTHING, TEXT, EmbeddingSlots, PackedBatch


@dataclass(frozen=True)
class Made:
    labels: tuple[int, ...]
    contents: dict[int, int]  # by modality; equal numbers are duplicates


DOCUMENTS = (
    Made((1, 2, 3), {IMAGE: 1, TEXT: 2}),
    Made((4,), {AUDIO: 3, TEXT: 4}),
    Made((5, 6), {IMAGE: 5, TEXT: 6, AUDIO: 7}),
    Made((7, 1), {}),
    Made((2,), {TEXT: 8, IMAGE: 9}),
    Made((3, 9, 10), {IMAGE: 1, TEXT: 10}),  # the picture of the first
    Made((4, 4), {TEXT: 11, AUDIO: 12}),
    Made((8,), {TEXT: 2, IMAGE: 13}),  # the text of the first
    Made((6, 5), {TEXT: 14, IMAGE: 15}),
)
SHARES = ((0, 1, 2), (3,), (4, 5, 6, 7), (8,))
"""Documents of four micro-batches, or ranks: one has nothing to contrast."""


def pair_batch(numbers: Sequence[int]) -> PackedBatch:
    """A batch of some of DOCUMENTS; sources "a" and "b" take turns."""
    documents = [DOCUMENTS[number] for number in numbers]
    rows = [(m, d, content) for d, made in enumerate(documents) for m, content in made.contents.items()]
    modality, pair, content = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T
    slots = EmbeddingSlots(modality=modality, item=torch.full_like(modality, NOTHING), pair=pair, content=content)
    sources = ["ab"[number % 2] for number in numbers]
    batch = label_batch([made.labels for made in documents], slots=slots, sources=sources)
    return replace(batch, tokens=batch.labels + 20)
