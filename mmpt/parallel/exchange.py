"""Rows on their way from the ranks that make them to those that look at them: one all-to-all, and the same back for gradients.

who looks at which row of whom --make_route--> Route                      index arithmetic alone, in the loader's workers
rows (n, D) of this rank --exchange--> rows (m, D) that it looks at       memory is linear in what this rank has and sees
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.types import Route


def make_route(
    source: Int[Tensor, " looks"], row: Int[Tensor, " looks"], target: Int[Tensor, " looks"], part: int, parts: int
) -> tuple[Route, Int[Tensor, " mine"]]:
    """The way of row `row` of part `source` to part `target`, for all looks of all parts at once, as `part` has it.

    Besides: what each look of `part` finds, among the rows that it receives, in the order of the looks. A row goes to a part
    once, however often it is looked at there; rows come in order of the part that made them, and of their number there.
    """
    rows = int(row.max()) + 1 if len(row) else 1
    leaving, coming = source == part, target == part
    sent = (target[leaving] * rows + row[leaving]).unique()
    received, found = (source[coming] * rows + row[coming]).unique(return_inverse=True)
    sizes = (tuple(torch.bincount(keys // rows, minlength=parts).tolist()) for keys in (sent, received))
    send_sizes, receive_sizes = sizes
    return Route(send=sent % rows, send_sizes=send_sizes, receive_sizes=receive_sizes), found


def exchange(rows: Float[Tensor, "n D"], route: Route, group: dist.ProcessGroup | None) -> Float[Tensor, "m D"]:
    """The rows that this rank looks at. Every rank of `group` calls it, and differentiates it, with rows or without."""
    if group is None:
        return rows.index_select(0, route.send)
    return _Exchange.apply(rows, route, group)


class _Exchange(torch.autograd.Function):
    """What a rank receives for a row in the backward pass are the gradients of all ranks that looked at it: they add up."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "n D"], route: Route, group: dist.ProcessGroup) -> Float[Tensor, "m D"]:  # type: ignore[override]
        ctx.rows, ctx.route, ctx.group = len(rows), route, group
        return _all_to_all(rows.index_select(0, route.send), route.send_sizes, route.receive_sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "m D"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        route = ctx.route
        back = _all_to_all(grad.contiguous(), route.receive_sizes, route.send_sizes, ctx.group)
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_add_(0, route.send, back), None, None


def _all_to_all(
    rows: Float[Tensor, "n D"], send_sizes: tuple[int, ...], receive_sizes: tuple[int, ...], group: dist.ProcessGroup
) -> Float[Tensor, "m D"]:
    received = rows.new_empty(sum(receive_sizes), rows.shape[1])
    dist.all_to_all_single(received, rows, list(receive_sizes), list(send_sizes), group=group)
    return received
