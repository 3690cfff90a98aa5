"""wids: the tars by index, through torch's DataLoader; pictures by PIL, its default decoding."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import wids
from decoding import stretched
from run_peer import BATCH
from torch.utils.data import DataLoader

PACKAGES = ("wids",)


def prepare(folder: Path) -> None:
    """Nothing: it indexes a tar when it opens it."""


def _samples(folder: Path, transformation: Any) -> wids.ShardListDataset:
    shards = []
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            shards.append({"url": str(tar), "nsamples": len(archive.getnames()) // 3})
    return wids.ShardListDataset(shards, transformations=[transformation], cache_dir=str(folder), keep=True)


def _members(sample: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    return sample[".jpg"].getvalue(), sample[".txt"].getvalue(), sample[".json"].getvalue()


def _picture(sample: dict[str, Any]) -> torch.Tensor:
    return stretched(PIL.Image.open(io.BytesIO(sample[".jpg"].getvalue())).convert("RGB"))


class Indexed:
    """Without workers samples are taken by number."""

    def __init__(self, samples: wids.ShardListDataset) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self._samples)):
            yield (self._samples[number],)


def raw(folder: Path, workers: int) -> Any:
    samples = _samples(folder, _members)
    if not workers:
        return Indexed(samples)
    return DataLoader(samples, BATCH, num_workers=workers, collate_fn=list, persistent_workers=True)


def pictures(folder: Path, workers: int) -> Any:
    return DataLoader(_samples(folder, _picture), BATCH, num_workers=workers, persistent_workers=workers > 0)
