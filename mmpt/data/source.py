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
from mmpt.data.chance import fractions, mixed
from mmpt.data.corpus import Corpus
from mmpt.data.faults import BadMedia
from mmpt.data.form import Form, refuse_unfit
from mmpt.data.mixture import Drawn, Slot
from mmpt.data.pieces import Costs, Run, piece_cost, split
from mmpt.data.plan import Order, keyed_hash
from mmpt.data.segments import Lengths, Segmenter, document_lengths
from mmpt.data.spec import MixturePart
from mmpt.data.tokens import Tokenizer
from mmpt.types import AUDIO, IMAGE, MODALITIES, SPAN, TASKS, TEXT, VIDEO, Part, Text, TokenizedDocument, UserError

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
    """What the plan and the workers need of one source. Raises UserError for what model, tokenizer or packs cannot hold."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, budget: Budget, part: MixturePart, data: DataConfig) -> None:
        self.corpus, self.tokenizer, self.budget, self.data = corpus, tokenizer, budget, data
        self.name, self.size = part.source_name(corpus.name), len(corpus)
        self.weight, self.max_epochs, self.on_exhausted = part.weight, part.max_epochs, part.on_exhausted
        self.form = Form.of(budget.model, data.pack_tokens, TASKS.index(part.task), len(tokenizer.sentinels))
        refuse_unfit(self.form, tokenizer, self.name)
        self.segmenter = Segmenter(self.form, tokenizer)
        self.order = Order(self.name, np.diff(corpus.starts), data.seed, corpus.spec.shards.shuffled_together)
        self.kind: Int[np.ndarray, " parts"] = np.ascontiguousarray(corpus.parts["kind"])
        self._refuse_unread_media()
        tokens, rows = budget.media(corpus.parts)
        if not self.form.fusion:
            rows = self._first_media(rows)
        self._refuse_large_media(tokens, rows)
        self.tokens = np.where(self.kind == TEXT, corpus.token_counts(tokenizer), tokens).astype(np.int32)
        self.rows = rows.astype(np.int32)
        sums = np.concatenate([[0], np.cumsum(self.rows, dtype=np.int64)])
        self.media_rows = self._bounded(np.diff(sums[corpus.first_part]))
        self._refuse_media_apart()
        found = self._lengths(reverse=False)
        self.reversed_share = _reversed_share(corpus)
        turned = self._lengths(reverse=True) if self.reversed_share else found
        self.lengths, self.reversed_lengths = self._bounded(found.total), self._bounded(turned.total)
        self.in_pieces = self._in_pieces(np.maximum(found.row, turned.row))
        self._recent = _Recent(8)
        if not self.lengths.any():
            raise UserError(f"source {self.name}: none of its {self.size} documents can be used; see `mmpt data validate`")

    @property
    def _costs(self) -> Costs:
        return Costs(self.kind, self.corpus.parts["predict"], self.tokens, self.rows)

    def _lengths(self, reverse: bool) -> Lengths:
        costs = self._costs._replace(tokens=self.tokens.astype(np.int64))
        return document_lengths(self.form, costs, self.corpus.first_part, reverse)

    def _in_pieces(self, rows: Int[np.ndarray, " documents"]) -> Bool[np.ndarray, " documents"] | None:
        """Documents that go in pieces though a pack would hold them: one of their segments would be too long. None: no such."""
        found = rows > self.form.longest if self.form.longest < self.data.pack_tokens else np.zeros(self.size, dtype=bool)
        if self.form.task == SPAN:  # one that wants more sentinels than there are
            most, _ = self.form.widest(is_pair=False, predict=True)
            wide = np.flatnonzero((self.kind == TEXT) & self.corpus.parts["predict"] & (self.tokens > most))
            found[np.searchsorted(self.corpus.first_part, wide, side="right") - 1] = True
        return found if found.any() else None

    def _first_media(self, rows: Int[np.ndarray, " parts"]) -> Int[np.ndarray, " parts"]:
        """Without fusion only the first medium of each modality of a document is read: nothing shows the others."""
        document = np.repeat(np.arange(self.size), np.diff(self.corpus.first_part))
        shown = np.flatnonzero((self.kind != TEXT) & (rows > 0))
        _, first = np.unique(document[shown] * len(MODALITIES) + self.kind[shown], return_index=True)
        kept = np.zeros_like(rows)
        kept[shown[first]] = rows[shown[first]]
        return kept

    def _bounded(self, costs: Int[np.ndarray, " documents"]) -> Int[np.ndarray, " documents"]:
        """In half the memory. A document may show one clip a hundred thousand times."""
        if (largest := int(costs.max(initial=0))) > MAX_COST:
            key = self.corpus.key(int(costs.argmax()))
            raise UserError(
                f"source {self.name}: document {key} takes {largest:,} tokens or media rows; split it, or take it out"
            )
        return costs.astype(np.int32)

    def _refuse_unread_media(self) -> None:
        for modality in (IMAGE, AUDIO, VIDEO):
            if not self.budget.reads(modality) and self.has_media(modality):
                name = MODALITIES[modality]
                raise UserError(
                    f"source {self.name}: it has parts of modality {name}, and the model has no encoder for them; "
                    f"give model.{name}, or take the source out"
                )

    def _refuse_large_media(self, tokens: Int[np.ndarray, " parts"], rows: Int[np.ndarray, " parts"]) -> None:
        is_pack = self.form.longest == self.data.pack_tokens
        longest = "data.pack_tokens" if is_pack else "model.transformer.max_positions", tokens, self.form.longest
        for name, costs, most in (longest, ("data.pack_media", rows, self.data.pack_media or MAX_COST)):
            if len(costs) and (largest := int(costs.max())) > most:
                document = int(np.searchsorted(self.corpus.first_part, int(costs.argmax()), side="right")) - 1
                raise UserError(
                    f"{name} = {most}: a medium of document {self.corpus.key(document)} of {self.name} takes {largest}; "
                    f"raise it, or lower the source's limits or the size that the model is given"
                )

    def _refuse_media_apart(self) -> None:
        """Without fusion no piece of a document is of use: what is contrasted must lie in one pack."""
        most, largest = self.data.pack_media or MAX_COST, int(self.media_rows.max(initial=0))
        if not self.form.fusion and largest > most:
            key = self.corpus.key(int(self.media_rows.argmax()))
            raise UserError(
                f"data.pack_media = {most}: the media of document {key} of {self.name} take {largest} together, and with "
                f"model.fusion: false they must lie in one pack; raise it"
            )

    def draw(self, positions: Int[np.ndarray, " n"]) -> Drawn:
        """What stands at these positions of the stream, and what it costs."""
        epochs, documents = self.order(positions)
        in_pieces = None if self.in_pieces is None else self.in_pieces[documents]
        return Drawn(epochs, documents, self.tokens_of(epochs, documents), self.media_rows[documents].astype(np.int64), in_pieces)

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
        places = (epochs.astype(np.uint64) << np.uint64(40)) ^ documents.astype(np.uint64) ^ key
        return fractions(mixed(places)) < self.reversed_share

    def pieces(self, document: int, epoch: int) -> list[tuple[int, int]]:
        """Tokens and media rows of each piece of a document that is over a capacity."""
        costs = self._costs_of(document)
        return [piece_cost(self.form, costs, piece) for piece in split(self.form, costs, self.data.pack_media)]

    def _costs_of(self, document: int) -> Costs:
        parts = slice(self.corpus.first_part[document], self.corpus.first_part[document + 1])
        return Costs(*(column[parts].tolist() for column in self._costs))

    def is_split(self, document: int, length: int) -> bool:
        """Whether a document of `length` tokens goes in pieces."""
        is_over = length > self.data.pack_tokens or bool(self.in_pieces is not None and self.in_pieces[document])
        return is_over or bool(self.data.pack_media and self.media_rows[document] > self.data.pack_media)

    def has_media(self, modality: int) -> bool:
        """Whether any document has a part of it."""
        return bool((self.kind == modality).any())

    def seed_of(self, key: str, epoch: int) -> int:
        """Of all chance in a document: its augmentation, and what its task hides."""
        return keyed_hash(self.data.seed, epoch, self.name, key)

    def read(self, slot: Slot) -> Reading:
        """What stands in a slot. Raises BadMedia for a document that cannot be read, or is not what was planned."""
        costs = self._costs_of(slot.document)
        document = self.corpus.document(slot.document)
        seed = self.seed_of(document.key, slot.epoch)
        place = np.array([slot.epoch]), np.array([slot.document])
        if self.is_split(slot.document, int(self.tokens_of(*place)[0])):
            piece = split(self.form, costs, self.data.pack_media)[slot.piece]
            ids = self._words(slot.document, document.parts, piece)
            segments = self.segmenter.piece(document.parts, costs, piece, ids, keyed_hash(seed, "piece", slot.piece))
            shown = {run.part for run in piece}
        else:
            segments = self.segmenter.document(document.parts, costs, seed, reverse=bool(self.is_reversed(*place)[0]))
            shown = set(range(len(document.parts)))
        made = sum(len(segment.tokens) for segment in segments)
        if made != slot.tokens:
            raise BadMedia("length", f"{made} tokens, where {slot.tokens} were planned")
        media = [
            (number, part)
            for number, part in enumerate(document.parts)
            if number in shown and costs.rows[number] and not isinstance(part, Text)
        ]
        return Reading(key=document.key, seed=seed, segments=segments, media=media)

    def _words(self, document: int, parts: Sequence[Part], piece: Sequence[Run]) -> dict[int, list[int]]:
        """Words of the texts of a piece, by part; those of the pieces before it may be among them."""
        ids = self._recent.of(document)
        for run in piece:
            if run.part not in ids and isinstance(part := parts[run.part], Text):
                ids[run.part] = self.tokenizer.encode(part.text)
        return ids

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Everything that decides what stands where in the source's stream, by name."""
        parts = {
            "": self.corpus.fingerprint,
            " tokens": blake2b(self.tokens, digest_size=8).hexdigest(),
            " task and form": repr(self.form),
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
