"""What a model finds and says, picture by picture: the examples that the report shows.

Embeddings + Corpus --some pictures, some texts, drawn at random--> the nearest of the other side, captions -> ReportExamples
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torchvision.io import encode_png

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.media.images import composite, decode_image
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import Embeddings, captions
from mmpt.types import Document, Image, Text

THUMBNAIL = 96  # pixels; shown at half of that, sharp on a dense screen


@dataclass(frozen=True, kw_only=True)
class Found:
    """One candidate, best first in its list."""

    name: str
    picture: str  # data URI
    right: bool


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query, the candidates found for it, and the rank of the right one (from 1)."""

    name: str
    picture: str  # data URI
    found: tuple[Found, ...]
    rank: int
    caption: str = ""  # what the model wrote for the picture


@dataclass(frozen=True, kw_only=True)
class ReportExamples:
    source: str  # spec and split that the examples were drawn from
    pictures: tuple[Example, ...]  # picture -> names
    names: tuple[Example, ...]  # name -> pictures


def gallery(
    model: nn.Module,
    config: RunConfig,
    corpus: Corpus,
    split: str,
    embeddings: Embeddings,
    device: torch.device | str,
    count: int = 24,
    top: int = 5,
) -> ReportExamples:
    """Draw `count` pictures and `count` names of a split at random, the same ones every time, and see what the model finds.

    `embeddings` are those of the whole split, from `evaluate_retrieval`.
    """
    shelf = _Shelf(corpus, embeddings)
    owner, everything = embeddings.owner, torch.arange(len(embeddings.items))
    generator = torch.Generator().manual_seed(0)
    items = torch.randperm(len(embeddings.items), generator=generator)[:count].tolist()
    texts = torch.randperm(len(embeddings.texts), generator=generator)[:count].tolist()
    tokenizer = Tokenizer.load(config.data.tokenizer)
    images = torch.cat([shelf.pixels(item, config.model.image.size) for item in items])
    written = captions(model, tokenizer, images, config.model.image, device)
    pictures = tuple(
        _example(shelf, item, embeddings.texts @ embeddings.items[item], owner, top, caption)
        for item, caption in zip(items, written, strict=True)
    )
    names = tuple(_example(shelf, int(owner[text]), embeddings.items @ embeddings.texts[text], everything, top) for text in texts)
    return ReportExamples(source=f"{corpus.name}, split {split}", pictures=pictures, names=names)


def _example(
    shelf: _Shelf, item: int, scores: Float[Tensor, " C"], candidates: Int[Tensor, " C"], top: int, caption: str = ""
) -> Example:
    """`candidates` are the items that the scored names or pictures belong to; those of `item` itself are right."""
    best = candidates[scores.argsort(descending=True, stable=True)[:top]].tolist()
    wrong = scores[candidates != item]
    return Example(
        name=shelf.name(item),
        picture=shelf.thumbnail(item),
        found=tuple(Found(name=shelf.name(i), picture=shelf.thumbnail(i), right=i == item) for i in best),
        rank=1 + int((wrong > scores[candidates == item].max()).sum()),
        caption=caption,
    )


class _Shelf:
    """The documents behind the rows of `Embeddings.items`: their pictures and names, each read once."""

    def __init__(self, corpus: Corpus, embeddings: Embeddings) -> None:
        self.corpus = corpus
        self.embeddings = embeddings
        self.document = lru_cache(maxsize=None)(self._document)
        self.thumbnail = lru_cache(maxsize=None)(self._thumbnail)

    def name(self, item: int) -> str:
        return next(part.text for part in self.document(item).parts if isinstance(part, Text))

    def pixels(self, item: int, size: int) -> UInt8[Tensor, "1 3 size size"]:
        """The first picture of the document, on white, as the model saw it."""
        picture = next(part for part in self.document(item).parts if isinstance(part, Image))
        return composite(decode_image(picture.data, size, size)[None])

    def _thumbnail(self, item: int) -> str:
        png = encode_png(self.pixels(item, THUMBNAIL)[0]).numpy().tobytes()
        return "data:image/png;base64," + base64.b64encode(png).decode()

    def _document(self, item: int) -> Document:
        document = self.corpus.document(int(self.embeddings.documents[item]))
        assert document.key == self.embeddings.keys[item], f"{document.key} is not {self.embeddings.keys[item]}"
        return document
