"""A stack of transformer blocks over packed tokens: the shared transformer, and the body of the encoders.

x (T, dim) --reorder--> blocks: attention within segments, feed-forward or experts --last norm, reorder back--> (T, dim)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmpt.config import BlocksConfig, ExpertsConfig
from mmpt.model.attention import AttentionLayout, Reorder, kernel_dtype
from mmpt.model.experts import Experts, Origin
from mmpt.model.feed_forward import FeedForward
from mmpt.model.layers import RMSNorm, local, make_norm, rms_norm, rotate
from mmpt.types import Routing

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine, as `rotary_angles` gives them."""


class Attention(nn.Module):
    """What stands around grouped-query attention; queries and keys may be normalised (arXiv 2302.05442) and turned.

    The rows of `qkv` stand by head of keys: the queries that share it, its keys, its values. So each range of such heads, as one
    rank of several may have it, is a range of rows.
    """

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        self.sharing, self.head_dim = config.n_heads // config.kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (config.n_heads + 2 * config.kv_heads) * self.head_dim, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)

    def heads(self, x: Float[Tensor, "T dim"], rotary: Rotary | None, short: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, heads, head_dim), keys and values (T, kv_heads, head_dim): as many as `qkv` has rows for."""
        heads = self.qkv(x).unflatten(-1, (-1, self.sharing + 2, self.head_dim))
        if self.q_norm is None and rotary is None:
            heads = heads.to(kernel_dtype(heads, short))  # in one piece: casting each of the three is slow
            return tuple(part.flatten(1, 2) for part in heads.split([self.sharing, 1, 1], dim=2))
        # Queries and keys side by side: half the passes over memory.
        queries_keys, v = heads.split([self.sharing + 1, 1], dim=2)
        if self.q_norm is not None:
            weight = torch.cat([local(self.q_norm.weight).expand(self.sharing, -1), local(self.k_norm.weight)[None]])
            queries_keys = rms_norm(queries_keys, weight, self.q_norm.eps)
        if rotary is not None:
            queries_keys = rotate(queries_keys, *(angles[:, None] for angles in rotary))
        q, k = queries_keys.split([self.sharing, 1], dim=2)
        return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)


def _once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class Block(nn.Module):
    """Attention, then feed-forward or experts, each added to what it reads; norms stand before them, or behind the sums."""

    def __init__(self, config: BlocksConfig, experts: ExpertsConfig | None) -> None:
        super().__init__()
        kinds = {"activation": config.activation, "bias": config.bias}
        self.pre = config.norm_placement == "pre"
        self.attention_norm = make_norm(config.norm, config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config.norm, config.dim, config.norm_eps)
        if experts is None:
            self.ffn = FeedForward(config.dim, config.ffn_dim, **kinds)
        else:
            self.ffn = Experts(config.dim, config.ffn_dim, experts, **kinds)

    def forward(
        self,
        x: Float[Tensor, "T dim"],
        layout: AttentionLayout,
        rotary: Rotary | None,
        origin: Origin | None,
        around: Callable[..., Any] = _once,
    ) -> tuple[Float[Tensor, "T dim"], Int[Tensor, " experts"] | None, Float[Tensor, " packs"] | None]:
        """The hidden states, and the load and balance of experts: plain tensors, which recomputation can pass on.

        `around` calls what stands around attention, with its arguments.
        """
        mixed = layout.attend(*around(self.before, x, rotary, layout.short))
        return around(self.after, x, mixed, origin)

    def before(self, x: Float[Tensor, "T dim"], rotary: Rotary | None, short: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads."""
        return self.attention.heads(self.attention_norm(x) if self.pre else x, rotary, short)

    def after(
        self, x: Float[Tensor, "T dim"], mixed: Float[Tensor, "T heads head_dim"], origin: Origin | None
    ) -> tuple[Float[Tensor, "T dim"], Int[Tensor, " experts"] | None, Float[Tensor, " packs"] | None]:
        """What is done with what it gives."""
        x = x + self.attention.out(mixed.flatten(1))
        x = x if self.pre else self.attention_norm(x)
        change, load, balance = self._feed(self.ffn_norm(x) if self.pre else x, origin)
        x = x + change
        return x if self.pre else self.ffn_norm(x), load, balance

    def _feed(self, x: Float[Tensor, "T dim"], origin: Origin | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.ffn(x, origin) if isinstance(self.ffn, Experts) else (self.ffn(x), None, None)


class Transformer(nn.Module):
    """`layers` blocks; a last norm if norms stand before the parts.

    `recompute`, which is set from outside, says what the backward pass computes anew: full: whole blocks (arXiv 1604.06174);
    selective: all of them but matrix products and attention, which can be differentiated once only.
    """

    def __init__(self, config: BlocksConfig, *, experts: ExpertsConfig | None = None) -> None:
        super().__init__()
        self.recompute: Literal["none", "selective", "full"] = "none"
        self.blocks = nn.ModuleList(Block(config, experts) for _ in range(config.layers))
        self.norm = make_norm(config.norm, config.dim, config.norm_eps) if config.norm_placement == "pre" else None

    def forward(
        self,
        x: Float[Tensor, "T dim"],
        layout: AttentionLayout,
        rotary: Rotary | None = None,
        origin: Origin | None = None,
    ) -> tuple[Float[Tensor, "T dim"], tuple[Routing, ...]]:
        """Hidden states, and how experts were used, layer by layer.

        `x`, `rotary` (see mmpt.model.rotary) and `origin`, which experts alone ask for, stand in the order of the batch. A layout
        without an order leaves them in it.
        """
        order = layout.order
        if order is not None:
            rotary = None if rotary is None else (rotary[0][order], rotary[1][order])
            origin = None if origin is None else origin._replace(pack=origin.pack[order])
            x = Reorder.apply(x, order, layout.inverse)
        routing = []
        for block in self.blocks:
            x, load, balance = self._run(block, x, layout, rotary, origin)
            if load is not None:
                routing.append(Routing(load=load, balance=balance))
        x = x if self.norm is None else self.norm(x)
        return x if order is None else Reorder.apply(x, layout.inverse, order), tuple(routing)

    def _run(self, block: Block, *args):
        if self.recompute == "none" or not torch.is_grad_enabled():
            return block(*args)
        if self.recompute == "full":
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args, _selective)  # attention stays out of it: it keeps what it needs, and a ring's messages went once

    def compile_blocks(self) -> None:
        """Compile what stands around attention (torch.compile). Attention and experts depend on segments and loads, which would
        have them compiled for every batch."""
        for block in self.blocks:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)
            if isinstance(block.ffn, Experts):
                block.ffn.through_experts = torch.compiler.disable(block.ffn.through_experts)

    @torch.no_grad()
    def rebalance(self, load: Int[Tensor, "layers experts"]) -> None:
        """After a step, with the loads of all ranks: bias-balanced routing moves its biases."""
        layers = [block.ffn for block in self.blocks if isinstance(block.ffn, Experts)]
        for experts, used in zip(layers, load, strict=True):
            experts.rebalance(used)

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal weights that keep a vector's length; those that write into the residual stream shrink with depth (GPT-2).

        Routers start small, so that experts start with nearly equal shares.
        """
        shrink = (2 * max(len(self.blocks), 1)) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name.split(".")[-2]:
                nn.init.ones_(parameter)
            else:
                part = name.removesuffix(".weight")
                into_residual = part.endswith(("attention.out", "ffn.down", "shared.down"))
                scale = shrink if into_residual else 0.1 if part.endswith("router") else 1.0
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * scale)
        for name, buffer in self.named_buffers():
            if name.endswith("ffn.bias"):
                nn.init.zeros_(buffer)


_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,  # of products, over the ranks that have their parts
}


def _keep(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _selective(function: Callable[..., Any], *args: Any) -> Any:
    """Call it; what it computes is computed anew in the backward pass, but for _SAVED."""
    contexts = partial(create_selective_checkpoint_contexts, _keep)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
