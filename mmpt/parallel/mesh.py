"""Where this process stands among the processes of a run, from the environment that torchrun sets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = timedelta(minutes=10)  # a rank that is gone ends the run, rather than hanging it


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # one axis, dp_shard; None for a single process, which needs no process group

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share out the data; None for a single process."""
        return None if self.mesh is None else self.mesh.get_group("dp_shard")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def add_up(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures of all ranks added up by name, on every rank; a rank may lack some of the names."""
        everyone = [dict(figures)]
        if self.group is not None:
            everyone *= self.size
            dist.all_gather_object(everyone, dict(figures), group=self.group)
        names = sorted({name for one in everyone for name in one})
        return {name: sum(one.get(name, 0) for one in everyone) for name in names}

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)


@contextmanager
def join_world() -> Iterator[World]:
    """Join the ranks that torchrun started (gloo on CPUs, NCCL on GPUs), or stand alone; leave on the way out."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    accelerated = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if accelerated else torch.device("cpu")
    if accelerated:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank=0, size=1, device=device, mesh=None)
        return
    dist.init_process_group("nccl" if accelerated else "gloo", timeout=TIMEOUT)
    try:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp_shard",))
        yield World(rank=rank, size=size, device=device, mesh=mesh)
    finally:
        dist.destroy_process_group()
