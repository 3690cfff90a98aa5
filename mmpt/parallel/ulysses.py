"""Ulysses: for attention each of U ranks that have tokens of all heads gets all tokens of some heads (arXiv 2309.14509).

q, k, v of t tokens --tokens_to_heads--> of U t tokens, heads / U --attention--> out --heads_to_tokens--> t tokens, all heads

The tokens of U ranks come in order of rank. Each way is one all-to-all, and its gradient goes the way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def tokens_to_heads(
    q: Float[Tensor, "t heads head_dim"],
    k: Float[Tensor, "t kv_heads head_dim"],
    v: Float[Tensor, "t kv_heads head_dim"],
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of the heads for all tokens, all three in one message. Raises ValueError if they cannot be shared."""
    ranks = dist.get_world_size(group)
    if q.shape[1] % ranks or k.shape[1] % ranks:
        raise ValueError(f"{q.shape[1]} heads and {k.shape[1]} of keys cannot be shared by {ranks} ranks")
    shares = [x.unflatten(1, (ranks, -1)) for x in (q, k, v)]
    mixed = _AllToAll.apply(torch.cat(shares, dim=2).transpose(0, 1).contiguous(), group).flatten(0, 1)
    return mixed.split([share.shape[2] for share in shares], dim=1)


def heads_to_tokens(out: Float[Tensor, "T heads head_dim"], group: dist.ProcessGroup) -> Float[Tensor, "t heads head_dim"]:
    """All heads for this rank's tokens."""
    shares = out.unflatten(0, (dist.get_world_size(group), -1)).contiguous()
    return _AllToAll.apply(shares, group).transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Part r goes to rank r, and part r of the result is rank r's: the same exchange brings gradients back."""

    @staticmethod
    def forward(ctx: Any, parts: Float[Tensor, "ranks t heads head_dim"], group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "ranks t heads head_dim"]) -> tuple[Tensor, None]:  # type: ignore[override]
        return _AllToAll.apply(grad.contiguous(), ctx.group), None
