"""The plan's packs, read, decoded and collated by worker processes.

    Plan.walk --_Requests--> Request --Reader, in a worker--> PackedBatch --finish--> the training loop

Requests run ahead of training as far as the workers prefetch. So every batch carries the state that follows it:
a loader made with that state goes on with the batches that would have come next.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mmpt.config import AugmentConfig, DataConfig, ModelConfig, RunConfig
from mmpt.data.budget import Budget
from mmpt.data.cache import Cache
from mmpt.data.corpus import Corpus
from mmpt.data.mixture import Slot
from mmpt.data.packing import next_fit
from mmpt.data.plan import VERSION, Plan
from mmpt.data.quarantine import Quarantine, index_faults, refuse_too_many
from mmpt.data.reader import Reader, Request
from mmpt.data.source import Source
from mmpt.data.spec import MixturePart, load_mixture
from mmpt.data.tokens import Tokenizer
from mmpt.data.workers import Workers
from mmpt.types import AUDIO, IMAGE, TEXT, VIDEO, LoaderState, LoadReport, PackedBatch, PlanCursor, UserError

_TOKEN_BYTES = (10 + 4 + 5 + 5 + 1) * 8  # of a token in a PackedBatch, a slot, a segment, a medium and a document as it may be
_SPLIT_BYTES = (5 + 1 + 3) * 8  # of a token of a split batch that another rank has: its segment and document, and ways to go
_SMALL_BYTES = 1 << 20  # what else a batch has: where its documents come from, and the gaps between tensors
TRAIN = "train"


class Loader:
    """The training batches of one rank: `iter` yields PackedBatch from `state` on, until the plan ends, if it does.

    A micro-batch is the next `config.data.packs_per_batch` packs of the plan; rank r of R gets the r-th of R equal
    slices. `finish` is applied to each batch in the worker, and leaves one of `parts` ranks' part of it; `bad_samples` is the
    folder for what could not be read.
    Raises UserError where config, data and state do not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        world_size: int,
        state: LoaderState | None = None,
        finish: Callable[[PackedBatch], PackedBatch] | None = None,
        parts: int = 1,
        bad_samples: Path | None = None,
    ):
        data = config.data
        if data.packs_per_batch % world_size:
            raise UserError(f"data.packs_per_batch = {data.packs_per_batch}: {world_size} ranks need a multiple of {world_size}")
        tokenizer = Tokenizer.of(data)
        mixture = load_mixture(data.spec)
        sources = open_sources(config, tokenizer)
        self.plan = plan_of(sources, data, mixture.unit)
        fingerprint = _fingerprint(sources, tokenizer, data, mixture.unit)
        if state:
            refuse_changed_data(state.fingerprint, fingerprint)
        self.config, self.batch_bytes = config, _batch_bytes(config, world_size, parts, sources)
        self.prefetch = _prefetch(data, self.batch_bytes)
        self.state = LoaderState(
            fingerprint=fingerprint,
            cursor=state.cursor if state else self.plan.begin(),
            packs_consumed=state.packs_consumed if state else 0,
        )
        share = data.packs_per_batch // world_size
        mine = slice(rank * share, (rank + 1) * share)
        self._requests = _Requests(self.plan, self.state, data.packs_per_batch, mine)
        self._reader = Reader(sources, config, data.augment, finish)
        self.quarantine = Quarantine({source.name: source.corpus.spec.on_bad for source in sources}, bad_samples, rank)
        self.meter = Meter(share * data.pack_tokens)

    def __iter__(self) -> Iterator[PackedBatch]:
        # The caller keeps the batches of a step while it asks for those of the next.
        held = 2 * self.config.train.accumulate + 1
        workers = Workers(self._reader, self.config.data.workers, self.prefetch, held, self.batch_bytes)
        batches = workers.map(self._requests)
        try:
            while True:
                depth, began = workers.ready, time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                self.meter.count(batch.report, time.perf_counter() - began, depth)
                self.quarantine.admit(batch)
                yield batch.pin_memory() if torch.cuda.is_available() else batch
        finally:
            workers.close()


class Meter:
    """What loading was like since it was last read."""

    def __init__(self, tokens_per_batch: int) -> None:
        self.tokens_per_batch = tokens_per_batch
        self._reset()

    def _reset(self) -> None:
        self.batches = self.depth = self.faults = 0
        self.wait = 0.0
        self.milliseconds: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def count(self, report: LoadReport, wait: float, depth: int) -> None:
        """A batch is taken: seconds that the loop waited for it, and how many were ready when it asked."""
        self.batches, self.wait, self.depth = self.batches + 1, self.wait + wait, self.depth + depth
        self.milliseconds.update(report.milliseconds)
        self.tokens.update(report.tokens)
        self.faults += len(report.faults)

    def read(self) -> dict[str, float]:
        """Of this rank since it was last read. Per batch: seconds waited, batches ready, milliseconds of each kind of work; fill;
        faults in all. Counting begins anew; `tokens` by source are to be read before."""
        batches = max(self.batches, 1)
        figures = {"loader/wait": self.wait / batches, "loader/depth": self.depth / batches, "loader/faults": self.faults}
        figures["loader/fill"] = sum(self.tokens.values()) / (batches * self.tokens_per_batch)
        figures |= {f"loader/ms_{name}": value / batches for name, value in self.milliseconds.items()}
        self._reset()
        return figures


def plan_of(sources: Sequence[Source], data: DataConfig, unit: Literal["tokens", "samples"]) -> Plan:
    """The packs of a run over its sources."""
    limits = {"pack_tokens": data.pack_tokens, "pack_media": data.pack_media}
    return Plan(sources, seed=data.seed, unit=unit, window=data.window, **limits)


def open_sources(config: RunConfig, tokenizer: Tokenizer, split: str = TRAIN) -> list[Source]:
    """Every source of the run's mixture. Raises UserError for data that does not fit the run, or is faulty beyond its limits."""
    mixture = load_mixture(config.data.spec)
    pairs = zip(mixture.specs(), mixture.mixture, strict=True)
    return [make_source(Corpus.open(spec, split, cache_of(config.data)), tokenizer, config, part) for spec, part in pairs]


def make_source(corpus: Corpus, tokenizer: Tokenizer, config: RunConfig, part: MixturePart | None = None) -> Source:
    """A corpus as a run sees it. Raises UserError as `open_sources` does."""
    if len(tokenizer) > config.model.vocabulary:
        raise UserError(f"model.vocabulary = {config.model.vocabulary}: the tokenizer has {len(tokenizer)} tokens; raise it")
    faults = index_faults(corpus)
    refuse_too_many(corpus.name, len(faults), len(corpus), corpus.spec.on_bad, faults)
    _refuse_missing_tokens(corpus, tokenizer, config)
    part = part or MixturePart(spec=str(corpus.spec.path), weight=1.0)
    return Source(corpus, tokenizer, Budget(config.model, corpus.spec), part, config.data)


def _refuse_missing_tokens(corpus: Corpus, tokenizer: Tokenizer, config: RunConfig) -> None:
    has_media = bool((corpus.parts["kind"] != TEXT).any())
    for role, is_wanted in (("emb", has_media), ("media", has_media and config.model.fusion)):
        if is_wanted and getattr(tokenizer, role) is None:
            mend = f"name one of its tokens as data.special_tokens.{role}" if config.model.fusion else "take another tokenizer"
            raise UserError(
                f"data.tokenizer = {config.data.tokenizer}: it has no token {role}, and source {corpus.name} has media; {mend}, "
                f"or write model.fusion: false where media stay out of the shared transformer"
            )


def cache_of(data: DataConfig) -> Cache:
    return Cache(path=Path(data.cache).expanduser(), max_bytes=int(data.cache_gib * 2**30))


def sequential_batches(
    corpus: Corpus, tokenizer: Tokenizer, config: RunConfig, part: MixturePart | None = None
) -> Iterator[PackedBatch]:
    """Every document of `corpus` once, in order, pictures unchanged on white: for evaluation, of the task of `part` if given.

    Documents that the index knows as faulty are left out; what turns out faulty is masked, and in the batch's report.
    """
    source = make_source(corpus, tokenizer, config, part)
    numbers = np.arange(len(corpus))
    lengths = source.tokens_of(np.zeros_like(numbers), numbers).tolist()
    placed = [found for number, length in enumerate(lengths) for found in _slots(source, number, length)]
    slots, tokens, rows = [slot for slot, _ in placed], [slot.tokens for slot, _ in placed], [height for _, height in placed]
    bins = next_fit(tokens, config.data.pack_tokens, rows, config.data.pack_media)
    packs = [[slots[i] for i in members] for members in bins]
    reader = Reader([source], config, AugmentConfig())
    cursor = PlanCursor(window=0, pack=0, sources={})
    for start in range(0, len(packs), config.data.packs_per_batch):
        chosen = packs[start : start + config.data.packs_per_batch]
        state = LoaderState(fingerprint={}, cursor=cursor, packs_consumed=start + len(chosen))
        yield reader(Request(packs=chosen, first_pack=start, state=state))


def refuse_faults(batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    """The batches. Raises UserError for the first document that is faulty: figures that are published count all."""
    for batch in batches:
        for fault in batch.report.faults:
            raise UserError(f"{fault.source}: document {fault.key} of {fault.shard}: {fault.detail}")
        yield batch


def _slots(source: Source, document: int, tokens: int) -> list[tuple[Slot, int]]:
    """A document, whole or in pieces, each with its media rows; nothing for one that the index knows as faulty."""
    if not tokens:
        return []
    whole = [(tokens, int(source.media_rows[document]))]
    pieces = source.pieces(document, 0) if source.is_split(document, tokens) else whole
    return [
        (Slot(source=0, document=document, epoch=0, piece=piece, tokens=length), rows)
        for piece, (length, rows) in enumerate(pieces)
    ]


def _fingerprint(sources: list[Source], tokenizer: Tokenizer, data: DataConfig, unit: str) -> dict[str, str]:
    """Everything that the plan's packs depend on, but for the weights of the mixture."""
    settings = ("pack_tokens", "pack_media", "packs_per_batch", "window", "seed")
    return {
        "plan": VERSION,
        "tokenizer": tokenizer.fingerprint,
        "mixture.unit": unit,
        **{f"data.{name}": str(getattr(data, name)) for name in settings},
        **{name: value for source in sources for name, value in source.fingerprint.items()},
    }


def refuse_changed_data(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises UserError naming what changed; sources may be added."""
    known = {name.split()[1] for name in then if name.startswith("source ")}
    added = {name for name in now if name.startswith("source ") and name.split()[1] not in known}
    names = [name for name in {**then, **now} if name not in added and then.get(name) != now.get(name)]
    changed = [f"{name} was {then.get(name, 'not there')}, is {now.get(name, 'gone')}" for name in names]
    if changed:
        raise UserError(
            f"the run cannot go on, its data changed: {'; '.join(changed)}; change it back, or start under another name"
        )


def _batch_bytes(config: RunConfig, world_size: int, parts: int, sources: list[Source]) -> int:
    """The most that the tensors of a rank's batch take.

    Of a split batch, whose media are shared by what they cost to encode, it is an estimate: twice the mean of their bytes.
    """
    data = config.data
    media = max((_row_bytes(config.model, source) * _most_rows(config, source) for source in sources), default=0)
    tokens = data.pack_tokens * _TOKEN_BYTES
    if parts > 1:
        media, tokens = min(media, 2 * media // parts), tokens // parts + data.pack_tokens * _SPLIT_BYTES
    return data.packs_per_batch // world_size * (tokens + media) + _SMALL_BYTES


def _row_bytes(model: ModelConfig, source: Source) -> int:
    """Of the largest row of a source's media, the time of a log-mel frame included."""
    patch = 3 * model.image.patch**2 if model.image else 0
    sizes = {IMAGE: patch, VIDEO: patch, AUDIO: 4 * (model.audio.mel_bins + 1) if model.audio else 0}
    return max((size for modality, size in sizes.items() if source.has_media(modality)), default=0)


def _most_rows(config: RunConfig, source: Source) -> int:
    """Media rows of a pack that holds documents of one source alone."""
    data, model = config.data, config.model
    if data.pack_media:
        return data.pack_media
    if not model.fusion:  # media take no tokens: how many come into a pack depends on the texts beside them
        lengths = np.maximum(np.minimum(source.lengths, source.reversed_lengths), 1)
        return math.ceil(data.pack_tokens * float((source.media_rows / lengths).max()))
    patches = model.image.merge**2 if model.image else 0
    of_token = {IMAGE: patches, VIDEO: patches * model.video.merge_frames if model.video else 0}
    of_token[AUDIO] = model.audio.frames_per_token if model.audio else 0
    return data.pack_tokens * max((rows for modality, rows in of_token.items() if source.has_media(modality)), default=0)


def _prefetch(data: DataConfig, batch_bytes: int) -> int:
    """Batches that a worker makes ahead, so that all of them together stay within `data.prefetch_mib`."""
    workers = max(data.workers, 1)
    fits = data.prefetch_mib * 2**20 // (batch_bytes * workers)
    if not fits:
        needed = -(-batch_bytes * workers // 2**20)
        raise UserError(
            f"data.prefetch_mib = {data.prefetch_mib}: one batch for each worker may take {needed} MiB; raise it to that, "
            f"or lower data.workers, data.packs_per_batch or data.pack_media"
        )
    return min(data.prefetch, fits)


@dataclass(frozen=True)
class _Requests:
    """Walks the plan from a state, in the training process: one rank's slice of each micro-batch."""

    plan: Plan
    start: LoaderState
    packs_per_batch: int
    mine: slice  # which packs of a micro-batch are this rank's

    def __iter__(self) -> Iterator[Request]:
        walk = self.plan.walk(self.start.cursor)
        consumed = self.start.packs_consumed
        # What is less than a micro-batch at the end of the plan is left out, so that every rank takes the same steps.
        while len(taken := list(islice(walk, self.packs_per_batch))) == self.packs_per_batch:
            first = consumed + self.mine.start
            consumed += len(taken)
            state = LoaderState(fingerprint=self.start.fingerprint, cursor=taken[-1][1], packs_consumed=consumed)
            yield Request(packs=[slots for slots, _ in taken[self.mine]], first_pack=first, state=state)
