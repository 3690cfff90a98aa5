"""Where this process stands among the processes of a run, from the environment that torchrun sets.

config, WORLD_SIZE --layout_of--> Layout --make_mesh--> a mesh of five axes, with a process group along each --> World
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mmpt.config import RunConfig
from mmpt.parallel.layout import AXES, Layout, layout_of
from mmpt.types import UserError

TIMEOUT = timedelta(minutes=10)  # a rank that is gone ends the run, rather than hanging it
GRACE = 3.0  # seconds that the first rank has to say why there will be no run

# Axes taken together, by the name of what they make.
ALL, SEQUENCE, SHARD, BLOCK_SHARD = "all", "sequence", "shard", "block_shard"
FLAT = {
    ALL: AXES,
    SEQUENCE: ("ring", "ulysses", "tp"),
    SHARD: ("dp_shard", "ring", "ulysses", "tp"),
    BLOCK_SHARD: ("dp_shard", "ring", "ulysses"),
}


@dataclass(frozen=True, kw_only=True)
class World:
    """One rank's place. Ranks of a sequence group share one batch; each works on its own tokens, media and embedding slots."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # see make_mesh; None for a single process, which needs no process group

    @property
    def layout(self) -> Layout:
        return Layout() if self.mesh is None else Layout(**dict(zip(AXES, self.mesh.shape, strict=True)))

    @property
    def data_size(self) -> int:
        return self.layout.data

    @property
    def data_rank(self) -> int:
        """Which packs it reads: those of one sequence group are the same."""
        return self.rank // self.layout.sequence

    @property
    def sequence_size(self) -> int:
        return self.layout.sequence

    @property
    def sequence_rank(self) -> int:
        """Its place in the sequence group: (ring * ulysses' size + ulysses) * tp's size + tp."""
        return self.rank % self.layout.sequence

    @property
    def leads(self) -> bool:
        """Whether it stands for its sequence group where documents are counted: each is read by all of them."""
        return self.sequence_rank == 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks: what losses and counts are summed over; None for a single process."""
        return self._group(ALL)

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """None where it has one rank; so of those that follow."""
        return self._group(SEQUENCE)

    @property
    def ring_group(self) -> dist.ProcessGroup | None:
        return self._group("ring")

    @property
    def ulysses_group(self) -> dist.ProcessGroup | None:
        return self._group("ulysses")

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        return self._group("tp")

    def _group(self, axis: str) -> dist.ProcessGroup | None:
        if self.mesh is None:
            return None
        group = self.mesh.get_group(axis)
        return group if dist.get_world_size(group) > 1 else None

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


def make_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The mesh of a layout, with the axes of FLAT beside its own. All ranks make it together, once a process group stands.

    The ring has a process group of its own, even where it is all ranks: its messages are on the way while others compute.
    """
    backend = dist.get_backend()
    mesh = init_device_mesh(device.type, layout.sizes, mesh_dim_names=AXES, backend_override={"ring": backend})
    for name, axes in FLAT.items():
        mesh[axes]._flatten(name)
    return mesh


def shard_mesh(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    """Over which FSDP2 cuts parameters: SHARD, or BLOCK_SHARD for those that tp has cut before; copies outside of it, if any."""
    flat = mesh[FLAT[axis]]._flatten(axis)
    copies = mesh["dp_replicate"]
    return flat if copies.size() == 1 else DeviceMesh._concatenate([copies, flat])


@contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Join the ranks that torchrun started (gloo on CPUs, NCCL on GPUs), or stand alone; leave on the way out.

    Raises UserError, before any rank waits for another, for a layout that cannot be.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        layout = layout_of(config, size)
    except UserError:
        if rank:  # all ranks come to the same: the first one says it, and torchrun ends the others as soon as it has
            time.sleep(GRACE)
            raise SystemExit(2) from None
        raise
    accelerated = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if accelerated else torch.device("cpu")
    if accelerated:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank=0, size=1, device=device, mesh=None)
        return
    # Bound to a device, NCCL joins the ranks of a group at once, and not at its first message, where some may have none to send.
    dist.init_process_group("nccl" if accelerated else "gloo", timeout=TIMEOUT, device_id=device if accelerated else None)
    try:
        yield World(rank=rank, size=size, device=device, mesh=make_mesh(layout, device))
    finally:
        dist.destroy_process_group()
