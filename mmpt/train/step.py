"""One optimizer step: micro-batches forward and backward, losses over the step's global counts, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmpt.config import RunConfig
from mmpt.objectives.combine import combine, global_counts, loss_terms
from mmpt.parallel.mesh import World
from mmpt.train.optimizer import learning_rate
from mmpt.types import PackedBatch, UserError


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bf16 where `train.precision` asks for it, or is auto and the hardware computes it."""
    capable = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_computes_bf16()
    wanted = config.train.precision == "bf16" or (config.train.precision == "auto" and capable)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def _cpu_computes_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[PackedBatch], step: int, config: RunConfig, world: World
) -> dict[str, float]:
    """Take step number `step` (from 0) on the rank's micro-batches; the returned figures are those of all ranks together."""
    counts = global_counts(batches, world.group)
    rate = learning_rate(config.optimizer, step, config.train.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with autocast(config, world.device):
            output = model(batch)
            terms, contrast = loss_terms(config.objectives, output, batch, counts, world.group)
        loss = combine(terms)
        loss.backward()
        figures = {"loss": loss} | {f"loss/{name}": term.value for name, term in terms.items()}
        figures |= {"contrast/correct": contrast.correct, "contrast/negatives": contrast.negatives}
        sums = {name: sums.get(name, 0.0) + value.detach() for name, value in figures.items()}
    grad_norm = _clip(model, config.optimizer.clip_norm)
    report = _over_ranks(sums, world)
    if not math.isfinite(report["loss"] + grad_norm):
        raise UserError(
            f"step {step}: loss {report['loss']}, gradient norm {grad_norm}: not finite; lower optimizer.lr "
            f"(now {config.optimizer.lr}) or raise optimizer.warmup_steps (now {config.optimizer.warmup_steps})"
        )
    optimizer.step()
    optimizer.zero_grad()
    pairs = max(counts["contrastive"], 1)
    report["contrast/batch_R@1"] = report.pop("contrast/correct") / (2 * pairs)
    report["contrast/negatives"] /= pairs
    return report | {
        "grad_norm": grad_norm,
        "lr": rate,
        "logit_scale": float(output.logit_scale.detach()),
        "tokens_predicted": counts["next_token"],
        "pairs": counts["contrastive"],
        "documents": counts["documents"],
    }


def _clip(model: nn.Module, max_norm: float) -> float:
    """The norm of the whole gradient, before clipping. Under FSDP it is a DTensor, and `full_tensor` sums it over ranks.

    Torch sums squares in fp32: over shards the sums are shorter and lose less, some 1e-6 of the norm.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _over_ranks(sums: dict[str, Tensor], world: World) -> dict[str, float]:
    values = torch.stack([value.float().squeeze() for value in sums.values()])
    if world.group is not None:
        dist.all_reduce(values, group=world.group)
    return dict(zip(sums, values.tolist(), strict=True))
