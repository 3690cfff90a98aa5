"""Parallelism, put into the model from outside."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import register_dataclass

from mmpt.model.multimodal import MultimodalModel
from mmpt.types import ModelOutput

# FSDP looks for tensors in what the root returns, to know when the backward pass begins.
register_dataclass(ModelOutput)


def shard_model(model: MultimodalModel, mesh: DeviceMesh) -> MultimodalModel:
    """FSDP2: parameters, gradients and optimizer state are cut over the ranks of `mesh`, block by block.

    Gradients are summed over ranks, not averaged: losses are divided by global counts already.
    """
    parts = [*model.image_encoder.transformer.blocks, *model.transformer.blocks, model]
    for part in parts:
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else fp32 takes NCCL's scaled sum, which gloo lacks
    return model
