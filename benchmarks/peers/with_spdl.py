"""SPDL: its tar reader and its decoder (FFmpeg); its workers are threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av  # noqa: F401 - loads the FFmpeg that `environment.link_ffmpeg` shows to SPDL
import spdl.io
import torch
from run_peer import BATCH, SIDE
from spdl.pipeline import PipelineBuilder

PACKAGES = ("spdl", "spdl_io")
Sample = tuple[memoryview, ...]


def prepare(folder: Path) -> None:
    """Nothing: it reads the tars as they are."""


def _batches(tar: Path) -> Iterator[list[Sample]]:
    """The samples of a tar, read at once; members are views of it."""
    samples: dict[str, list[memoryview]] = {}
    for name, data in spdl.io.iter_tarfile(tar.read_bytes()):
        samples.setdefault(name.partition(".")[0], []).append(data)
    rows = [tuple(members) for members in samples.values()]
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


class Loader:
    """A pipeline is walked once: every walk builds its own."""

    def __init__(self, folder: Path, workers: int, action: Callable[[list[Sample]], Any] | None) -> None:
        self._tars, self._workers, self._action = sorted(folder.glob("*.tar")), workers, action

    def __iter__(self) -> Iterator[Any]:
        if not self._workers:
            for tar in self._tars:
                yield from _batches(tar)
            return
        builder = PipelineBuilder().add_source(self._tars)
        if self._action is None:
            builder = builder.pipe(_batches, concurrency=self._workers)
        else:
            builder = builder.pipe(_batches).pipe(self._action, concurrency=self._workers)
        pipeline = builder.add_sink(3).build(num_threads=self._workers)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()


def raw(folder: Path, workers: int) -> Loader:
    return Loader(folder, workers, None)


def pictures(folder: Path, workers: int) -> Loader:
    return Loader(folder, workers, _decode)


def _decode(samples: list[Sample]) -> torch.Tensor:
    buffer = spdl.io.load_image_batch([bytes(jpg) for jpg, _, _ in samples], width=SIDE, height=SIDE, pix_fmt="rgb24")
    return spdl.io.to_torch(buffer)
