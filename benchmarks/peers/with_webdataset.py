"""webdataset: its plain pipeline in tar order; with workers in batches, as its documentation has it, through WebLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from decoding import stretched
from run_peer import BATCH

PACKAGES = ("webdataset",)


class Loader:
    def __init__(self, pipeline: webdataset.WebDataset, workers: int) -> None:
        self._batches = webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=workers > 0)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def prepare(folder: Path) -> None:
    """Nothing: it reads the tars as they are."""


def _tars(folder: Path) -> webdataset.WebDataset:
    return webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)


def _members(sample: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    return sample["jpg"], sample["txt"], sample["json"]


class Plain:
    """Without workers the pipeline itself is walked, nothing around it."""

    def __init__(self, pipeline: webdataset.WebDataset) -> None:
        self._pipeline = pipeline

    def __iter__(self) -> Iterator[Any]:
        for sample in self._pipeline:
            yield (_members(sample),)


def raw(folder: Path, workers: int) -> Loader | Plain:
    if not workers:
        return Plain(_tars(folder))
    return Loader(_tars(folder).map(_members).batched(BATCH, collation_fn=list), workers)


def pictures(folder: Path, workers: int) -> Loader:
    decoded = _tars(folder).decode("pilrgb").to_tuple("jpg").map_tuple(stretched)
    return Loader(decoded.batched(BATCH, collation_fn=_stack), workers)


def _stack(samples: list[tuple[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([picture for (picture,) in samples])
