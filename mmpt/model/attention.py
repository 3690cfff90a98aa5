"""Attention inside segments of a packed batch.

    document_ids --AttentionLayout--> order: segments of equal length stand together
    q, k, v (in that order) --layout.attend--> out: one kernel call for each distinct length, no padding

Tokens are reordered once on the way into a stack of blocks and once on the way out, not in every layer. Causal and bidirectional
attention need no mask; a sliding window, or media that see themselves, are masked a bounded block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

SHORT = 256
MASK_ELEMENTS = 2**24
"""The most elements of a mask that there are at once."""


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """Which tokens attend to one another: those of one segment, as far as causality, window and spans allow."""

    order: Int[Tensor, " T"]  # the token that stands at each place
    inverse: Int[Tensor, " T"]  # the place of each token
    cu_seqlens: Int[Tensor, "S_plus_1"]  # segment s stands at the places cu_seqlens[s] : cu_seqlens[s + 1]; int32
    groups: tuple[tuple[int, int], ...]  # (number of segments, their length), one after the other
    spans: tuple[Int[Tensor, "n length"] | None, ...]  # of every group: the media span of each token, or -1; None without any
    causal: bool
    window: int | None  # tokens that a token looks back on, itself among them; None: all
    short: bool  # whether every segment has fewer than SHORT tokens

    @classmethod
    def from_lengths(
        cls, lengths: Int[Tensor, " S"], *, causal: bool, window: int | None = None, spans: Int[Tensor, " T"] | None = None
    ) -> AttentionLayout:
        """The layout of segments that lie end to end with these lengths, each at least 1.

        `spans` numbers the media span that a token belongs to, or -1: the tokens of one span within one segment see one another
        besides what is causal.
        """
        assert causal or (window is None and spans is None), "without causality all of a segment is seen already"
        assert window is None or spans is None, "a window over spans is not defined"
        starts = lengths.cumsum(0) - lengths
        masked = torch.zeros_like(lengths) if spans is None else _segments_with_spans(lengths, spans)
        rank = (2 * lengths + masked).argsort(stable=True)
        sorted_lengths = lengths[rank]
        edges = F.pad(sorted_lengths.cumsum(0), (1, 0))
        places = torch.arange(int(lengths.sum()), device=lengths.device)
        order = (starts[rank] - edges[:-1]).repeat_interleave(sorted_lengths) + places
        kinds, counts = torch.stack([sorted_lengths, masked[rank]]).unique_consecutive(return_counts=True, dim=1)
        (group_lengths, group_masked), group_counts = kinds.tolist(), counts.tolist()
        groups = tuple(zip(group_counts, group_lengths, strict=True))
        return cls(
            order=order,
            inverse=order.argsort(),
            cu_seqlens=edges.int(),
            groups=groups,
            spans=_group_spans(spans, order, groups, group_masked),
            causal=causal,
            window=window,
            short=all(length < SHORT for length in group_lengths),
        )

    @classmethod
    def from_document_ids(
        cls, document_ids: Int[Tensor, " T"], *, causal: bool, window: int | None = None, spans: Int[Tensor, " T"] | None = None
    ) -> AttentionLayout:
        """A segment is a run of one number. A token of padding (a negative number) is a segment of its own."""
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[1:] = (document_ids[1:] != document_ids[:-1]) | (document_ids[1:] < 0)
        edges = torch.cat([starts.nonzero().flatten(), document_ids.new_tensor([len(document_ids)])])
        return cls.from_lengths(edges.diff(), causal=causal, window=window, spans=spans)

    def attend(
        self,
        q: Float[Tensor, "T heads head_dim"],
        k: Float[Tensor, "T kv_heads head_dim"],
        v: Float[Tensor, "T kv_heads head_dim"],
    ) -> Float[Tensor, "T heads head_dim"]:
        """Scaled dot-product attention within segments; tokens stand in `order`. Grouped queries share keys in order of heads.

        The kernel computes in `kernel_dtype`; the result is of the type of v.
        """
        with torch.autocast(v.device.type, enabled=False):
            if _has_varlen_kernel(v, self):
                return _attend_varlen(q.to(v.dtype), k.to(v.dtype), v, self)
            dtype = kernel_dtype(v, self.short)
            sizes = [count * length for count, length in self.groups]
            out = []
            for (count, length), spans, *rows in zip(
                self.groups, self.spans, *(_split(x.to(dtype), sizes) for x in (q, k, v)), strict=True
            ):
                queries, keys, values = (rearrange(part, "(n l) h d -> n h l d", n=count) for part in rows)
                if spans is None and (self.window is None or length <= self.window):
                    mixed = _sdpa(queries, keys, values, is_causal=self.causal)
                else:
                    mixed = _attend_masked(queries, keys, values, self.window, spans)
                out.append(rearrange(mixed, "n h l d -> (n l) h d"))
            if not out:
                return q.to(v.dtype)
            return (out[0] if len(out) == 1 else torch.cat(out)).to(v.dtype)


def _segments_with_spans(lengths: Int[Tensor, " S"], spans: Int[Tensor, " T"]) -> Int[Tensor, " S"]:
    """1 for a segment with a span in it, else 0."""
    inside = F.pad((spans >= 0).long().cumsum(0), (1, 0))
    stops = lengths.cumsum(0)
    return (inside[stops] > inside[stops - lengths]).long()


def _group_spans(
    spans: Int[Tensor, " T"] | None, order: Int[Tensor, " T"], groups: tuple[tuple[int, int], ...], masked: list[int]
) -> tuple[Int[Tensor, "n length"] | None, ...]:
    if spans is None:
        return (None,) * len(groups)
    parts = spans[order].split([count * length for count, length in groups])
    return tuple(part.view(count, -1) if has else None for part, (count, _), has in zip(parts, groups, masked, strict=True))


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


def kernel_dtype(x: Tensor, short: bool) -> torch.dtype:
    """The type in which attention over x is computed: its own, but for `short` segments on a CPU.

    torch's bf16 kernel packs each segment for the matrix unit, which below SHORT tokens takes up to ten times as long as plain
    fp32.
    """
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" and short else x.dtype


def _split(x: Float[Tensor, "T h d"], sizes: list[int]) -> tuple[Float[Tensor, "t h d"], ...]:
    """x.split(sizes), whose gradient would copy even where nothing is split."""
    return (x,) if len(sizes) == 1 else x.split(sizes)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kinds) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:  # where but one kernel shares keys, and without it all scores would be kept
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **kinds)


def _attend_masked(
    q: Float[Tensor, "n h l d"],
    k: Float[Tensor, "n hk l d"],
    v: Float[Tensor, "n hk l d"],
    window: int | None,
    spans: Int[Tensor, "n l"] | None,
) -> Float[Tensor, "n h l d"]:
    """Causal attention with a window or spans, a block of queries at a time; masks are made anew in the backward pass."""
    count, length = q.shape[0], q.shape[2]
    if spans is not None:
        some = max(1, MASK_ELEMENTS // length**2)  # segments at once
        if count > some:
            pieces = zip(*(x.split(some) for x in (q, k, v)), spans.split(some), strict=True)
            return torch.cat([_attend_masked(*piece[:3], None, piece[3]) for piece in pieces])
    out = []
    for start, stop, first, last in _blocks(count if spans is not None else 1, length, window):
        block = (q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], start, first, window, spans)
        out.append(checkpoint(_attend_block, *block, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(out, dim=2)


def _blocks(masks: int, length: int, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(start, stop) of blocks of queries, and (first, last) of the keys that they may see."""
    if window is None:
        step = max(1, min(length, MASK_ELEMENTS // (masks * length)))
    else:
        rows = max(window, SHORT)
        step = max(1, min(rows, MASK_ELEMENTS // (2 * rows)))
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield (start, stop, 0, length) if window is None else (start, stop, max(0, start - window + 1), stop)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, start: int, first: int, window: int | None, spans: Tensor | None) -> Tensor:
    mask = _mask(start, q.shape[2], first, k.shape[2], window, spans, q.device)
    return _sdpa(q, k, v, attn_mask=mask)


def _mask(
    start: int, queries: int, first: int, keys: int, window: int | None, spans: Int[Tensor, "n l"] | None, device: torch.device
) -> Bool[Tensor, "n 1 queries keys"]:
    """Whether query `start` + i may see key `first` + j of its segment."""
    distance = torch.arange(start, start + queries, device=device)[:, None] - torch.arange(first, first + keys, device=device)
    allowed = (distance >= 0)[None, None]
    if window is not None:
        allowed = allowed & (distance < window)
    if spans is not None:
        seen_from, seen = spans[:, None, start : start + queries, None], spans[:, None, None, first : first + keys]
        allowed = allowed | ((seen_from == seen) & (seen >= 0))
    return allowed


def _has_varlen_kernel(v: Tensor, layout: AttentionLayout) -> bool:
    """Whether torch's flash attention for packed segments takes these."""
    half = v.dtype in (torch.bfloat16, torch.float16)
    return v.is_cuda and half and v.shape[-1] % 8 == 0 and v.shape[-1] <= 256 and all(x is None for x in layout.spans)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """One call for all segments, whatever their lengths."""
    longest = max((length for _, length in layout.groups), default=0)
    back = -1 if layout.window is None else layout.window - 1
    edges = (layout.cu_seqlens, layout.cu_seqlens, longest, longest)
    return varlen_attn(q, k, v, *edges, window_size=(back, 0) if layout.causal else (-1, -1))
