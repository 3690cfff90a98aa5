"""What a run's layout changes about a model, put into it from outside: one short ordered function.

model --recompute--> --compile--> --shard--> the same model, the same names, the same gradients
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import register_dataclass

from mmpt.config import TrainConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.model.transformer import Transformer
from mmpt.types import Embeddings, ModelOutput, Routing, UserError

# FSDP looks for tensors in what the root returns, to know when the backward pass begins.
for noun in (ModelOutput, Embeddings, Routing):
    register_dataclass(noun)


def apply_layout(model: MultimodalModel, config: TrainConfig, device: torch.device, mesh: DeviceMesh | None) -> MultimodalModel:
    """Bring the model into the form in which it is trained. Raises UserError for `compile` without an accelerator."""
    if config.compile and device.type == "cpu":
        raise UserError("train.compile = true: it is for accelerators; leave it out on a CPU")
    for transformer in _transformers(model):
        transformer.recompute = config.recompute
        if config.compile:
            transformer.compile_blocks()
    return model if mesh is None else _shard(model, mesh)


def _transformers(model: MultimodalModel) -> list[Transformer]:
    encoders = (model.image_encoder, model.audio_encoder)
    return [encoder.transformer for encoder in encoders if encoder is not None] + [model.transformer]


def _shard(model: MultimodalModel, mesh: DeviceMesh) -> MultimodalModel:
    """FSDP2: parameters, gradients and optimizer state are cut over the ranks of `mesh`, block by block.

    Gradients are summed over ranks, not averaged: losses are divided by global counts already.
    """
    blocks = [block for transformer in _transformers(model) for block in transformer.blocks]
    for part in [*blocks, model]:
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else fp32 takes NCCL's scaled sum, which gloo lacks
    return model
