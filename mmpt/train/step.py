"""One optimizer step: micro-batches forward and backward, losses over the step's global counts, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

from mmpt.config import RunConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.combine import combine, contrast_losses, contrast_terms, global_counts, local_terms
from mmpt.parallel.mesh import World
from mmpt.train.clip import clip_gradients
from mmpt.train.figures import StepFigures
from mmpt.train.grad_cache import cache_contrast
from mmpt.train.optimizer import set_learning_rate
from mmpt.types import PackedBatch, UserError


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bf16 where `train.precision` asks for it, or is auto and the hardware computes it.

    Casts are not kept: autocast's cache would hold a copy of every weight, whatever FSDP cuts and `recompute` drops.
    """
    capable = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_computes_bf16()
    wanted = config.train.precision == "bf16" or (config.train.precision == "auto" and capable)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted, cache_enabled=False)


def _cpu_computes_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def train_step(
    model: MultimodalModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    step: int,
    config: RunConfig,
    world: World,
    *,
    teacher: MultimodalModel | None = None,
    detailed: bool,
) -> dict[str, float]:
    """Take step number `step` (from 0) on the rank's micro-batches.

    The returned figures are those of all ranks together, see `StepFigures.read`; `detailed` adds those that cost time.
    Raises UserError for a loss or a gradient that is not finite, before it reaches the weights.
    """
    objectives, contrastive, precision = config.objectives, config.objectives.contrastive, partial(autocast, config, world.device)
    counts = global_counts(batches, world.group)
    rate = set_learning_rate(optimizer, config.optimizer, step, config.train.steps)
    figures = StepFigures(model, batches, world.group, detailed=detailed)
    cache = None
    if contrastive.grad_cache and len(batches) > 1:
        cache = cache_contrast(model, batches, contrastive, counts, world.group, precision)
    if cache:
        figures.add_terms(contrast_terms(contrastive, cache.losses, counts), cache.losses, None)
    for number, batch in enumerate(batches):
        with precision(), torch.no_grad():
            taught = teacher(batch) if teacher else None
        with precision(), cache.repeating(number) if cache else nullcontext():
            output = model(batch)
        with precision():
            pairs = {} if cache else contrast_losses(contrastive, output.embeddings, batch.slots, counts, world.group)
            terms = {**local_terms(objectives, output, batch, counts, taught), **contrast_terms(contrastive, pairs, counts)}
        losses = combine(terms) | ({"contrastive": cache.pull(number, output.embeddings)} if cache else {})
        figures.add_terms(terms, pairs, number)
        figures.add_output(output, losses)
        loss = sum(losses.values(), torch.zeros(()))
        if loss.requires_grad:  # not where nothing in the data is to be learned
            loss.backward()
    grad_norm = clip_gradients(model, config.optimizer.clip_norm, world.group)
    figures.over_ranks()
    _refuse_infinite(step, figures.loss, grad_norm, config)
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(figures.loads)
    return figures.read(contrastive, counts) | {"grad_norm": grad_norm, "lr": rate}


def _refuse_infinite(step: int, loss: float, grad_norm: float, config: RunConfig) -> None:
    if not math.isfinite(loss + grad_norm):
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite; lower optimizer.lr "
            f"(now {config.optimizer.lr}) or raise optimizer.warmup_steps (now {config.optimizer.warmup_steps})"
        )
