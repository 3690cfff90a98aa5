"""Zero-shot retrieval of a model on a split of a spec: what `mmpt eval retrieval` runs, writes and prints.

spec, split -> HeldOut -> embed -> retrieval -> runs/NAME/eval/retrieval-<spec>-<split>-<item>-<level>.json
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import nn

from mmpt.config import RunConfig
from mmpt.evaluate.embed import Embedded, Level, embed, embed_texts
from mmpt.evaluate.retrieval import KS, PROTOCOL, Direction, RetrievalResult, retrieval
from mmpt.evaluate.split import WORDS, HeldOut, ItemName
from mmpt.types import MODALITIES, Text, UserError

Captions = Literal["first", "all"]
CAPTIONS: dict[Captions, str] = {
    "first": "Of each document with an item and a text, the first of each.",
    "all": "Of each document with an item and a text, the first item, and every line of every text as a caption of it.",
}


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A result, and what was ranked."""

    result: RetrievalResult
    embedded: Embedded
    item: ItemName
    level: Level
    captions: Captions
    left_out: int = 0  # documents with an item and a text, but no embeddings: longer than a pack, they go in pieces

    @property
    def variant(self) -> tuple[str, ...]:
        return self.item, self.level, *(() if self.captions == "first" else (self.captions,))

    def to_json(self) -> dict[str, Any]:
        named = {"item": self.item, "level": self.level, "captions": self.captions, "left_out": self.left_out}
        return {**named, **self.result.to_json(), "protocol": f"{CAPTIONS[self.captions]} {PROTOCOL}"}


def evaluate_retrieval(
    model: nn.Module,
    config: RunConfig,
    spec: str | Path,
    split: str,
    device: torch.device | str,
    *,
    level: Level | None = None,
    item: ItemName | None = None,
    captions: Captions = "first",
) -> Retrieval:
    """Retrieve among the documents of a split that have an item and a text, with the run's tokenizer.

    Without `level`, the model's first; without `item`, the modality that the split has. Precision is the caller's (autocast) for
    the model; scores are fp32. Raises UserError for a split that cannot be ranked.
    """
    held_out = HeldOut(config, spec, split)
    level, modality = held_out.level(level), held_out.item(item)
    try:
        embedded = embed(model, held_out.batches(), device, level=level, item=modality)
        if captions == "all":
            embedded = _with_all_captions(embedded, model, held_out, device, level)
        result = retrieval(embedded.items, embedded.texts, embedded.owner)
    except ValueError as error:
        raise UserError(f"retrieval on {spec}, split {split!r}: {error}") from error
    left_out = held_out.pairs(modality) - len(embedded.keys)
    return Retrieval(
        result=result, embedded=embedded, item=MODALITIES[modality], level=level, captions=captions, left_out=left_out
    )


def _with_all_captions(
    embedded: Embedded, model: nn.Module, held_out: HeldOut, device: torch.device | str, level: Level
) -> Embedded:
    """Every line of every text in place of the first texts: corpora with several captions an item write them either way."""
    texts, owners = [], []
    for row, key in enumerate(embedded.keys):
        parts = [part.text for part in held_out.document(key).parts if isinstance(part, Text)]
        lines = [line.strip() for text in parts for line in text.splitlines() if line.strip()]
        texts += lines
        owners += [row] * len(lines)
    vectors = embed_texts(model, texts, held_out.tokenizer, held_out.config, device, level=level)
    return replace(embedded, texts=vectors, owner=torch.tensor(owners))


def retrieval_table(found: Retrieval) -> Table:
    """Both directions, with chance below each, for a terminal."""
    result, item = found.result, WORDS[found.item]
    caption = f"{found.left_out} documents left out: longer than data.pack_tokens" if found.left_out else None
    table = Table(title=f"Zero-shot retrieval ({found.level}), {result.items} {item}s and {result.texts} texts", caption=caption)
    table.add_column("direction")
    for name in [*(f"R@{k}" for k in KS), "median rank", "mAP@10"]:
        table.add_column(name, justify="right")
    _add_rows(table, f"{item} to text", result.item_to_text)
    _add_rows(table, f"text to {item}", result.text_to_item)
    return table


def _add_rows(table: Table, name: str, direction: Direction) -> None:
    won = direction.ties_won
    table.add_row(name, *(f"{won.recall[k]:.1%}" for k in KS), f"{won.median_rank:g}", f"{won.map_10:.3f}")
    table.add_row("  chance", *(f"{direction.chance[k]:.1%}" for k in KS), "", "", style="dim")
    if direction.ties_lost != won:
        lost = direction.ties_lost
        table.add_row("  ties lost", *(f"{lost.recall[k]:.1%}" for k in KS), f"{lost.median_rank:g}", f"{lost.map_10:.3f}")
