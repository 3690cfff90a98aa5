"""The nouns of mmpt, in the order in which a document meets them.

    Sample -> Document -> TokenizedDocument -> PackedBatch -> ModelOutput -> LossTerms

Letters in shapes: T tokens of a batch (all packs of a rank, end to end), N patches, M media items,
P embedding slots, D width of the shared transformer, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

IGNORE = -100
"""The label of a position that the next-token loss passes over; the only mask that there is."""

NOTHING = -1
"""`document_ids` of padding, `media_index` of a token that is not media, `pool_index` of a token that is not pooled."""

TEXT, IMAGE = 0, 1
"""Values of `EmbeddingSlots.modality`."""


class UserError(Exception):
    """A mistake of the user's: the message names the field, the value and the mend. Printed without a traceback."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as it lies in a tar: raw bytes by suffix (`"json"`, `"000.png"`), nothing decoded."""

    key: str
    shard: str
    fields: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Text:
    text: str
    predict: bool = True  # whether the next-token loss applies


@dataclass(frozen=True, kw_only=True)
class Image:
    data: bytes  # encoded, as read from the shard
    width: int  # pixels
    height: int  # pixels
    predict: bool = False


Part = Text | Image


@dataclass(frozen=True, kw_only=True)
class Document:
    """An ordered, interleaved document. `key` is unique within its source."""

    key: str
    source: str
    parts: tuple[Part, ...]
    meta: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class MediaSpan:
    """`length` media slots from token `start` show media item `item` of the document."""

    start: int
    length: int
    item: int


@dataclass(frozen=True, kw_only=True)
class EmbeddingToken:
    """The `<emb>` token at `position` holds the embedding of one part of the document."""

    position: int
    modality: int  # TEXT or IMAGE
    content: int  # hash of what is embedded: equal content is a duplicate, not a negative


@dataclass(frozen=True, kw_only=True)
class TokenizedDocument:
    """One segment of a pack: no token of it attends outside it. A document with a contrasted caption makes two."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]  # already shifted: labels[i] is what position i predicts, or IGNORE
    media: tuple[MediaSpan, ...] = ()
    embeddings: tuple[EmbeddingToken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MediaBatch:
    """Packed patches of all media items of one modality, item after item, raster order within an item."""

    patches: UInt8[Tensor, "N patch_values"]  # (row, column, channel) of one patch, 0..255, not normalised
    cu_seqlens: Int[Tensor, "M_plus_1"]  # item m owns patches cu_seqlens[m] : cu_seqlens[m + 1]
    grid: Int[Tensor, "M 3"]  # patches along (time, height, width)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSlots:
    """What each embedding slot of a batch stands for."""

    modality: Int[Tensor, " P"]  # TEXT or IMAGE
    pair: Int[Tensor, " P"]  # number of the document within the batch: equal numbers belong together
    content: Int[Tensor, " P"]  # 63-bit hash of the content: equal hashes are duplicates


@dataclass(frozen=True, kw_only=True)
class DocumentRef:
    """Where a document of a pack came from."""

    source: str
    key: str
    epoch: int
    pack: int  # number of the pack within the run, over all ranks


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where the plan stands after a batch, the same on every rank: the next pack is number `pack` of window `window`."""

    fingerprint: str  # of index, tokenizer and packing settings: resuming under another is refused
    window: int
    pack: int
    packs_consumed: int


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """The packs that one rank computes at once, end to end: every per-token tensor has the same length T."""

    tokens: Int[Tensor, " T"]
    labels: Int[Tensor, " T"]  # the next token, or IGNORE
    position_ids: Int[Tensor, " T"]  # from 0 within each segment
    document_ids: Int[Tensor, " T"]  # one number a segment, NOTHING for padding; attention stays within equal numbers
    media_index: Int[Tensor, " T"]  # row of the concatenated media features, or NOTHING
    pool_index: Int[Tensor, " T"]  # embedding slot, or NOTHING
    images: MediaBatch
    slots: EmbeddingSlots
    provenance: tuple[DocumentRef, ...]  # indexed by `slots.pair`, one for each document
    state: LoaderState  # the loader's state once this batch is consumed

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return _to(self, device)

    @property
    def documents(self) -> int:
        return len(self.provenance)


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value):
        return replace(value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What the model computes. Logits are never part of it: the loss makes them, a chunk at a time."""

    hidden: Float[Tensor, "T D"]  # after the last norm
    embeddings: Float[Tensor, "P E"]  # unit length, fp32
    logit_scale: Float[Tensor, "1"]  # the factor on cosines, already exponentiated and clamped
    output_weight: Float[Tensor, "vocabulary D"]  # logits = hidden @ output_weight.T


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """A loss as a local sum over a global count: layouts and packing cannot reweight it."""

    sum: Float[Tensor, ""]  # over this rank's part; carries the graph
    count: int  # over all ranks and all micro-batches of the step
    weight: float

    @property
    def value(self) -> Float[Tensor, ""]:
        return self.sum / max(self.count, 1)


LossTerms = Mapping[str, LossTerm]


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint holds beside tensors: plain JSON, the same on every rank."""

    step: int  # optimizer steps taken
    loader: LoaderState
    samples: int  # documents seen, over all ranks
