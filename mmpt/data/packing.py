"""Documents to packs: tokens, the arithmetic of lengths, and the tensors of a batch.

    Document --tokenize--> segments --best_fit_decreasing (in the plan)--> packs --collate--> PackedBatch

A document's first segment is its interleaved row. Every further segment encodes one contrasted side that the row
would show the other, on its own. All segments of a document lie in one pack, one behind the other.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    IGNORE,
    IMAGE,
    NOTHING,
    TEXT,
    Document,
    DocumentRef,
    EmbeddingSlots,
    EmbeddingToken,
    Image,
    LoaderState,
    MediaBatch,
    MediaSpan,
    PackedBatch,
    Text,
    TokenizedDocument,
)


def document_length(parts: Sequence[int | None], tokens_per_image: int) -> int:
    """Tokens of all segments of a document. `parts`: for a text its token count, for a picture None."""
    texts = [part for part in parts if part is not None]
    images = len(parts) - len(texts)
    row = sum(text + 2 for text in texts) + images * tokens_per_image
    image_first = bool(parts) and parts[0] is None
    if image_first:
        row += 1
    if not texts or not images:
        return row
    return row + texts[0] + 2 + (0 if image_first else tokens_per_image + 1)


def tokenize(document: Document, tokenizer: Tokenizer, tokens_per_image: int) -> list[TokenizedDocument]:
    """The segments of a document: its interleaved row, then the contrasted sides that the row cannot hold without a leak.

    The row embeds a picture that stands first, right behind its slots: causal, so it sees nothing else. A document with
    pictures and texts gets a segment of its own for the first text and, unless it stands first, for the first picture.
    Labels are the next token within texts to predict, never on media slots, `<emb>` or `<eos>`.
    """
    row, sides = _Segment(tokenizer, tokens_per_image), []
    texts, images = 0, 0
    both = {type(part) for part in document.parts} == {Text, Image}
    for number, part in enumerate(document.parts):
        if isinstance(part, Text):
            ids = tokenizer.encode(part.text)
            row.text(ids, part.predict)
            if both and texts == 0:
                sides.append(_Segment(tokenizer, tokens_per_image).embedded_text(ids, part))
            texts += 1
        else:
            if number == 0:
                row.embedded_image(images, part)
            else:
                row.image(images)
                if both and images == 0:
                    sides.append(_Segment(tokenizer, tokens_per_image).embedded_image(images, part))
            images += 1
    return [segment.tokenized() for segment in (row, *sides)]


class _Segment:
    """A segment in the making."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_image: int):
        self.tokenizer, self.tokens_per_image = tokenizer, tokens_per_image
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.media: list[MediaSpan] = []
        self.embeddings: list[EmbeddingToken] = []

    def text(self, ids: list[int], predict: bool) -> None:
        closed = [*ids, self.tokenizer.eos]
        self.tokens += [self.tokenizer.bos, *closed]
        self.labels += [*closed, IGNORE] if predict else [IGNORE] * (len(closed) + 1)

    def image(self, item: int) -> None:
        self.media.append(MediaSpan(start=len(self.tokens), length=self.tokens_per_image, item=item))
        self._silent([self.tokenizer.image] * self.tokens_per_image)

    def embedded_text(self, ids: list[int], part: Text) -> _Segment:
        self._silent([self.tokenizer.bos, *ids])
        return self._embedding(TEXT, part.text.encode())

    def embedded_image(self, item: int, part: Image) -> _Segment:
        self.image(item)
        return self._embedding(IMAGE, part.data)

    def _embedding(self, modality: int, content: bytes) -> _Segment:
        position = len(self.tokens)
        self.embeddings.append(EmbeddingToken(position=position, modality=modality, content=content_hash(content)))
        self._silent([self.tokenizer.emb])
        return self

    def _silent(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.labels += [IGNORE] * len(tokens)

    def tokenized(self) -> TokenizedDocument:
        return TokenizedDocument(
            tokens=tuple(self.tokens), labels=tuple(self.labels), media=tuple(self.media), embeddings=tuple(self.embeddings)
        )


def content_hash(content: bytes) -> int:
    """63 bits, so that it fits int64 and is never negative."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") >> 1


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of `lengths` in bins of `capacity`: longest first, each into the fullest bin that still holds it.

    Ties go to the lower position and the older bin. Bins stand in the order in which they were opened.
    """
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, bin), sorted
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        length = lengths[position]
        assert length <= capacity, f"length {length} at {position} is over the capacity {capacity}"
        found = bisect_left(spaces, (length, 0))
        if found < len(spaces):
            space, number = spaces.pop(found)
            bins[number].append(position)
        else:
            space, number = capacity, len(bins)
            bins.append([position])
        insort(spaces, (space - length, number))
    return bins


def next_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of `lengths` in bins of `capacity`, in order: a bin ends before the first that it cannot hold."""
    bins: list[list[int]] = []
    space = -1
    for position, length in enumerate(lengths):
        assert length <= capacity, f"length {length} at {position} is over the capacity {capacity}"
        if length > space:
            bins.append([])
            space = capacity
        bins[-1].append(position)
        space -= length
    return bins


@dataclass(frozen=True, kw_only=True)
class PackEntry:
    """A document as a pack holds it."""

    ref: DocumentRef
    segments: Sequence[TokenizedDocument]


def collate(
    packs: Sequence[Sequence[PackEntry]],
    patches: UInt8[Tensor, "N patch_values"],
    *,
    grid: tuple[int, int],
    merge: int,
    pack_tokens: int,
    pad: int,
    state: LoaderState,
) -> PackedBatch:
    """The packs end to end, each padded to `pack_tokens`.

    `patches`: of all pictures, in the order of packs, documents, items; `grid` (rows, columns) of them a picture, of
    which `merge` x `merge` become one token.
    """
    batch = _Rows(len(packs) * pack_tokens, pad, grid[0] * grid[1] // merge**2)
    for number, pack in enumerate(packs):
        total = sum(len(segment.tokens) for entry in pack for segment in entry.segments)
        assert total <= pack_tokens, f"a pack holds {total} tokens, more than {pack_tokens}"
        batch.position = number * pack_tokens
        for entry in pack:
            batch.add(entry)
    per_image = grid[0] * grid[1]
    assert len(patches) == batch.items * per_image, f"{len(patches)} patches for {batch.items} pictures of {per_image}"
    images = MediaBatch(
        patches=patches,
        cu_seqlens=torch.arange(batch.items + 1) * per_image,
        grid=torch.tensor([1, *grid]).expand(batch.items, 3).contiguous(),
    )
    slots = torch.tensor(batch.slots, dtype=torch.int64).reshape(-1, 3).T.contiguous()
    return PackedBatch(
        **{name: torch.from_numpy(values) for name, values in batch.tokens.items()},
        images=images,
        slots=EmbeddingSlots(modality=slots[0], pair=slots[1], content=slots[2]),
        provenance=tuple(batch.provenance),
        state=state,
    )


class _Rows:
    """The per-token arrays of a batch in the making, and what they point at."""

    def __init__(self, length: int, pad: int, tokens_per_image: int):
        fills = {"tokens": pad, "labels": IGNORE, "position_ids": 0, "document_ids": NOTHING}
        fills |= {"media_index": NOTHING, "pool_index": NOTHING}
        self.tokens = {name: np.full(length, fill, dtype=np.int64) for name, fill in fills.items()}
        self.tokens_per_image = tokens_per_image
        self.position = 0
        self.segments = 0
        self.items = 0
        self.slots: list[tuple[int, int, int]] = []  # modality, pair, content
        self.provenance: list[DocumentRef] = []

    def add(self, entry: PackEntry) -> None:
        for segment in entry.segments:
            self._add_segment(segment)
        self.items += len({span.item for segment in entry.segments for span in segment.media})
        self.provenance.append(entry.ref)

    def _add_segment(self, segment: TokenizedDocument) -> None:
        start, length = self.position, len(segment.tokens)
        rows = slice(start, start + length)
        self.tokens["tokens"][rows] = segment.tokens
        self.tokens["labels"][rows] = segment.labels
        self.tokens["position_ids"][rows] = np.arange(length)
        self.tokens["document_ids"][rows] = self.segments
        for span in segment.media:
            assert span.length == self.tokens_per_image, f"a span of {span.length} slots, {self.tokens_per_image} a picture"
            first = (self.items + span.item) * self.tokens_per_image
            self.tokens["media_index"][start + span.start : start + span.start + span.length] = np.arange(
                first, first + span.length
            )
        for embedding in segment.embeddings:
            self.tokens["pool_index"][start + embedding.position] = len(self.slots)
            self.slots.append((embedding.modality, len(self.provenance), embedding.content))
        self.position += length
        self.segments += 1
