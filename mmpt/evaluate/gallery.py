"""What a model finds and says, picture by picture: the examples that the report shows.

Embedded + HeldOut --some pictures, some texts, drawn at random--> the nearest of the other side, captions -> ReportExamples
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.io import encode_png

from mmpt.config import AugmentConfig
from mmpt.data.budget import Budget
from mmpt.data.collate import Item
from mmpt.data.decode import finish_pictures, pixels
from mmpt.data.media.images import composite, decode_image
from mmpt.evaluate.captions import captions
from mmpt.evaluate.embed import Embedded
from mmpt.evaluate.split import HeldOut
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
    caption: str | None = None  # what the model wrote for the picture; none by a model that does not write


@dataclass(frozen=True, kw_only=True)
class ReportExamples:
    source: str  # spec and split that the examples were drawn from
    pictures: tuple[Example, ...]  # picture -> names
    names: tuple[Example, ...]  # name -> pictures


def gallery(
    model: nn.Module, held_out: HeldOut, embedded: Embedded, device: torch.device | str, count: int = 24, top: int = 5
) -> ReportExamples:
    """Draw `count` pictures and `count` names of a split at random, the same ones every time, and see what the model finds.

    `embedded` is the whole split, its pictures and the first text of each, from `evaluate_retrieval`.
    """
    shelf = _Shelf(held_out, embedded)
    owner, everything = embedded.owner, torch.arange(len(embedded.items))
    generator = torch.Generator().manual_seed(0)
    items = torch.randperm(len(embedded.items), generator=generator)[:count].tolist()
    texts = torch.randperm(len(embedded.texts), generator=generator)[:count].tolist()
    pictures = tuple(
        _example(shelf, item, embedded.texts @ embedded.items[item], owner, top, caption)
        for item, caption in zip(items, _written(model, shelf, items, device), strict=True)
    )
    names = tuple(_example(shelf, int(owner[text]), embedded.items @ embedded.texts[text], everything, top) for text in texts)
    return ReportExamples(source=f"{held_out.corpus.name}, split {held_out.split}", pictures=pictures, names=names)


def _written(model: nn.Module, shelf: _Shelf, items: list[int], device: torch.device | str) -> list[str] | list[None]:
    """Captions by a model that was taught to go on behind a picture."""
    config = shelf.held_out.config
    if not config.model.fusion or config.model.transformer.mask == "bidirectional":
        return [None] * len(items)
    return captions(model, shelf.held_out.tokenizer, [shelf.item(item) for item in items], config.model, device)


def _example(
    shelf: _Shelf, item: int, scores: Float[Tensor, " C"], candidates: Int[Tensor, " C"], top: int, caption: str | None = None
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
    """The documents behind the rows of `Embedded.items`: their pictures and names, each read once."""

    def __init__(self, held_out: HeldOut, embedded: Embedded) -> None:
        self.held_out, self.embedded = held_out, embedded
        self.budget = Budget(held_out.config.model, held_out.corpus.spec)
        self.document = lru_cache(maxsize=None)(self._document)
        self.thumbnail = lru_cache(maxsize=None)(self._thumbnail)

    def name(self, item: int) -> str:
        return next(part.text for part in self.document(item).parts if isinstance(part, Text))

    def item(self, item: int) -> Item:
        """The picture as the model sees it, unchanged on white."""
        decoded = pixels(self._picture(item), self.budget, seed=0)
        return finish_pictures([decoded], self.held_out.config.model.image.patch, AugmentConfig())[0]

    def _picture(self, item: int) -> Image:
        """The first that the source's limits let in: that is the one which was embedded."""
        least = self.budget.spec.image.min_side
        images = (part for part in self.document(item).parts if isinstance(part, Image))
        return next(image for image in images if min(image.width, image.height) >= least)

    def _thumbnail(self, item: int) -> str:
        square = composite(decode_image(self._picture(item).data, THUMBNAIL, THUMBNAIL)[None])
        png = encode_png(square[0]).numpy().tobytes()
        return "data:image/png;base64," + base64.b64encode(png).decode()

    def _document(self, item: int) -> Document:
        return self.held_out.document(self.embedded.keys[item])
