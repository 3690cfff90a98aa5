"""One source of a run: its documents in the order of the epochs, what each costs, and how a plan's slot is read.

Corpus, Tokenizer, Budget --Source--> draw, pieces: numbers for the plan, in the training process
                                      read: segments and encoded media for a slot, in a worker
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
from jaxtyping import Bool, Int

from mmpt.config import DataConfig
from mmpt.data.budget import Budget
from mmpt.data.corpus import Corpus
from mmpt.data.faults import BadMedia
from mmpt.data.mixture import Drawn, Slot
from mmpt.data.plan import Order, keyed_hash
from mmpt.data.segments import Run, document_lengths, piece_cost, split, tokenize, tokenize_piece
from mmpt.data.spec import MixturePart
from mmpt.data.tokens import Tokenizer
from mmpt.types import TEXT, Part, Text, TokenizedDocument, UserError

MAX_COST = 2**27
"""Tokens, or media rows, of one document."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A slot, read: its segments, and the media that they show, in the order of the document."""

    key: str
    seed: int  # of the augmentation of the document in this epoch
    segments: Sequence[TokenizedDocument]
    media: Sequence[tuple[int, Part]]  # number of the part within the document, part


class Source:
    """What the plan and the workers need of one source. Raises UserError for documents that no pack can hold."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, budget: Budget, part: MixturePart, data: DataConfig) -> None:
        self.corpus, self.tokenizer, self.budget, self.data = corpus, tokenizer, budget, data
        self.name, self.size = corpus.name, len(corpus)
        self.weight, self.max_epochs, self.on_exhausted = part.weight, part.max_epochs, part.on_exhausted
        self.order = Order(corpus.name, np.diff(corpus.starts), data.seed, corpus.spec.shards.shuffled_together)
        self.is_text: Bool[np.ndarray, " parts"] = corpus.parts["kind"] == TEXT
        tokens, rows = budget.media(corpus.parts)
        self._refuse_large_media(tokens, rows)
        self.tokens = np.where(self.is_text, corpus.token_counts(tokenizer), tokens).astype(np.int32)
        self.rows = rows.astype(np.int32)
        self.lengths = self._lengths(reverse=False)
        self.reversed_share = _reversed_share(corpus)
        self.reversed_lengths = self._lengths(reverse=True) if self.reversed_share else self.lengths
        sums = np.concatenate([[0], np.cumsum(self.rows, dtype=np.int64)])
        self.media_rows = self._bounded(np.diff(sums[corpus.first_part]))
        self._recent = _Recent(8)
        if not self.lengths.any():
            raise UserError(f"source {self.name}: none of its {self.size} documents can be used; see `mmpt data validate`")

    def _lengths(self, reverse: bool) -> Int[np.ndarray, " documents"]:
        return self._bounded(document_lengths(self.is_text, self.tokens.astype(np.int64), self.corpus.first_part, reverse))

    def _bounded(self, costs: Int[np.ndarray, " documents"]) -> Int[np.ndarray, " documents"]:
        """In half the memory. A document may show one clip a hundred thousand times."""
        if (largest := int(costs.max(initial=0))) > MAX_COST:
            key = self.corpus.key(int(costs.argmax()))
            raise UserError(
                f"source {self.name}: document {key} takes {largest:,} tokens or media rows; split it, or take it out"
            )
        return costs.astype(np.int32)

    def _refuse_large_media(self, tokens: Int[np.ndarray, " parts"], rows: Int[np.ndarray, " parts"]) -> None:
        limits = ("pack_tokens", tokens, self.data.pack_tokens), ("pack_media", rows, self.data.pack_media or MAX_COST)
        for name, costs, most in limits:
            if len(costs) and (largest := int(costs.max())) > most:
                document = int(np.searchsorted(self.corpus.first_part, int(costs.argmax()), side="right")) - 1
                raise UserError(
                    f"data.{name} = {most}: a medium of document {self.corpus.key(document)} of {self.name} takes {largest}; "
                    f"raise it, or lower the source's limits or the size that the model is given"
                )

    def draw(self, positions: Int[np.ndarray, " n"]) -> Drawn:
        """What stands at these positions of the stream, and what it costs."""
        epochs, documents = self.order(positions)
        return Drawn(epochs, documents, self.tokens_of(epochs, documents), self.media_rows[documents].astype(np.int64))

    def tokens_of(self, epochs: Int[np.ndarray, " n"], documents: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Of whole documents, in the orders that their templates have in these epochs."""
        if not self.reversed_share:
            return self.lengths[documents].astype(np.int64)
        lengths = np.where(self.is_reversed(epochs, documents), self.reversed_lengths[documents], self.lengths[documents])
        return lengths.astype(np.int64)

    def is_reversed(self, epochs: Int[np.ndarray, " n"], documents: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which template of a pair is drawn: a function of seed, source, epoch and document."""
        if not self.reversed_share:
            return np.zeros(len(documents), dtype=bool)
        key = np.uint64(keyed_hash("template", self.data.seed, self.name))
        mixed = (epochs.astype(np.uint64) << np.uint64(40)) ^ documents.astype(np.uint64) ^ key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finalizer
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) < self.reversed_share * 2.0**53

    def pieces(self, document: int, epoch: int) -> list[tuple[int, int]]:
        """Tokens and media rows of each piece of a document that is over a capacity."""
        is_text, tokens, rows = self._parts(document)
        return [piece_cost(piece, is_text, tokens, rows) for piece in self._runs(document)]

    def _parts(self, document: int) -> tuple[list[bool], list[int], list[int]]:
        parts = slice(self.corpus.first_part[document], self.corpus.first_part[document + 1])
        return self.is_text[parts].tolist(), self.tokens[parts].tolist(), self.rows[parts].tolist()

    def _runs(self, document: int) -> list[list[Run]]:
        return split(*self._parts(document), self.data.pack_tokens, self.data.pack_media)

    def is_split(self, document: int, length: int) -> bool:
        """Whether a document of `length` tokens goes in pieces."""
        return length > self.data.pack_tokens or bool(self.data.pack_media and self.media_rows[document] > self.data.pack_media)

    def has_media(self, modality: int) -> bool:
        """Whether any document has a part of it."""
        return bool((self.corpus.parts["kind"] == modality).any())

    def seed_of(self, key: str, epoch: int) -> int:
        """Of the augmentation of a document."""
        return keyed_hash(self.data.seed, epoch, self.name, key)

    def read(self, slot: Slot) -> Reading:
        """What stands in a slot. Raises BadMedia for a document that cannot be read, or is not what was planned."""
        _, slots, _ = self._parts(slot.document)
        document = self.corpus.document(slot.document)
        place = np.array([slot.epoch]), np.array([slot.document])
        if self.is_split(slot.document, int(self.tokens_of(*place)[0])):
            ids = self._recent.of(slot.document)
            piece = self._runs(slot.document)[slot.piece]
            for run in piece:
                if run.part not in ids and isinstance(part := document.parts[run.part], Text):
                    ids[run.part] = self.tokenizer.encode(part.text)
            segments = tokenize_piece(document.parts, slots, piece, ids, self.tokenizer)
            shown = {run.part for run in piece}
        else:
            segments = tokenize(document.parts, slots, self.tokenizer, reverse=bool(self.is_reversed(*place)[0]))
            shown = set(range(len(slots)))
        made = sum(len(segment.tokens) for segment in segments)
        if made != slot.tokens:
            raise BadMedia("length", f"{made} tokens, where {slot.tokens} were planned")
        media = [
            (number, part)
            for number, part in enumerate(document.parts)
            if number in shown and slots[number] and not isinstance(part, Text)
        ]
        return Reading(key=document.key, seed=self.seed_of(document.key, slot.epoch), segments=segments, media=media)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Everything that decides what stands where in the source's stream, by name."""
        parts = {
            "": self.corpus.fingerprint,
            " tokens": blake2b(self.tokens, digest_size=8).hexdigest(),
            " limits and sizes": self.budget.signature,
            " templates": repr(self.reversed_share),
            " shards.block": str(self.corpus.spec.shards.shuffled_together),
            " max_epochs": str(self.max_epochs),
            " on_exhausted": self.on_exhausted,
        }
        return {f"source {self.name}{name}": value for name, value in parts.items()}


class _Recent:
    """Tokens of the texts, by part, of the last few documents that go in pieces: each piece is read by itself."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: dict[int, dict[int, list[int]]] = {}

    def of(self, document: int) -> dict[int, list[int]]:
        found = self.kept.pop(document, {})
        self.kept = dict([*self.kept.items(), (document, found)][-self.size :])
        return found


def _reversed_share(corpus: Corpus) -> float:
    """How often the text of a pair stands before its picture."""
    templates = corpus.spec.templates if corpus.spec.format == "pairs" else ()
    whole = sum(template.p for template in templates)
    return sum(template.p for template in templates if template.order[0] == "text") / whole if whole else 0.0
