"""Attention inside segments of a packed batch, and the rotary positions that it uses.

    document_ids --AttentionLayout--> order: segments of equal length stand together
    q, k, v (in that order) --attend--> out: one kernel call for each distinct length, no mask and no padding

Tokens are reordered once on the way into a stack of blocks and once on the way out, not in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

SHORT = 256


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """Which tokens attend to one another: those of one segment."""

    order: Int[Tensor, " T"]  # the token that stands at each place
    inverse: Int[Tensor, " T"]  # the place of each token
    groups: tuple[tuple[int, int], ...]  # (number of segments, their length), one after the other

    @classmethod
    def from_lengths(cls, lengths: Int[Tensor, " segments"]) -> AttentionLayout:
        """The layout of segments that lie end to end with these lengths, each at least 1."""
        starts = lengths.cumsum(0) - lengths
        order, groups = [], []
        for length in lengths.unique().tolist():
            members = starts[lengths == length]
            order.append((members[:, None] + torch.arange(length, device=lengths.device)).flatten())
            groups.append((len(members), length))
        flat = torch.cat(order) if order else lengths.new_zeros(0)
        return cls(order=flat, inverse=flat.argsort(), groups=tuple(groups))

    @classmethod
    def from_document_ids(cls, document_ids: Int[Tensor, " T"]) -> AttentionLayout:
        """A segment is a run of one number. A token of padding (a negative number) is a segment of its own."""
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[1:] = (document_ids[1:] != document_ids[:-1]) | (document_ids[1:] < 0)
        edges = torch.cat([starts.nonzero().flatten(), document_ids.new_tensor([len(document_ids)])])
        return cls.from_lengths(edges.diff())


class Reorder(torch.autograd.Function):
    """x[order], where `order` is a permutation: its gradient is a gather as well, not a sum over repeated indices."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "T D"], order: Int[Tensor, " T"], inverse: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "T D"]):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def attend(
    q: Float[Tensor, "T heads head_dim"],
    k: Float[Tensor, "T kv_heads head_dim"],
    v: Float[Tensor, "T kv_heads head_dim"],
    layout: AttentionLayout,
    *,
    causal: bool,
) -> Float[Tensor, "T heads head_dim"]:
    """Scaled dot-product attention within segments; tokens stand in `layout.order`. Grouped queries share keys in order of heads.

    The kernel computes in the type of v, but for short segments on a CPU: torch's bf16 kernel packs each segment for
    the matrix unit, which below SHORT tokens takes up to ten times as long as plain fp32.
    """
    short = all(length < SHORT for _, length in layout.groups)
    dtype = torch.promote_types(v.dtype, torch.float32) if v.device.type == "cpu" and short else v.dtype
    sizes = [count * length for count, length in layout.groups]
    grouped = q.shape[1] != k.shape[1]
    out = []
    with torch.autocast(v.device.type, enabled=False):
        for (count, _), *parts in zip(layout.groups, *(x.to(dtype).split(sizes) for x in (q, k, v)), strict=True):
            queries, keys, values = (rearrange(part, "(n l) h d -> n h l d", n=count) for part in parts)
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, enable_gqa=grouped)
            out.append(rearrange(mixed, "n h l d -> (n l) h d"))
    return torch.cat(out).to(v.dtype) if out else q


def rotary_angles(
    positions: Int[Tensor, "axes T"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "T 1 half"], Float[Tensor, "T 1 half"]]:
    """Cosine and sine of every pair's angle (RoFormer, arXiv 2104.09864); a head's pairs are shared out evenly over the axes."""
    per_axis = head_dim // 2 // len(positions)
    frequency = theta ** -(torch.arange(per_axis, device=positions.device, dtype=torch.float32) / per_axis)
    angles = rearrange(positions.float()[..., None] * frequency, "axes t f -> t 1 (axes f)")
    return angles.cos(), angles.sin()
