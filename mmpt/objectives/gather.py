"""Rows of all ranks, with the gradient that a single process would see."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Float[Tensor, "n width"], sizes: list[int], group: dist.ProcessGroup) -> Float[Tensor, "all width"]:
        ctx.sizes, ctx.group = sizes, group
        return _gather(rows, sizes, group)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "all width"]):  # type: ignore[override]
        # Every rank used every row, so a row's gradient is the sum over ranks.
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None


def gather_rows(rows: Float[Tensor, "n width"] | Int[Tensor, "n width"], group: dist.ProcessGroup | None) -> tuple[Tensor, slice]:
    """All ranks' rows in order of rank, and the slice that is this rank's own. Counts may differ, and may be 0.

    Without a group: the rows themselves. Carries gradients: backward sums over ranks.
    """
    if group is None:
        return rows, slice(0, len(rows))
    sizes = _sizes(len(rows), rows.device, group)
    start = sum(sizes[: dist.get_rank(group)])
    gathered = _GatherRows.apply(rows, sizes, group) if rows.requires_grad else _gather(rows, sizes, group)
    return gathered, slice(start, start + len(rows))


def _sizes(n: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([n], device=device), group=group)
    return sizes.tolist()


def _gather(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Collectives want equal shapes: pad to the largest count, gather, cut."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(len(sizes) * max(sizes), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(gathered.split(max(sizes)), sizes, strict=True)]) if max(sizes) else rows
