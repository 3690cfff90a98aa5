"""Learning a teacher's next tokens as a distribution, not as one token each (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.config import DistillationConfig
from mmpt.objectives.chunked import chunked_loss, product_dtype
from mmpt.objectives.tokens import RowLoss, labelled
from mmpt.types import ModelOutput, PackedBatch


def distillation_loss(output: ModelOutput, teacher: ModelOutput, batch: PackedBatch, config: DistillationConfig) -> RowLoss:
    """Sum of t^2 * KL(teacher || student) in nats, both softened by the temperature t, over labelled next-token positions.

    The factor keeps gradients as large as at t = 1. With `samples`, an estimate from that many tokens drawn from the
    teacher at each position: right on average, in value and gradient, whatever their number (arXiv 2503.16870).
    Logits of teacher and student exist for one chunk of positions at a time.
    """
    positions = labelled(batch)
    hidden, teachers = (x.output_hidden.index_select(0, positions) for x in (output, teacher))
    dtype = product_dtype(hidden, output.output_weight)
    weight, bias = teacher.output_weight.to(dtype), None if teacher.output_bias is None else teacher.output_bias.to(dtype)
    divergence = _Divergence(
        teacher_logits=lambda part: F.linear(teachers[part].to(dtype), weight, bias),
        temperature=config.temperature,
        chances=_chances(batch, config.samples)[positions] if config.samples else None,
    )
    total, rows = chunked_loss(hidden, output.output_weight, output.output_bias, divergence)
    return RowLoss(total, rows, positions)


@dataclass(frozen=True, kw_only=True)
class _Divergence:
    """The loss of a chunk of logits, see `chunked.ChunkLoss`."""

    teacher_logits: Callable[[slice], Float[Tensor, "n vocabulary"]]
    temperature: float
    chances: Float[Tensor, "n samples"] | None

    def __call__(self, logits: Float[Tensor, "n vocabulary"], part: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        t, exact = self.temperature, torch.promote_types(logits.dtype, torch.float32)
        log_p, log_q = (F.log_softmax(x.to(exact) / t, 1) for x in (self.teacher_logits(part), logits))
        if self.chances is None:
            p = log_p.exp()
            rows = (p * (log_p - log_q)).sum(1)
        else:
            drawn = draw(log_p, self.chances[part])
            rows = (log_p.gather(1, drawn) - log_q.gather(1, drawn)).mean(1)
            share = torch.full_like(drawn, 1 / drawn.shape[1], dtype=exact)
            p = torch.zeros_like(log_p).scatter_add_(1, drawn, share)
        return t**2 * rows, log_q.exp_().sub_(p).mul_(t) if differentiate else None


def draw(log_p: Float[Tensor, "n vocabulary"], chances: Float[Tensor, "n samples"]) -> Int[Tensor, "n samples"]:
    """Tokens of each row's distribution at which its cumulative sum passes the chances, uniform numbers from 0 up to 1."""
    cumulative = log_p.double().exp().cumsum_(1)  # fp64: many small probabilities add up
    return torch.searchsorted(cumulative, chances * cumulative[:, -1:], right=True).clamp_(max=log_p.shape[1] - 1)


def _chances(batch: PackedBatch, samples: int) -> Float[Tensor, "T samples"]:
    """Uniform numbers for every position, keyed by the number of its pack: the same on every layout, and when a run resumes."""
    whole = len(batch.tokens) * (batch.split.parts if batch.split else 1)
    found = torch.zeros(batch.packs, whole // batch.packs, samples, dtype=torch.float64)
    packs = zip(batch.segments.pack.tolist(), batch.segments.document.tolist(), strict=True)
    for place, document in dict(packs).items():
        generator = torch.Generator().manual_seed(batch.provenance[document].pack)
        torch.rand(found.shape[1:], generator=generator, dtype=torch.float64, out=found[place])
    found = found.flatten(0, 1).to(batch.tokens.device)
    return found if batch.split is None else found[batch.split.token_numbers]
