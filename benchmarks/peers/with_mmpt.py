"""mmpt: members by index, many samples to a batch; workers hand over shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run_peer import BATCH, SIDE

from mmpt.data.corpus import Corpus
from mmpt.data.media.images import decode_image
from mmpt.data.raw import RawLoader, read_batch
from mmpt.data.spec import load_spec
from mmpt.data.workers import Workers

PACKAGES = ("mmpt", "torchvision")
SPLIT = "all"
SPEC = """\
version: 1
name: benchmark
format: pairs
shards: {root: ., pattern: "shard-{00000..00003}.tar"}
split: {all: ":"}
"""


def prepare(folder: Path) -> None:
    (folder / "spec.yaml").write_text(SPEC)
    _open(folder)


def _open(folder: Path) -> Corpus:
    return Corpus.open(load_spec(folder / "spec.yaml"), SPLIT)


class Raw:
    def __init__(self, folder: Path, workers: int) -> None:
        corpus = _open(folder)
        self._batches = RawLoader(corpus, range(len(corpus)), BATCH, workers)
        self.close = self._batches.close

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield [tuple(members.values()) for members in batch]


class Pictures:
    def __init__(self, folder: Path, workers: int) -> None:
        corpus = _open(folder)
        self._blocks = torch.arange(len(corpus)).split(BATCH)
        self._workers = Workers(partial(_decode, corpus), workers)
        self.close = self._workers.close

    def __iter__(self) -> Iterator[Any]:
        return self._workers.map(self._blocks)


def raw(folder: Path, workers: int) -> Raw:
    return Raw(folder, workers)


def pictures(folder: Path, workers: int) -> Pictures:
    return Pictures(folder, workers)


def _decode(corpus: Corpus, numbers: torch.Tensor) -> torch.Tensor:
    batch = [decode_image(members["jpg"], SIDE, SIDE, fit="stretch")[:3] for members in read_batch(corpus, numbers.tolist())]
    return torch.stack(batch)
