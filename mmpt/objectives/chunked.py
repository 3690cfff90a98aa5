"""Losses through the output layer without the logits of all positions: a chunk of them at a time.

hidden (n, D) --chunk--> logits (chunk, V) --loss--> rows (chunk), d logits --> d hidden, d weight, d bias --> next chunk

The gradients are made in the forward pass, while a chunk's logits are there: three products per chunk, and none of them
twice. Memory is linear in n: the logits of one chunk, and one gradient of the output layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS, LOGITS_ON_ACCELERATOR = 2**25, 2**27
"""How many logits exist at once. Fewer would spend their time on the weight and its gradient, which every chunk goes through."""

ChunkLoss = Callable[
    [Float[Tensor, "n vocabulary"], slice, bool], tuple[Float[Tensor, " n"], Float[Tensor, "n vocabulary"] | None]
]
"""(logits of some rows, which rows they are, whether to differentiate) -> loss of each row, its gradient by the logits."""


def chunked_loss(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "vocabulary D"],
    bias: Float[Tensor, " vocabulary"] | None,
    loss_of: ChunkLoss,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """Sum over rows of a loss of their logits, `hidden @ weight.T + bias`, with the graph; and the rows themselves, detached.

    Products run in the type of the autocast in force; `loss_of` works in at least fp32, as do the sums over chunks. Without
    rows the sum is 0 and every gradient zeros, so that a rank with nothing to predict takes part in collectives.
    """
    if not len(hidden):  # the graph, without a gradient of the size of the output layer
        nothing = sum(t.sum() for t in (hidden, weight[:0], *(() if bias is None else (bias[:0],))))
        return nothing.to(torch.promote_types(nothing.dtype, torch.float32)), hidden.new_empty(0)
    return _ChunkedLoss.apply(hidden, weight, bias, loss_of)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which logits are made."""
    device = hidden.device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else torch.promote_types(hidden.dtype, weight.dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss_of: ChunkLoss
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
        dtype = product_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, gradients = _in_chunks(hidden, weight, bias, loss_of, dtype, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [t if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Float[Tensor, ""], _: Tensor):  # type: ignore[override]
        scaled = (
            None if gradient is None else (gradient * d_sum).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_of: ChunkLoss,
    dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
) -> tuple[Float[Tensor, " n"], list[Tensor | None]]:
    """Loss of every row, and the gradients of their sum that are wanted, by (hidden, weight, bias)."""
    exact = torch.promote_types(dtype, torch.float32)
    rows = hidden.new_empty(len(hidden), dtype=exact)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight, d_bias = (torch.zeros_like(t, dtype=exact) if w else None for t, w in zip((weight, bias), wanted[1:], strict=True))
    compute_weight, compute_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    size = max((LOGITS if hidden.device.type == "cpu" else LOGITS_ON_ACCELERATOR) // len(weight), 1)
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        inputs = hidden[part].to(dtype)
        rows[part], d_logits = loss_of(F.linear(inputs, compute_weight, compute_bias), part, any(wanted))
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        if any(wanted):
            d_logits = d_logits.to(dtype)
        if d_hidden is not None:
            d_hidden[part] = d_logits @ compute_weight
        if d_weight is not None and dtype == exact:
            d_weight.addmm_(d_logits.T, inputs)
        elif d_weight is not None:
            d_weight += d_logits.T @ inputs
    return rows, [d_hidden, d_weight, d_bias]
