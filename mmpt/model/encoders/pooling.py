"""From the states of an item to one vector.

    x (N, dim) --rows of equal number together--> (items, rows, dim) --mean, or attention--> (M, dim) or (M, E)

The attention pool is CoCa's (arXiv 2205.01917) in open_clip's form, `attentional_pool: true`: a learned query reads the
normalised states by cross-attention in the width of the embedding, then a norm; there is no residual and no feed-forward.
What the names are in open_clip's `visual`, for a tower whose `pool` is attention:

    transformer.norm       attn_pool.ln_k         (the states' norm: open_clip has no other behind its blocks here)
    pool.query             attn_pool.query[0]     (the first query is the one that `pool_type: tok` takes)
    pool.query_norm        attn_pool.ln_q
    pool.q, .k, .v         weight: attn_pool.attn.{q,k,v}_proj_weight, or where width and embed_dim are equal the three parts
                           of attn_pool.attn.in_proj_weight; bias: the three parts of attn_pool.attn.in_proj_bias
    pool.out               attn_pool.attn.out_proj
    pool.norm              ln_post
    head.weight            proj, transposed
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.config import BlocksConfig
from mmpt.model.attention import Reorder
from mmpt.model.layers import make_norm

POOL_HEADS = 8  # of every published tower with such a pool


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What an encoder makes of the media of a batch."""

    features: Float[Tensor, "rows D"] | None  # item after item; None without a shared transformer to read them
    pooled: Float[Tensor, "M E"] | None  # not of unit length; None without contrast at the tower level


class AttentionPool(nn.Module):
    """One learned query that attends to the states of an item."""

    def __init__(self, config: BlocksConfig, embedding_dim: int) -> None:
        super().__init__()
        self.heads = math.gcd(POOL_HEADS, embedding_dim)
        self.query = nn.Parameter(torch.empty(embedding_dim))
        self.query_norm = make_norm(config.norm, embedding_dim, config.norm_eps)
        self.q = nn.Linear(embedding_dim, embedding_dim, bias=config.bias)
        self.k = nn.Linear(config.dim, embedding_dim, bias=config.bias)
        self.v = nn.Linear(config.dim, embedding_dim, bias=config.bias)
        self.out = nn.Linear(embedding_dim, embedding_dim, bias=config.bias)
        self.norm = make_norm(config.norm, embedding_dim, config.norm_eps)

    def forward(self, x: Float[Tensor, "N dim"], lengths: Int[Tensor, " M"]) -> Float[Tensor, "M E"]:
        query = self.q(self.query_norm(self.query[None]))
        keys_values = torch.cat([self.k(x), self.v(x)], dim=-1)

        def read(rows: Float[Tensor, "items rows both"]) -> Float[Tensor, "items E"]:
            q = rearrange(query.expand(len(rows), -1), "n (h d) -> n h 1 d", h=self.heads)
            k, v = rearrange(rows, "n l (two h d) -> two n h l d", two=2, h=self.heads)
            return rearrange(F.scaled_dot_product_attention(q.to(k.dtype), k, v), "n h 1 d -> n (h d)")

        return self.norm(self.out(reduce_items(keys_values, lengths, read)))

    @torch.no_grad()
    def initialize(self) -> None:
        nn.init.normal_(self.query)
        for norm in (self.query_norm, self.norm):
            norm.reset_parameters()
        for linear in (self.q, self.k, self.v, self.out):
            initialize_linear(linear)


def reduce_items(
    x: Float[Tensor, "N dim"], lengths: Int[Tensor, " M"], function: Callable[[Tensor], Tensor]
) -> Float[Tensor, "M out"]:
    """What `function`, from (items, rows, dim) to (items, out), makes of items of equal length, in the order of all items.

    Nothing is padded, and no sum runs over the rows of two items: an item's vector does not depend on the others.
    """
    distinct, which = lengths.unique(return_inverse=True)
    if len(distinct) == 1:
        return function(x.unflatten(0, (len(lengths), -1)))
    counts = which.bincount().tolist()
    order = which.repeat_interleave(lengths).argsort(stable=True)
    sizes = [count * length for count, length in zip(counts, distinct.tolist(), strict=True)]
    groups = Reorder.apply(x, order, order.argsort()).split(sizes)
    reduced = torch.cat([function(rows.unflatten(0, (count, -1))) for rows, count in zip(groups, counts, strict=True)])
    members = which.argsort(stable=True)
    return Reorder.apply(reduced, members.argsort(), members)


def mean_of_items(x: Float[Tensor, "N dim"], lengths: Int[Tensor, " M"]) -> Float[Tensor, "M dim"]:
    """Mean of the rows of each item, in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return reduce_items(x, lengths, lambda rows: rows.mean(1, dtype=wide))


def initialize_linear(module: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
    """Normal weights that keep a vector's length, biases of 0."""
    nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    if module.bias is not None:
        nn.init.zeros_(module.bias)
