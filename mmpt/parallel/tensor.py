"""Tensor parallelism: the matrices of the shared transformer's blocks, cut over the ranks of one axis (arXiv 1909.08053).

x (T/P, dim) --norm, gather--> (T, dim) --qkv: heads / P--> attention --out: their columns, summed, scattered--> (T/P, dim)
x (T/P, dim) --norm, gather--> (T, dim) --gate, up: hidden / P--> --down: their columns, summed, scattered--> (T/P, dim)

Between the matrices every rank works on its own tokens (arXiv 2205.05198): norms, residual sums, and experts, which are whole on
each of them. Tokens are gathered in the type in which products are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mmpt.model.feed_forward import FeedForward
from mmpt.model.layers import LayerNorm, RMSNorm, narrowed
from mmpt.model.transformer import Block, Transformer


def shard_blocks(transformer: Transformer, mesh: DeviceMesh) -> Transformer:
    """Cut a transformer with the same weights on all ranks of `mesh`, which has one axis; before compiling and FSDP.

    From then on it takes and returns the rank's part of the tokens, of equal numbers in order of rank, and attention is asked for
    all of them and some of the heads. `mesh` must divide the heads of keys and the feed-forward's width.
    """
    for block in transformer.blocks:
        _refuse_remainders(block, mesh.size())
        gathering = [block.attention.qkv]
        plan = {"attention.qkv": ColwiseParallel(), "attention.out": RowwiseParallel(output_layouts=Shard(0))}
        if isinstance(block.ffn, FeedForward):
            gathering.append(block.ffn)  # once for both of its layers
            widen = ("up",) if block.ffn.gate is None else ("gate", "up")
            plan |= {f"ffn.{name}": ColwiseParallel() for name in widen}
            plan["ffn.down"] = RowwiseParallel(output_layouts=Shard(0))
        for module in gathering:
            module.register_forward_pre_hook(lambda module, arguments: (_gathered(*arguments, mesh),))
        parallelize_module(block, mesh, plan, src_data_rank=None)
        for module in block.modules():
            if isinstance(module, RMSNorm | LayerNorm):
                _replicate(module, mesh)
    return transformer


def _refuse_remainders(block: Block, ranks: int) -> None:
    attention = block.attention
    kv_heads = attention.qkv.out_features // attention.head_dim // (attention.sharing + 2)
    assert kv_heads % ranks == 0, f"{kv_heads} heads of keys over {ranks} ranks"
    if isinstance(block.ffn, FeedForward):
        assert block.ffn.up.out_features % ranks == 0, f"a feed-forward of width {block.ffn.up.out_features} over {ranks} ranks"


def _gathered(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """The tokens of all ranks; in the backward pass their gradients are summed, and each rank gets those of its own."""
    return DTensor.from_local(narrowed(x), mesh, [Shard(0)], run_check=False).redistribute(placements=[Replicate()])


@torch.no_grad()
def _replicate(norm: nn.Module, mesh: DeviceMesh) -> None:
    """Weights of which every rank has all: mmpt.model.layers.local tells that it sees some of the tokens only."""
    for name, parameter in norm.named_parameters():
        whole = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
        norm.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
