"""What a run's layout changes about a model, put into it from outside: one short ordered function.

model --tp--> --recompute--> --compile--> --shard--> the same model, the same names, the same gradients
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import register_dataclass

from mmpt.config import ModelConfig, TrainConfig
from mmpt.model.experts import Experts
from mmpt.model.multimodal import MultimodalModel
from mmpt.model.transformer import Transformer
from mmpt.parallel.mesh import BLOCK_SHARD, SHARD, World, shard_mesh
from mmpt.parallel.sequence import SplitSequence, Splitter
from mmpt.parallel.tensor import shard_blocks
from mmpt.types import Embeddings, ModelOutput, Routing, UserError

# FSDP looks for tensors in what the root returns, to know when the backward pass begins.
for noun in (ModelOutput, Embeddings, Routing):
    register_dataclass(noun)


def apply_layout(model: MultimodalModel, config: TrainConfig, world: World) -> MultimodalModel:
    """Bring the model into the form in which it is trained: on every rank of `world`, from the same weights.

    tp cuts the shared transformer's matrices first, while they are whole; a block that is computed anew, or compiled, is then one
    rank's part of it; FSDP comes last, and gathers and frees around all of that. Raises UserError for `compile` without an
    accelerator.
    """
    if config.compile and world.device.type == "cpu":
        raise UserError("train.compile = true: it is for accelerators; leave it out on a CPU")
    if world.tp_group is not None:
        shard_blocks(model.transformer, world.mesh["tp"])
    if world.sequence_group is not None:
        groups = {"ring": world.ring_group, "ulysses": world.ulysses_group, "tp": world.tp_group}
        model.sequence = SplitSequence(sequence=world.sequence_group, **groups)
    for transformer in _transformers(model):
        transformer.recompute = config.recompute
        if config.compile:
            transformer.compile_blocks()
    return model if world.mesh is None else _shard(model, world)


def splitter_of(model: ModelConfig, world: World) -> Splitter | None:
    """What cuts a batch for this rank, in the loader's workers; None where it has its batches for itself."""
    layout = world.layout
    if layout.sequence == 1:
        return None
    return Splitter(model, ring=layout.ring, ulysses=layout.ulysses, tp=layout.tp, part=world.sequence_rank)


def _transformers(model: MultimodalModel) -> list[Transformer]:
    encoders = (model.image_encoder, model.audio_encoder)
    return [encoder.transformer for encoder in encoders if encoder is not None] + [model.transformer]


def _shard(model: MultimodalModel, world: World) -> MultimodalModel:
    """FSDP2: parameters, gradients and optimizer state are cut over ranks, block by block.

    Every rank works on tokens, media and slots of its own, so all ranks have a part in every gradient; but those of one tp group
    hold different parts of a shared block already, each for the tokens of all of them. Experts are whole on each of them.

    Gradients are summed over ranks, not averaged: losses are divided by global counts already.
    """
    meshes = {id(model): shard_mesh(world.mesh, SHARD)}
    blocks = [block for transformer in _transformers(model) for block in transformer.blocks]
    parts: list[nn.Module] = [*blocks, model]
    if world.layout.tp > 1:
        meshes |= {id(block): shard_mesh(world.mesh, BLOCK_SHARD) for block in model.transformer.blocks}
        parts = [block.ffn for block in model.transformer.blocks if isinstance(block.ffn, Experts)] + parts
    for part in parts:
        fully_shard(part, mesh=meshes.get(id(part), meshes[id(model)]))
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else fp32 takes NCCL's scaled sum, which gloo lacks
    return model
