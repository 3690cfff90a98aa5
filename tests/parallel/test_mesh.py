"""Who stands where in the mesh, whom each rank shares what with, and what is refused before ranks wait for one another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import on_ranks

from mmpt.parallel.layout import AXES, Layout, layouts
from mmpt.parallel.mesh import BLOCK_SHARD, SHARD, World, make_mesh, shard_mesh

CPU = torch.device("cpu")


def places() -> dict[Layout, dict]:
    """Of this rank, in every layout of all ranks."""
    found = {}
    for layout in layouts(dist.get_world_size()):
        world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=CPU, mesh=make_mesh(layout, CPU))
        groups = {name: getattr(world, f"{name}_group") for name in ("sequence", "ring", "ulysses", "tp")}
        found[layout] = {
            "layout": world.layout,
            "data": (world.data_rank, world.data_size),
            "sequence": (world.sequence_rank, world.sequence_size),
            "groups": {name: dist.get_process_group_ranks(group) for name, group in groups.items() if group is not None},
            "all": dist.get_process_group_ranks(world.group),
            "own ring": world.ring_group is not world.group,
            "sharded": [shard_mesh(world.mesh, axis).shape for axis in (SHARD, BLOCK_SHARD)],
            "summed": world.add_up({"all": 1, f"rank {world.rank}": 2}),
        }
    return found


def test_four_ranks_in_every_layout():
    ranks = on_ranks(4, places)
    assert len(ranks[0]) == 15  # ways to write 4 as a product of five numbers
    for layout, found in ranks[0].items():
        assert found["layout"] == layout and found["all"] == [0, 1, 2, 3] and found["own ring"]
        assert found["summed"] == {"all": 4, "rank 0": 2, "rank 1": 2, "rank 2": 2, "rank 3": 2}
        copies = () if layout.dp_replicate == 1 else (layout.dp_replicate,)
        shards = 4 // layout.dp_replicate
        assert found["sharded"] == [(*copies, shards), (*copies, shards // layout.tp)]
    hybrid = Layout(dp_shard=2, tp=2)
    assert [found[hybrid]["data"] for found in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [found[hybrid]["sequence"] for found in ranks] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    for rank, pair in enumerate([[0, 1], [0, 1], [2, 3], [2, 3]]):
        assert ranks[rank][hybrid]["groups"] == {"sequence": pair, "tp": pair}
    crossed = Layout(ring=2, tp=2)
    assert [found[crossed]["sequence"] for found in ranks] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [found[crossed]["groups"]["ring"] for found in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [found[crossed]["groups"]["tp"] for found in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    copies = Layout(dp_replicate=2, dp_shard=2)
    assert [found[copies]["data"] for found in ranks] == [(rank, 4) for rank in range(4)]
    assert ranks[0][copies]["groups"] == {} and ranks[0][copies]["sharded"] == [(2, 2), (2, 2)]


def test_one_process_has_no_groups():
    world = World(rank=0, size=1, device=CPU, mesh=None)
    assert world.layout == Layout() and world.leads and world.is_main
    assert (world.data_rank, world.data_size, world.sequence_rank, world.sequence_size) == (0, 1, 0, 1)
    assert not any((world.group, world.sequence_group, world.ring_group, world.ulysses_group, world.tp_group))
    assert world.add_up({"a": 1.0}) == {"a": 1.0}


def test_layouts_of_a_number_of_ranks():
    assert [layout.sizes for layout in layouts(1)] == [(1, 1, 1, 1, 1)]
    assert {layout.sizes for layout in layouts(3)} == {tuple(3 if i == j else 1 for i in range(5)) for j in range(5)}
    eight = list(layouts(8))
    assert len(set(eight)) == len(eight) == 35 and all(layout.ranks == 8 for layout in eight)
    assert AXES == ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    assert str(Layout(ring=4)) == "{dp_shard: 1, ring: 4}"
