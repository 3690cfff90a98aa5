"""What a model and a task make of documents: everything that decides their segments beside the parts and the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from mmpt.config import ModelConfig
from mmpt.data.spans import added, counts
from mmpt.data.tokens import Tokenizer
from mmpt.types import MASKED, NEXT_TOKEN, SPAN, TASKS, UserError

SHORTEST = 8
"""Tokens of a segment, at least: a text that goes in pieces has some of its words in each."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """Lengths are functions of this and the index alone, so plans are; `repr` is part of a run's fingerprint."""

    longest: int  # tokens of a segment
    task: int = NEXT_TOKEN
    fusion: bool = True  # whether media stand in rows; else a document is one text, and media beside it
    contrasts: bool = True  # whether the first part of each modality is embedded
    is_causal: bool = True  # whether no token sees what follows it, but for those of its own medium
    mean: bool = False  # whether an embedding is of all tokens of its part; else of <emb>
    pairs: bool = False  # whether a document of texts alone becomes two texts in a row
    axes: int = 1  # of positions
    sentinels: int = 0

    @classmethod
    def of(cls, model: ModelConfig, pack_tokens: int, task: int = NEXT_TOKEN, sentinels: int = 0) -> Form:
        """`sentinels`: how many the tokenizer has."""
        transformer = model.transformer
        return cls(
            longest=min(pack_tokens, transformer.max_positions or pack_tokens),
            task=task,
            fusion=model.fusion,
            contrasts=bool(model.levels),
            is_causal=transformer.mask != "bidirectional",
            mean=model.pool == "mean",
            pairs=task == MASKED and model.head == "bert",
            axes=3 if transformer.rope_sections else 1,
            sentinels=sentinels if task == SPAN else 0,
        )

    def text_tokens(self, words: Int[np.ndarray, " n"], predict: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Tokens that whole texts of so many words take in a row that is no pair."""
        return words + 2 + (predict * added(words) if self.task == SPAN else 0)

    # Of one document, for which the plan is asked piece by piece.

    def is_pair(self, rows: Sequence[int]) -> bool:
        """Whether a document whose parts have so many media rows is two texts in a row."""
        return self.pairs and not any(rows)

    def room(self, is_pair: bool) -> int:
        """Tokens of a segment that its parts may take: a pair has a <bos> and two <eos> for all of its texts."""
        return self.longest - 3 if is_pair else self.longest

    def run_tokens(self, is_pair: bool, predict: bool, words: int, ends: bool = True) -> int:
        """Tokens of so many words of one text; whether it `ends` there. A corrupted one is closed in any case."""
        if is_pair:
            return words
        if self.task == SPAN and predict:
            return words + 2 + int(added(np.int64(words)))
        return words + 1 + ends

    def widest(self, is_pair: bool, predict: bool) -> tuple[int, int]:
        """The most words of a text that a segment holds with the text's end, and without it."""
        if is_pair:
            return self.longest - 3, self.longest - 3
        if self.task == SPAN and predict:
            return self._widest_corrupted, self._widest_corrupted
        return self.longest - 2, self.longest - 1

    @cached_property
    def _widest_corrupted(self) -> int:
        words = np.arange(self.longest - 1)
        fits = (words + 2 + added(words) <= self.longest) & (counts(words)[1] <= self.sentinels)
        return int(np.flatnonzero(fits)[-1])


def refuse_unfit(form: Form, tokenizer: Tokenizer, source: str) -> None:
    """Raises UserError, naming source and mend, for a task that tokenizer or model cannot do, and segments too short for any."""
    told = f"source {source}: task {TASKS[form.task]}"
    if form.longest < SHORTEST:
        raise UserError(
            f"source {source}: segments of {form.longest} tokens; raise data.pack_tokens and model.transformer.max_positions "
            f"to {SHORTEST} or more"
        )
    if form.task != NEXT_TOKEN and not form.fusion:
        raise UserError(f"{told} wants model.fusion: true; without it texts are embedded, and no word of them is predicted")
    if not form.fusion and tokenizer.emb is None:
        raise UserError(
            f"source {source}: with model.fusion: false every text ends with {tokenizer.names.emb!r}, which the "
            f"tokenizer lacks; name one of its tokens as data.special_tokens.emb"
        )
    if form.task == MASKED and tokenizer.mask is None:
        raise UserError(
            f"{told}: the tokenizer has no {tokenizer.names.mask!r}; name its own as data.special_tokens.mask, or add one to it"
        )
    if form.task == SPAN and not form.sentinels:
        name = tokenizer.names.sentinel
        raise UserError(
            f"{told}: the tokenizer has no {name.replace('{}', '0')!r}; name its own as data.special_tokens.sentinel, or add "
            f"them to it ({name} for 0, 1, 2, ...; a hundred serve texts of 2,000 words)"
        )
    if form.task == SPAN and not form.is_causal:
        raise UserError(f"{told} wants model.transformer.mask: causal or media; else each word of a span sees itself")
