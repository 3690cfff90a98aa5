"""A mixture of experts in place of a feed-forward: each token goes through the few experts that its router chooses.

x (T, dim) --router--> chosen (T, k), weights (T, k)
x --copies sorted by expert--> (T * k, dim) --one product for each expert--> (T * k, dim) --weighted sum per token--> (T, dim)

There is no capacity: no token is dropped, however uneven the load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.config import ExpertsConfig
from mmpt.model.attention import Reorder
from mmpt.model.feed_forward import ACTIVATIONS, FeedForward


class Origin(NamedTuple):
    """Where the tokens of a block come from, for counting by pack."""

    pack: Int[Tensor, " T"]  # number of the pack of each token; NOTHING for padding, which does not count
    packs: int
    add_up: Callable[[Tensor], Tensor]  # counts of these tokens, over all ranks that have tokens of the same packs


class Experts(nn.Module):
    """Experts of width `hidden`, without biases, each a slice of the 3-d weights; beside them one shared by all tokens."""

    def __init__(self, dim: int, hidden: int, config: ExpertsConfig, *, activation: str, bias: bool) -> None:
        super().__init__()
        self.config, self.activation = config, ACTIVATIONS[activation]
        self.router = nn.Linear(dim, config.count, bias=False)
        wide = 2 * hidden if activation == "swiglu" else hidden
        first = nn.Parameter(torch.empty(config.count, wide, dim))
        self.register_parameter("gate_up" if activation == "swiglu" else "up", first)
        self.down = nn.Parameter(torch.empty(config.count, dim, hidden))
        self.shared = FeedForward(dim, config.shared * hidden, activation=activation, bias=bias) if config.shared else None
        if config.balance == "bias":
            self.register_buffer("bias", torch.zeros(config.count))

    def forward(
        self, x: Float[Tensor, "T dim"], origin: Origin
    ) -> tuple[Float[Tensor, "T dim"], Int[Tensor, " experts"], Float[Tensor, " packs"] | None]:
        """The output, and load and balance as in Routing. Tokens that are not valid are computed, but do not count there."""
        scores, chosen, weights = self.route(x)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        inverse = order.argsort()
        rows = _Dispatch.apply(x, order, inverse, self.config.top_k)
        rows = self.through_experts(rows, flat.bincount(minlength=self.config.count))
        rows = Reorder.apply(rows, inverse, order).unflatten(0, chosen.shape)
        out = (rows * weights[..., None].to(rows.dtype)).sum(1)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, *self._usage(scores, chosen, origin)

    def route(self, x: Float[Tensor, "T dim"]) -> tuple[Float[Tensor, "T experts"], Int[Tensor, "T k"], Float[Tensor, "T k"]]:
        """Scores of all experts, the chosen ones, and their weights, in fp32: a rounded score would send a token elsewhere.

        Softmax over all experts, the chosen ones brought to sum 1 (Mixtral, arXiv 2401.04088). Balanced by bias: sigmoids, and
        the bias takes part in the choice alone (DeepSeek-V3, arXiv 2412.19437).
        """
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.router.weight.to(wide))
            if self.config.balance == "bias":
                scores = logits.sigmoid()
                chosen = (scores + self.bias).topk(self.config.top_k, dim=-1).indices
            else:
                scores = logits.softmax(-1)
                chosen = scores.topk(self.config.top_k, dim=-1).indices
            weights = scores.gather(-1, chosen)
            return scores, chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20)  # as DeepSeek-V3: sigmoids may all be 0

    def through_experts(self, rows: Float[Tensor, "N dim"], counts: Int[Tensor, " experts"]) -> Float[Tensor, "N dim"]:
        """Rows sorted by expert, `counts` of them each, in the type of autocast."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        first = self.gate_up if "gate_up" in self._parameters else self.up
        hidden = self.activation(grouped_linear(rows.to(dtype), first.to(dtype), counts))
        return grouped_linear(hidden, self.down.to(dtype), counts)

    def _usage(
        self, scores: Float[Tensor, "T experts"], chosen: Int[Tensor, "T k"], origin: Origin
    ) -> tuple[Int[Tensor, " experts"], Float[Tensor, " packs"] | None]:
        """Load, and the auxiliary loss of each pack (Switch, arXiv 2101.03961): experts * sum over them of choices per token and
        mean score. It is top_k where all have equal shares.

        The mean is over all of a pack; the sum that makes it over these tokens: the losses of ranks that share a pack add up.
        """
        count, packs = self.config.count, origin.packs
        counted = (origin.pack >= 0).long()
        cells = origin.pack.clamp(min=0)[:, None] * count + chosen
        used = cells.new_zeros(packs * count).index_add_(0, cells.flatten(), counted[:, None].expand_as(cells).flatten())
        used = used.view(packs, count)
        if self.config.balance == "bias":
            return used.sum(0), None
        member = origin.pack == torch.arange(packs, device=cells.device)[:, None]
        used_by_all, tokens = origin.add_up(torch.cat([used, member.sum(1, keepdim=True)], dim=1)).split([count, 1], dim=1)
        tokens = tokens.clamp(min=1)
        with torch.autocast(scores.device.type, enabled=False):
            mass = member.to(scores.dtype) @ scores
        return used.sum(0), count * (used_by_all / tokens * mass / tokens).sum(-1)

    @torch.no_grad()
    def rebalance(self, load: Int[Tensor, " experts"]) -> None:
        """Raise the bias of experts with less than their share of tokens, lower that of the others (arXiv 2408.15664)."""
        load = load.to(self.bias)
        self.bias += self.config.bias_rate * (load.mean() - load).sign()


class _Dispatch(torch.autograd.Function):
    """Copy `order[i] // k` to row i. Each token has k copies, so the gradient is a gather and a sum over k, in a fixed order."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "T dim"], order: Int[Tensor, " N"], inverse: Int[Tensor, " N"], k: int):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


def grouped_linear(
    rows: Float[Tensor, "N dim"], weight: Float[Tensor, "experts out dim"], counts: Int[Tensor, " experts"]
) -> Float[Tensor, "N out"]:
    """rows @ weight[e].T, where the first counts[0] rows belong to expert 0, the next counts[1] to expert 1, and so on.

    The gradient of the weights of an expert without rows is zero.
    """
    if _has_grouped_kernel(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0).int())
    parts = rows.split(counts.tolist())
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight.unbind(0), strict=True)])


def _has_grouped_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies these in one call, which wants rows of whole multiples of 16 bytes."""
    dtypes = (torch.bfloat16,) if rows.is_cuda else (torch.bfloat16, torch.float32)
    aligned = all(size * rows.itemsize % 16 == 0 for size in weight.shape[1:])
    return rows.device.type in ("cpu", "cuda") and rows.dtype in dtypes and aligned
