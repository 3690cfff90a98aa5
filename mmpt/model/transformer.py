"""A stack of pre-norm transformer blocks over packed tokens: the shared transformer, and the body of the encoders."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.model.attention import AttentionLayout, Reorder, attend, rotary_angles
from mmpt.model.layers import RMSNorm, rms_norm, rotate, swiglu


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys (arXiv 2302.05442) and rotary positions."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, norm_eps: float, *, causal: bool) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.causal = n_heads, n_kv_heads, dim // n_heads, causal
        self.qkv = nn.Linear(dim, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, norm_eps)
        self.k_norm = RMSNorm(self.head_dim, norm_eps)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "T dim"], layout: AttentionLayout, rotary: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "T dim"]:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        queries_keys, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        weight = torch.cat([self.q_norm.weight.expand(self.n_heads, -1), self.k_norm.weight.expand(self.n_kv_heads, -1)])
        # Queries and keys side by side: half the passes over memory.
        queries_keys = rotate(rms_norm(queries_keys, weight, self.q_norm.eps), *rotary)
        q, k = queries_keys.split([self.n_heads, self.n_kv_heads], dim=1)
        mixed = attend(q, k, v, layout, causal=self.causal)
        return self.out(mixed.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU, arXiv 2002.05202."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "T dim"]) -> Float[Tensor, "T dim"]:
        return self.down(swiglu(self.gate_up(x)))


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, ffn_dim: int, norm_eps: float, *, causal: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = Attention(dim, n_heads, n_kv_heads, norm_eps, causal=causal)
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.ffn = FeedForward(dim, ffn_dim)

    def forward(
        self, x: Float[Tensor, "T dim"], layout: AttentionLayout, rotary: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "T dim"]:
        x = x + self.attention(self.attention_norm(x), layout, rotary)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """`layers` blocks and a last norm.

    Positions have one row for text and one per spatial axis for media; a head's rotary pairs are shared out over the rows.
    """

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        n_heads: int,
        n_kv_heads: int,
        ffn_dim: int,
        causal: bool,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = dim // n_heads, rope_theta
        self.blocks = nn.ModuleList(Block(dim, n_heads, n_kv_heads, ffn_dim, norm_eps, causal=causal) for _ in range(layers))
        self.norm = RMSNorm(dim, norm_eps)

    def forward(
        self, x: Float[Tensor, "T dim"], positions: Int[Tensor, "axes T"], layout: AttentionLayout
    ) -> Float[Tensor, "T dim"]:
        rotary = rotary_angles(positions[:, layout.order], self.head_dim, self.rope_theta)
        x = Reorder.apply(x, layout.order, layout.inverse)
        for block in self.blocks:
            x = block(x, layout, rotary)
        return Reorder.apply(self.norm(x), layout.inverse, layout.order)

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal weights that keep a vector's length; those that write into the residual stream shrink with depth (GPT-2)."""
        shrink = (2 * max(len(self.blocks), 1)) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_residual = name.endswith(("attention.out", "ffn.down"))
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * (shrink if into_residual else 1.0))
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
