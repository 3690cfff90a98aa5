"""How well a model says the texts of a split: cross-entropy of every predicted token, given what stands before it.

spec or mixture, split --sequential_batches--> batches --model--> output_hidden --token_losses--> nats of each labelled token
   --> Language of each source --> runs/NAME/eval/language-<spec>-<split>.json
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import RunConfig
from mmpt.evaluate.embed import evaluating
from mmpt.evaluate.results import specs_with
from mmpt.evaluate.split import HeldOut
from mmpt.types import IGNORE, Document, ModelOutput, Text, UserError

CHUNK = 1024  # positions whose logits exist at once

PROTOCOL = (
    "Every token of every text to be predicted, <eos> among them, counted once; given all that stands before it in its document, "
    "up to the pack's length: a document that is longer goes in pieces, and each begins anew. Perplexity is exp(nats per token); "
    "bits per byte divide by the bytes of these texts in UTF-8, and so compare models of different tokenizers."
)


@dataclass(frozen=True, kw_only=True)
class Language:
    """Sums over the texts of a split."""

    nats: float
    tokens: int
    bytes: int  # of the texts that the tokens spell, in UTF-8
    documents: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: Language) -> Language:
        return Language(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            documents=self.documents + other.documents,
        )

    def to_json(self) -> dict[str, float]:
        averages = ("nats_per_token", "perplexity", "bits_per_byte")
        counts = ("tokens", "bytes", "documents")
        return {name: getattr(self, name) for name in (*averages, *counts)}


def evaluate_language(
    model: nn.Module, config: RunConfig, spec: str | Path, split: str, device: torch.device | str
) -> dict[str, Language]:
    """Of every source of a spec or mixture that has the split and texts to predict in it, by name.

    Precision is the caller's (autocast). Raises UserError for a model that sees what it is to say, and where no source is left.
    """
    if not config.model.fusion:
        raise UserError("model.fusion is false: towers alone do not predict tokens; there is `mmpt eval retrieval`")
    if config.model.transformer.mask == "bidirectional":
        raise UserError("model.transformer.mask is bidirectional: the model sees the tokens that it would be asked for")
    sources = [HeldOut(config, source.path, split) for source in specs_with(spec, split)]
    if not any(source.predicts for source in sources):
        raise UserError(f"spec {spec}, split {split!r}: no document has a text to predict")
    return {source.corpus.name: _measure(model, source, device) for source in sources if source.predicts}


def _measure(model: nn.Module, held_out: HeldOut, device: torch.device | str) -> Language:
    total = torch.zeros((), dtype=torch.float64)
    tokens, seen = 0, set()
    with evaluating(model):
        for batch in held_out.batches():
            losses = token_losses(model(batch.to(device)), batch.labels.to(device))
            total += losses.double().sum().cpu()
            tokens += len(losses)
            seen.update(ref.key for ref in batch.provenance)
    spelled = sum(len(text.encode()) for key in seen for text in _predicted(held_out.document(key)))
    return Language(nats=total.item(), tokens=tokens, bytes=spelled, documents=len(seen))


def _predicted(document: Document) -> Iterator[str]:
    return (part.text for part in document.parts if isinstance(part, Text) and part.predict)


def token_losses(output: ModelOutput, labels: Int[Tensor, " T"]) -> Float[Tensor, " n"]:
    """-log p(label) in nats, in fp32, of every position whose label is not IGNORE; logits are made a chunk at a time."""
    labelled = (labels != IGNORE).nonzero().flatten()
    losses = [
        F.cross_entropy(
            F.linear(output.output_hidden[at], output.output_weight, output.output_bias).float(), labels[at], reduction="none"
        )
        for at in labelled.split(CHUNK)
    ]
    return torch.cat(losses)


def language_json(found: Mapping[str, Language]) -> dict[str, Any]:
    """All sources together, and each by itself."""
    sources = {name: one.to_json() for name, one in found.items()}
    return {**_together(found).to_json(), "sources": sources, "protocol": PROTOCOL}


def language_table(found: Mapping[str, Language]) -> Table:
    """A row a source, for a terminal; one for all of them where there are several."""
    table = Table(title="Language")
    table.add_column("source")
    for name in ("nats per token", "perplexity", "bits per byte", "tokens", "documents"):
        table.add_column(name, justify="right")
    rows = dict(found) if len(found) == 1 else {**found, "all": _together(found)}
    for name, one in rows.items():
        averages = (f"{one.nats_per_token:.3f}", f"{one.perplexity:.4g}", f"{one.bits_per_byte:.3f}")
        table.add_row(name, *averages, f"{one.tokens:,}", f"{one.documents:,}")
    return table


def _together(found: Mapping[str, Language]) -> Language:
    first, *others = found.values()
    return sum(others, start=first)
