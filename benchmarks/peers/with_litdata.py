"""litdata: its own optimized format, converted to once; pictures by its own decoder, which is torchvision's."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import torch
from decoding import stretched_tensor
from run_peer import BATCH

PACKAGES = ("litdata", "torchvision")


def prepare(folder: Path) -> None:
    for kind in (_as_bytes, _as_image):
        output = folder / f"litdata{kind.__name__}"
        if not (output / "index.json").exists():
            litdata.optimize(
                kind, _samples(folder), str(output), chunk_bytes="64MB", num_workers=1, mode="overwrite", verbose=False
            )


def _samples(folder: Path) -> list[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    return list(samples.values())


def _as_bytes(sample: dict[str, bytes]) -> dict[str, Any]:
    return sample


def _as_image(sample: dict[str, bytes]) -> dict[str, Any]:
    return {"image": litdata.Image(bytes=sample["jpg"]), "text": sample["txt"].decode()}


class Loader:
    def __init__(self, folder: Path, workers: int, collate: Any) -> None:
        samples = litdata.StreamingDataset(str(folder), shuffle=False, drop_last=False)
        self._batches = litdata.StreamingDataLoader(
            samples, batch_size=BATCH, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def raw(folder: Path, workers: int) -> Loader:
    return Loader(folder / "litdata_as_bytes", workers, _members)


def _members(samples: list[dict[str, bytes]]) -> list[tuple[bytes, ...]]:
    return [tuple(sample.values()) for sample in samples]


def pictures(folder: Path, workers: int) -> Loader:
    return Loader(folder / "litdata_as_image", workers, _stack)


def _stack(samples: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([stretched_tensor(sample["image"]) for sample in samples])
