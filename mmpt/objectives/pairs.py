"""The loss of matched rows of two matrices, each row against all others: as an operation of autograd's, on one rank or many.

    forward     exchange.visit:       block of columns -> tiles of logits -> loss.prepare -> loss.add; then loss.settle
    backward    exchange.visit_back:  block of columns -> the same tiles -> loss.gradient -> gradients of rows and columns

Letters: n pairs of this rank, `all` those of all ranks, E the width of an embedding.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.objectives.duplicates import Duplicates
from mmpt.objectives.gather import Gather, Shares
from mmpt.objectives.infonce import InfoNCE
from mmpt.objectives.ring import Ring
from mmpt.objectives.sigmoid import Sigmoid
from mmpt.objectives.tiles import Sweep

LOSSES = {"infonce": InfoNCE, "sigmoid": Sigmoid}
EXCHANGES = {"gather": Gather, "ring": Ring}


def pair_losses(
    a: Float[Tensor, "n E"],
    b: Float[Tensor, "n E"],
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"] | None,
    contents: Int[Tensor, "n 2"],
    *,
    loss: Literal["infonce", "sigmoid"],
    exchange: Literal["gather", "ring"],
    group: dist.ProcessGroup | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"], Float[Tensor, ""], Int[Tensor, " n"]]:
    """The summed loss of this rank's pairs (a[i], b[i]), the loss of each, and hits and negatives as in PairLoss.

    Vectors have unit length. Products are computed in their type: of fp32 vectors in fp32, under autocast as well, since cosines
    times 100 want more than bf16's three digits; of bf16 vectors in bf16, with exponentials and sums in fp32. Only the first
    result has a graph.

    Each cell of the table is computed by one rank alone, so a rank's gradients hold parts of other ranks' losses: every rank of
    the group must call this, and differentiate it, each with the same factor before its sum.
    """
    shares = Shares.of(a.shape[0], a.device, group)
    duplicates = Duplicates(shares.gather(contents), shares.own)
    way = EXCHANGES[exchange](shares)
    total, rows, correct = _PairLosses.apply(a, b, scale, bias if loss == "sigmoid" else None, loss, way, duplicates)
    return total, rows, correct, duplicates.negatives


class _PairLosses(torch.autograd.Function):
    """Gradients by hand: of both sides, of the scale and of the bias."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        a: Float[Tensor, "n E"],
        b: Float[Tensor, "n E"],
        scale: Float[Tensor, "1"],
        bias: Float[Tensor, "1"] | None,
        kind: str,
        exchange: Gather | Ring,
        duplicates: Duplicates,
    ) -> tuple[Tensor, Tensor, Tensor]:
        a = a.contiguous()
        loss = LOSSES[kind](exchange.shares, scale, bias, a.dtype, a.device)
        sweep = Sweep(loss, exchange.shares, duplicates, float(scale), a)
        opened = exchange.open(b)
        exchange.visit(opened, lambda start, block: sweep.measure(a, start, block))
        while not sweep.settle():
            exchange.visit(opened, lambda start, block: sweep.measure(a, start, block))
        ctx.save_for_backward(a, opened, scale)
        ctx.sweep, ctx.exchange = sweep, exchange
        rows, correct = loss.rows.to(torch.promote_types(a.dtype, torch.float32)), sweep.correct()
        ctx.mark_non_differentiable(rows, correct)
        return loss.rows.sum().to(rows.dtype), rows, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Float[Tensor, ""], *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, opened, scale = ctx.saved_tensors
        sweep, exchange = ctx.sweep, ctx.exchange
        grad_a, dtype = sweep.start_back(a, factor, exchange.blocks)
        grad_b = exchange.visit_back(opened, lambda start, block, grad: sweep.differentiate(a, start, block, grad_a, grad), dtype)
        of_scale, of_bias = (None if x is None else (factor * x).to(scale.dtype) for x in (sweep.cosines, sweep.bias_gradient))
        return (
            grad_a.to(a.dtype),
            grad_b.to(a.dtype),
            of_scale.reshape(1),
            None if of_bias is None else of_bias.reshape(1),
            None,
            None,
            None,
        )
