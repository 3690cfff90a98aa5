"""The plan's packs, read, decoded and collated by worker processes, forever.

    Plan.walk --_Requests--> _Request --_Reader, in a worker--> PackedBatch --finish--> the training loop

Requests run ahead of training as far as the workers prefetch. So every batch carries the state that follows it:
a loader made with that state goes on with the batches that would have come next.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from mmpt.config import AugmentConfig, RunConfig
from mmpt.data.documents import TextEntry, parse, to_document
from mmpt.data.index import Corpus
from mmpt.data.media import augment, decode_image, patchify
from mmpt.data.packing import PackEntry, collate, document_length, next_fit, tokenize
from mmpt.data.plan import Plan, Slot, keyed_hash
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.types import Document, DocumentRef, Image, LoaderState, PackedBatch, UserError

# A forked worker starts at once and shares the index. It computes with one thread, so it never waits for the OpenMP
# threads of its parent, which a fork does not copy. Other systems have no safe fork.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class Loader:
    """The training batches of one rank: `iter` yields PackedBatch without end, from `state` on.

    A micro-batch is the next `config.data.packs_per_batch` packs of the plan; rank r of R gets the r-th of R equal
    slices. `finish` is applied to each batch in the worker. Raises UserError where config, corpus and state do not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        world_size: int,
        state: LoaderState | None = None,
        finish: Callable[[PackedBatch], PackedBatch] | None = None,
    ):
        packs = config.data.packs_per_batch
        if packs % world_size:
            raise UserError(f"data.packs_per_batch = {packs}: {world_size} ranks need a multiple of {world_size}")
        corpus = Corpus.open(load_spec(Path(config.data.spec)), "train")
        tokenizer = Tokenizer.load(Path(config.data.tokenizer))
        lengths = measure(corpus, tokenizer, config)
        fingerprint = _fingerprint(corpus, tokenizer, config)
        self.config = config
        self.state = state or LoaderState(fingerprint=fingerprint, window=0, pack=0, packs_consumed=0)
        _check_same(self.state.fingerprint, fingerprint)
        data = config.data
        self.plan = Plan(lengths, seed=data.seed, pack_tokens=data.pack_tokens, window=data.window)
        self._requests = _Requests(
            self.plan, self.state, packs, slice(rank * packs // world_size, (rank + 1) * packs // world_size)
        )
        self._reader = _Reader(corpus, tokenizer, config, data.augment, finish)

    def __iter__(self) -> Iterator[PackedBatch]:
        workers = self.config.data.workers
        batches = DataLoader(
            self._reader,
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            prefetch_factor=self.config.data.prefetch if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_start_worker, os.getpid()) if workers else None,
            multiprocessing_context=_START_METHOD if workers else None,
            generator=torch.Generator(),  # the workers' seed, else drawn from the generator that training uses
        )
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def sequential_batches(corpus: Corpus, tokenizer: Tokenizer, config: RunConfig) -> Iterator[PackedBatch]:
    """Every document of `corpus` once, in order, pictures unchanged on white: for evaluation.

    Raises UserError for a document that is faulty or longer than a pack.
    """
    lengths = measure(corpus, tokenizer, config).tolist()
    packs = [[Slot(document=number, epoch=0) for number in pack] for pack in next_fit(lengths, config.data.pack_tokens)]
    reader = _Reader(corpus, tokenizer, config, AugmentConfig(), None)
    fingerprint = _fingerprint(corpus, tokenizer, config)
    for start in range(0, len(packs), config.data.packs_per_batch):
        chosen = packs[start : start + config.data.packs_per_batch]
        end = start + len(chosen)
        state = LoaderState(fingerprint=fingerprint, window=0, pack=end, packs_consumed=end)
        batch = reader[_Request(packs=chosen, first_pack=start, state=state)]
        if isinstance(batch, UserError):
            raise batch
        yield batch


def measure(corpus: Corpus, tokenizer: Tokenizer, config: RunConfig) -> Int[np.ndarray, " documents"]:
    """Tokens of each document, from the JSON members alone.

    Raises UserError for a tokenizer larger than the model's vocabulary, a faulty document, or one longer than a pack.
    """
    if len(tokenizer) > config.model.vocabulary:
        raise UserError(f"model.vocabulary = {config.model.vocabulary}: the tokenizer has {len(tokenizer)} tokens; raise it")
    lengths = np.empty(len(corpus), dtype=np.int64)
    for number in range(len(corpus)):
        try:
            entries, _ = parse(corpus.read_json(number))
        except ValueError as error:
            raise _faulty(corpus, number, error) from error
        parts = [len(tokenizer.encode(entry.text)) if isinstance(entry, TextEntry) else None for entry in entries]
        lengths[number] = document_length(parts, config.model.image.tokens_per_image)
    if len(lengths) == 0:
        raise UserError(f"{corpus.name}: the split holds no documents")
    longest, pack_tokens = int(lengths.argmax()), config.data.pack_tokens
    if lengths[longest] > pack_tokens:
        key = corpus.read(longest).key
        raise UserError(
            f"data.pack_tokens = {pack_tokens}: document {key} of {corpus.name} has {lengths[longest]} tokens; raise it"
        )
    return lengths


def _faulty(corpus: Corpus, number: int, error: ValueError) -> UserError:
    sample = corpus.read(number)
    return UserError(f"{corpus.name}: document {sample.key} of {sample.shard}: {error}")


def _fingerprint(corpus: Corpus, tokenizer: Tokenizer, config: RunConfig) -> str:
    """Everything that the plan's packs depend on, legible: `name:value name:value ...`."""
    data = config.data
    parts = {
        "corpus": corpus.fingerprint[:16],
        "tokenizer": tokenizer.fingerprint[:16],
        "data.pack_tokens": data.pack_tokens,
        "data.packs_per_batch": data.packs_per_batch,
        "data.window": data.window,
        "data.seed": data.seed,
        "tokens_per_image": config.model.image.tokens_per_image,
    }
    return " ".join(f"{name}:{value}" for name, value in parts.items())


def _check_same(then: str, now: str) -> None:
    was, is_ = (dict(part.split(":", 1) for part in text.split()) for text in (then, now))
    changed = [f"{name} was {was.get(name)}, is {is_.get(name)}" for name in {**was, **is_} if was.get(name) != is_.get(name)]
    if changed:
        raise UserError(
            f"the run cannot go on, its data changed: {'; '.join(changed)}; change it back, or start under another name"
        )


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A batch to be read."""

    packs: list[list[Slot]]
    first_pack: int  # number of the first of them within the run
    state: LoaderState  # after the batch


@dataclass(frozen=True)
class _Requests:
    """Walks the plan from a state, in the training process: one rank's slice of each micro-batch."""

    plan: Plan
    start: LoaderState
    packs_per_batch: int
    mine: slice  # which packs of a micro-batch are this rank's

    def __iter__(self) -> Iterator[_Request]:
        walk = self.plan.walk(self.start.window, self.start.pack)
        consumed = self.start.packs_consumed
        while True:
            taken = list(islice(walk, self.packs_per_batch))
            first = consumed + self.mine.start
            consumed += len(taken)
            window, pack = taken[-1][1]
            state = LoaderState(fingerprint=self.start.fingerprint, window=window, pack=pack, packs_consumed=consumed)
            yield _Request(packs=[slots for slots, _ in taken[self.mine]], first_pack=first, state=state)


class _Reader(Dataset[PackedBatch | UserError]):
    """Makes the batch of a request. A user's mistake is returned: raised in a worker it would arrive with a traceback."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        config: RunConfig,
        augmentation: AugmentConfig,
        finish: Callable[[PackedBatch], PackedBatch] | None,
    ):
        self.corpus, self.tokenizer, self.config = corpus, tokenizer, config
        self.augmentation, self.finish = augmentation, finish

    def __getitem__(self, request: _Request) -> PackedBatch | UserError:
        try:
            batch = self._batch(request)
        except UserError as error:
            return error
        return self.finish(batch) if self.finish else batch

    def _batch(self, request: _Request) -> PackedBatch:
        shape = self.config.model.image
        packs: list[list[PackEntry]] = []
        pictures, seeds = [torch.empty(0, 4, shape.size, shape.size, dtype=torch.uint8)], []
        for number, slots in enumerate(request.packs, start=request.first_pack):
            packs.append([])
            for slot in slots:
                document = self._document(slot.document)
                ref = DocumentRef(source=document.source, key=document.key, epoch=slot.epoch, pack=number)
                packs[-1].append(PackEntry(ref=ref, segments=tokenize(document, self.tokenizer, shape.tokens_per_image)))
                for part, image in enumerate(document.parts):
                    if isinstance(image, Image):
                        pictures.append(self._picture(document, part, image))
                        seeds.append(keyed_hash(self.config.data.seed, slot.epoch, document.key, part))
        images = augment(torch.cat(pictures), torch.tensor(seeds, dtype=torch.int64), self.augmentation)
        return collate(
            packs,
            patchify(images, shape.patch),
            grid=(shape.patches_per_side, shape.patches_per_side),
            merge=shape.merge,
            pack_tokens=self.config.data.pack_tokens,
            pad=self.tokenizer.pad,
            state=request.state,
        )

    def _document(self, number: int) -> Document:
        try:
            return to_document(self.corpus.read(number), self.corpus.name)
        except ValueError as error:
            raise _faulty(self.corpus, number, error) from error

    def _picture(self, document: Document, part: int, image: Image) -> torch.Tensor:
        try:
            return decode_image(image.data, self.config.model.image.size)[None]
        except ValueError as error:
            raise UserError(f"{document.source}: document {document.key}: parts[{part}]: {error}") from error


def _as_it_is(batch: PackedBatch | UserError) -> PackedBatch | UserError:
    return batch


def _start_worker(parent: int, worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers itself
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="watch-parent").start()


def _end_with(parent: int) -> None:
    # torch watches the parent as well, but then the worker waits, for ever, until somebody reads what it still has to send.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
