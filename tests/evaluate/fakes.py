"""Models whose output is known beforehand, and batches made by hand."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.data.segments import content_hash
from mmpt.data.shards import ShardWriter
from mmpt.types import (
    DocumentRef,
    EmbeddingSlots,
    LoaderState,
    LoadReport,
    MediaBatch,
    PackedBatch,
    PlanCursor,
    Segments,
)

STATE = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
NO_MEDIA = MediaBatch(
    values=torch.zeros(0, 3, dtype=torch.uint8),
    cu_seqlens=torch.zeros(1, dtype=torch.long),
    grid=torch.zeros(0, 3).long(),
    times=torch.zeros(0),
)


def shade(number: int) -> bytes:
    """A PNG of one of 256 shades of gray, and as many sizes."""
    buffer = io.BytesIO()
    PIL.Image.new("L", (20 + number % 7, 20), number % 256).save(buffer, "PNG")
    return buffer.getvalue()


def write_corpus(folder: Path, documents: Sequence[tuple[Sequence[str | bytes], Mapping[str, Any]]], name: str = "small") -> Path:
    """A spec with one split, `val`: each document its parts, texts and PNGs, and its meta; keys are d0, d1, ..."""
    with ShardWriter(folder, name, samples_per_shard=4) as writer:
        for number, (contents, meta) in enumerate(documents):
            parts, files = [], {}
            for place, content in enumerate(contents):
                if isinstance(content, str):
                    parts.append({"type": "text", "text": content})
                    continue
                file, size = f"{place:03d}.png", PIL.Image.open(io.BytesIO(content)).size
                parts.append({"type": "image", "file": file, "wh": list(size), "crc32": zlib.crc32(content)})
                files[file] = content
            writer.write(f"d{number}", {"v": 1, "id": f"d{number}", "parts": parts, "meta": dict(meta)}, files)
    shards = f'{{root: ".", pattern: "{name}-{{00000..{len(writer.shards) - 1:05d}}}.tar"}}'
    spec = folder / f"{name}.yaml"
    spec.write_text(f'version: 1\nname: {name}\nformat: interleaved\nshards: {shards}\nsplit: {{val: ":"}}\n')
    return spec


def content_of(part: str | bytes) -> int:
    """The number by which a batch knows a text or a picture."""
    return content_hash(part.encode() if isinstance(part, str) else part, *([] if isinstance(part, str) else [b""]))


def slots_only(keys: str, slots: list[tuple[int, int, int]]) -> PackedBatch:
    """A batch of documents `keys` with embedding slots (modality, document, content) and nothing else in it."""
    modality, pair, content = torch.tensor(slots).T
    nothing = torch.zeros(0, dtype=torch.long)
    return PackedBatch(
        tokens=nothing,
        labels=nothing,
        position_ids=nothing[None],
        token_types=nothing,
        document_ids=nothing,
        media_index=nothing,
        pool_index=nothing,
        span_ids=nothing,
        images=NO_MEDIA,
        audios=NO_MEDIA,
        videos=NO_MEDIA,
        slots=EmbeddingSlots(modality=modality, item=torch.zeros_like(pair), pair=pair, content=content),
        segments=Segments(document=nothing, task=nothing, next_sentence=nothing, pack=nothing, first=nothing),
        packs=1,
        kinds=torch.zeros(len(keys), dtype=torch.long),
        provenance=tuple(DocumentRef(source="hand", key=key, epoch=0, piece=0, pack=0, position=0, seed=0) for key in keys),
        state=STATE,
        report=LoadReport(milliseconds={}, tokens={}, faults=()),
    )


class Embedder(nn.Module):
    """A slot's embedding is a function of its content and the level alone; the content may be `told` beforehand."""

    LEVELS = ("backbone", "tower")

    def __init__(self, told: Mapping[int, Tensor] | None = None, width: int = 16) -> None:
        super().__init__()
        self.told, self.width = told or {}, width

    def vector(self, content: int, level: str) -> Tensor:
        if content in self.told:
            return self.told[content]
        generator = torch.Generator().manual_seed((content + self.LEVELS.index(level)) % 2**63)
        return F.normalize(torch.randn(self.width, generator=generator), dim=0)

    def forward(self, batch: PackedBatch) -> SimpleNamespace:
        assert not self.training and not torch.is_grad_enabled()
        contents = batch.slots.content.tolist()
        vectors = {
            level: torch.stack([self.vector(content, level) for content in contents]) if contents else torch.zeros(0, self.width)
            for level in self.LEVELS
        }
        return SimpleNamespace(embeddings={level: SimpleNamespace(vectors=found) for level, found in vectors.items()})


class Speller(nn.Module):
    """Says the next token by the one that it stands at; with `blind`, by none at all."""

    def __init__(self, vocabulary: int, width: int = 6, blind: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(1 if blind else vocabulary, width, generator=generator).expand(vocabulary, -1)
        self.weight = torch.randn(vocabulary, width, generator=generator)
        self.bias = torch.randn(vocabulary, generator=generator)

    def forward(self, batch: PackedBatch) -> SimpleNamespace:
        assert not self.training and not torch.is_grad_enabled()
        return SimpleNamespace(output_hidden=self.rows[batch.tokens], output_weight=self.weight, output_bias=self.bias)
