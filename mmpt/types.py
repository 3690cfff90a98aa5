"""The nouns of mmpt, in the order in which a document meets them.

    Sample -> Document -> TokenizedDocument -> PackedBatch -> ModelOutput -> LossTerms

Letters in shapes: T tokens of a batch (all packs of a rank, end to end), N patches, M media items,
P embedding slots, D width of the shared transformer, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from pydantic import Field, TypeAdapter
from torch import Tensor

IGNORE = -100
"""The label of a position that the next-token loss passes over; the only mask that there is."""

NOTHING = -1
"""`document_ids` of padding, `media_index` of a token that is not media, `pool_index` of a token that is not pooled."""

TEXT, IMAGE, AUDIO, VIDEO = 0, 1, 2, 3
"""Values of `EmbeddingSlots.modality` and `MediaSpan.modality`."""

MODALITIES = ("text", "image", "audio", "video")
"""Their names, in the order of their values."""

NEXT_TOKEN, MASKED, SPAN = 0, 1, 2
"""Values of `Segments.task`: what the labels of a segment ask for."""

TASKS = ("next_token", "masked", "span")
"""Their names, in the order of their values: those of `task` in a mixture, and of the objectives."""

KINDS = (*MODALITIES, "mixed", "none")
"""What a document shows: text alone, media of one modality, or of several; none: what is no document's."""


Count = Annotated[int, Field(ge=0, lt=2**62, strict=True)]
"""As states hold them, which are read from files."""

Buffer = bytes | memoryview
"""Encoded bytes: a view where they lie within the bytes of a whole batch."""


class UserError(Exception):
    """A mistake of the user's: the message names the field, the value and the mend. Printed without a traceback."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as it lies in a tar: raw bytes by suffix (`"json"`, `"000.png"`), nothing decoded."""

    key: str
    shard: str
    fields: Mapping[str, Buffer]


@dataclass(frozen=True, kw_only=True)
class Text:
    text: str
    predict: bool = True  # whether the next-token loss applies


@dataclass(frozen=True, kw_only=True)
class Image:
    data: Buffer  # encoded, as read from the shard
    crc32: int  # of `data` when it was indexed
    width: int  # pixels, as shown: EXIF orientation applied
    height: int  # pixels


@dataclass(frozen=True, kw_only=True)
class Audio:
    data: Buffer  # encoded; of a video, if this is its track
    crc32: int
    sample_rate: int  # Hz
    samples: int  # at that rate, counted from `start`
    start: float = 0.0  # seconds into the file


@dataclass(frozen=True, kw_only=True)
class Video:
    data: Buffer  # encoded
    crc32: int
    width: int  # pixels
    height: int  # pixels
    clip: tuple[float, float]  # seconds: which stretch of the file is meant


Part = Text | Image | Audio | Video


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
    modality: int  # IMAGE, AUDIO or VIDEO
    item: int  # counted from 0 among the document's items of that modality


@dataclass(frozen=True, kw_only=True)
class EmbeddingToken:
    """The tokens `start` up to `stop` hold the embedding of one part of the document: `<emb>`, or all of the part with it.

    None do (`start` equals `stop`) where media do not enter the token stream: the embedding is the encoder's.
    """

    start: int
    stop: int
    modality: int  # TEXT, IMAGE, AUDIO or VIDEO
    item: int  # as in MediaSpan; NOTHING for a text
    content: int  # hash of what is embedded: equal content is a duplicate, not a negative


@dataclass(frozen=True, kw_only=True)
class TokenizedDocument:
    """One segment of a pack: no token of it attends outside it. A document with a contrasted caption makes two."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]  # as in PackedBatch: shifted already, or IGNORE
    media: tuple[MediaSpan, ...] = ()
    embeddings: tuple[EmbeddingToken, ...] = ()
    task: int = NEXT_TOKEN
    second: int | None = None  # the first token of the second of two texts, whose token type is 1
    next_sentence: int = IGNORE  # 0: the second text follows the first; 1: it is another document's


@dataclass(frozen=True, kw_only=True)
class MediaBatch:
    """What an encoder reads: the packed patches or log-mel frames of all items of one modality, item after item.

    Patches stand in raster order, frame after frame; the values of one in (row, column, channel) order, uint8, not normalised.
    Log-mel frames are fp32, as Whisper's.
    """

    values: Num[Tensor, "N values"]
    cu_seqlens: Int[Tensor, "M_plus_1"]  # item m owns rows cu_seqlens[m] : cu_seqlens[m + 1] of `values`
    grid: Int[Tensor, "M 3"]  # rows along (time, height, width): a sound has (frames, 1, 1)
    times: Float[Tensor, " F"]  # seconds into the file of every step along time, item after item; F is the sum of grid[:, 0]


@dataclass(frozen=True, kw_only=True)
class EmbeddingSlots:
    """What each embedding slot of a batch stands for."""

    modality: Int[Tensor, " P"]  # TEXT, IMAGE, AUDIO or VIDEO
    item: Int[Tensor, " P"]  # number of the item among the batch's of that modality, NOTHING for a text
    pair: Int[Tensor, " P"]  # number of the document within the batch: equal numbers belong together
    content: Int[Tensor, " P"]  # 63-bit hash of the content: equal hashes are duplicates


@dataclass(frozen=True, kw_only=True)
class Segments:
    """What is known of each segment of a batch; `document_ids` are its numbers."""

    document: Int[Tensor, " S"]  # number of its document within the batch, as in `provenance`
    task: Int[Tensor, " S"]  # NEXT_TOKEN, MASKED or SPAN
    next_sentence: Int[Tensor, " S"]  # 0: its second text follows its first; 1: it is another document's; or IGNORE
    pack: Int[Tensor, " S"]  # number of its pack within the batch
    first: Int[Tensor, " S"]  # its first token, or NOTHING where another rank has that


@dataclass(frozen=True, kw_only=True)
class DocumentRef:
    """Where a document of a pack came from, and where it went."""

    source: str
    key: str
    epoch: int
    piece: int  # 0, but for the further pieces of a document that is longer than a pack
    pack: int  # number of the pack within the run, over all ranks
    position: int  # of its first token in the pack
    seed: int  # of its augmentation


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A part, or a whole document, that became padding."""

    source: str
    shard: str
    key: str
    epoch: int
    piece: int  # as in DocumentRef
    part: int  # number within the document, or NOTHING for all of it
    reason: str  # one word, counted: see mmpt.data.faults
    detail: str


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What it took to make a batch. Clocks differ from run to run; nothing that is computed depends on them."""

    milliseconds: Mapping[str, float]  # of reading, and of decoding each modality
    tokens: Mapping[str, int]  # of documents, by source
    faults: tuple[Fault, ...]


@dataclass(frozen=True, kw_only=True)
class SourceCursor:
    """How far one source of a mixture has been drawn."""

    position: Count  # documents drawn, over all epochs
    consumed: Count  # tokens or samples drawn since the weights last changed
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]  # in force in the window that the cursor stands in


@dataclass(frozen=True, kw_only=True)
class PlanCursor:
    """The next pack of a plan: number `pack` of window `window`, which began with the sources as given."""

    window: Count
    pack: Count
    sources: Mapping[str, SourceCursor]


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where the plan stands after a batch, the same on every rank."""

    fingerprint: Mapping[str, str]  # of indices, tokenizer and pack settings: going on under others is refused
    cursor: PlanCursor
    packs_consumed: Count

    @classmethod
    def from_json(cls, plain: Any) -> LoaderState:
        """Back from `dataclasses.asdict`. Raises ValueError for anything else: a stranger may have written it."""
        return TypeAdapter(cls).validate_python(plain)


class Slice(NamedTuple):
    """A rectangle of attention: queries `q_start` up to `q_stop` see keys `k_start` up to `k_stop`.

    If `causal` it is a square on the diagonal: the i-th query sees the keys up to the i-th. Rectangles of one rank are disjoint.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """What one of R ranks does in ring attention, hop by hop. Hop h: keys of the rank h places back; hop 0: its own.

    Keys come in order of document and place; those of hop h are rows 0 up to `receive_sizes[h]` of what is received.
    """

    slices: tuple[tuple[Slice, ...], ...]  # of each hop
    send: Int[Tensor, " n"]  # rows of this rank's keys that others need, hop after hop: to the rank h places on
    send_sizes: tuple[int, ...]  # how many of them at each hop; 0 at hop 0
    receive_sizes: tuple[int, ...]  # keys that come at each hop; at hop 0 this rank's own


@dataclass(frozen=True, kw_only=True)
class Route:
    """Rows on their way from the ranks that make them to those that look at them."""

    send: Int[Tensor, " n"]  # rows of this rank, in order of the rank that they go to
    send_sizes: tuple[int, ...]  # how many go to each rank
    receive_sizes: tuple[int, ...]  # how many come from each rank, which is their order


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a batch is shared by the ranks of a sequence group; the batch then holds one rank's tokens, media and slots."""

    part: int  # this rank's place in the group
    parts: int
    imbalance: float  # of attention: the most pairs of query and key that a rank of the ring computes, over their mean
    remote: float  # keys that ranks of the ring get from others, over all that they do not have
    attention: RingPlan
    features: Route  # media features, to the tokens that show them
    items: Route  # pooled media, to their embedding slots
    item_rows: Int[Tensor, " P"]  # row of `items`, received, of every slot of this rank; 0 for a text
    pooled: Route  # hidden states that are pooled, to the embedding slots
    pooled_slots: Int[Tensor, " n"]  # slot of this rank for every row of `pooled`, received
    slot_numbers: Int[Tensor, " P"]  # of this rank's slots, in the whole batch
    token_numbers: Int[Tensor, " T"]  # of this rank's tokens, likewise
    digest: int  # of the whole batch: equal where ranks have cut equal ones


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """The packs that ranks compute at once, end to end: every per-token tensor has the same length T.

    One rank has them all, or, where there is a `split`, its part of the tokens in the order of the ring's plan, of the media and
    of the slots. Documents, segments and packs are counted through the whole batch; `media_index` counts the rows received.
    """

    tokens: Int[Tensor, " T"]
    labels: Int[Tensor, " T"]  # what the logits here are to say, shifted already, or IGNORE
    position_ids: Int[Tensor, "axes T"]  # from 0 within each segment; three rows (time, row, column) with `rope_sections`
    token_types: Int[Tensor, " T"]  # 1 in the second of two texts, else 0
    document_ids: Int[Tensor, " T"]  # one number a segment, NOTHING for padding; attention stays within equal numbers
    media_index: Int[Tensor, " T"]  # row of the media features, those of images, audios and videos end to end, or NOTHING
    pool_index: Int[Tensor, " T"]  # embedding slot, or NOTHING
    span_ids: Int[Tensor, " T"]  # number of the medium, among all of the batch, that the token shows, or NOTHING
    images: MediaBatch
    audios: MediaBatch
    videos: MediaBatch
    slots: EmbeddingSlots
    segments: Segments
    packs: int
    kinds: Int[Tensor, " documents"]  # what each document shows: its number in KINDS
    provenance: tuple[DocumentRef, ...]  # indexed by `slots.pair`, one for each document
    state: LoaderState  # the loader's state once this batch is consumed
    report: LoadReport
    split: Split | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which a copy to an accelerator runs beside computation."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())

    @property
    def documents(self) -> int:
        return len(self.provenance)

    @property
    def media(self) -> dict[int, MediaBatch]:
        """By modality, in the order in which `media_index` counts."""
        return {IMAGE: self.images, AUDIO: self.audios, VIDEO: self.videos}


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, LoaderState | LoadReport):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value)})
    return value


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The embeddings of one level, for the slots of a batch, and what turns their cosines into logits."""

    vectors: Float[Tensor, "P E"]  # unit length, in fp32 at least
    norms: Float[Tensor, " P"]  # before they were brought to unit length; detached
    scale: Float[Tensor, "1"]  # the factor on cosines, already exponentiated and clamped
    bias: Float[Tensor, "1"] | None  # added to the scaled cosines of the sigmoid loss


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How the experts of one layer were used."""

    load: Int[Tensor, " experts"]  # tokens, padding left out, that went to each
    balance: Float[Tensor, " packs"] | None  # the auxiliary loss of each pack; None without one


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What the model computes. Logits are never part of it: the loss makes them, a chunk at a time."""

    hidden: Float[Tensor, "T D"]  # after the last norm
    output_hidden: Float[Tensor, "T D"]  # what the output layer reads: `hidden`, but for BERT's head
    output_weight: Float[Tensor, "vocabulary D"]  # logits = output_hidden @ output_weight.T + output_bias
    output_bias: Float[Tensor, " vocabulary"] | None
    sentence_logits: Float[Tensor, "S 2"] | None  # of segments of two texts: follows, or another's; with BERT's head alone
    embeddings: Mapping[str, Embeddings]  # by level: backbone, tower
    routing: tuple[Routing, ...]  # of every layer with experts


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """A loss as a local sum over a global count: layouts and packing cannot reweight it."""

    sum: Float[Tensor, ""]  # over this rank's part; carries the graph
    count: int  # over all ranks and all micro-batches of the step
    weight: float
    rows: Float[Tensor, " n"]  # what `sum` is the sum of; detached
    documents: Int[Tensor, " n"]  # number within the batch of the document of each row, NOTHING where it is none's

    @property
    def value(self) -> Float[Tensor, ""]:
        return self.sum / max(self.count, 1)


LossTerms = Mapping[str, LossTerm]


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint holds beside tensors: plain JSON, the same on every rank."""

    step: Count  # optimizer steps taken
    loader: LoaderState
    samples: Count  # documents seen, over all ranks
    teacher: Count | None = None  # step of the checkpoint that teaches

    @classmethod
    def from_json(cls, plain: Any) -> TrainState:
        """As `LoaderState.from_json`."""
        return TypeAdapter(cls).validate_python(plain)
