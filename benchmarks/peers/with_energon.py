"""megatron-energon: prepared by its own command; pictures by PIL, the decoder under all of its image types."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from decoding import stretched
from megatron.energon import Cooker, SampleDecoder, TaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless
from run_peer import BATCH

PACKAGES = ("megatron-energon",)
SPLIT = "val"  # of which every walk sees each sample once, in order; those of a training split go on without end


def prepare(folder: Path) -> None:
    """Its index and split, beside links to the tars."""
    home = folder / "energon"
    if (home / ".nv-meta" / "dataset.yaml").exists():
        return
    home.mkdir(exist_ok=True)
    for tar in sorted(folder.glob("*.tar")):
        (home / tar.name).unlink(missing_ok=True)
        (home / tar.name).hardlink_to(tar)
    options = ["--non-interactive", "--force-overwrite", "--split-parts", f"{SPLIT}:.*", "--sample-type", "CrudeWebdataset"]
    command = [str(Path(sys.executable).with_name("energon")), "prepare", str(home), *options, "--num-workers", "1"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@stateless
def _members(sample: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    return sample["jpg"], sample["txt"], sample["json"]


@stateless
def _picture(sample: dict[str, Any]) -> torch.Tensor:
    return stretched(sample["jpg"])


class Raw(TaskEncoder):
    """Samples as they are."""

    decoder = None
    cookers = (Cooker(_members),)

    @stateless
    def batch(self, samples: list[Any]) -> list[Any]:
        return samples


class Pictures(TaskEncoder):
    decoder = SampleDecoder(image_decode="pilrgb")
    cookers = (Cooker(_picture),)

    @stateless
    def batch(self, samples: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(samples)


class Loader:
    def __init__(self, folder: Path, workers: int, encoder: TaskEncoder) -> None:
        config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
        samples = get_val_dataset(
            folder / "energon", split_part=SPLIT, worker_config=config, batch_size=BATCH, task_encoder=encoder
        )
        self._batches = get_loader(samples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def raw(folder: Path, workers: int) -> Loader:
    return Loader(folder, workers, Raw())


def pictures(folder: Path, workers: int) -> Loader:
    return Loader(folder, workers, Pictures())
