"""The local kernels of ring attention: a few rectangles at a time, forward with the log of each row's sum, and backward.

slices of a hop --make_runs--> runs: pieces that adjoin in queries and in keys --kernel--> (out, lse), and dq, dk, dv

The backward pass of a piece is given `out` and `lse` of whole rows, over all keys and not those of the piece alone: the weights
exp(score - lse) are then those of the whole, and so are the gradients, but for a sum over pieces (arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.model.attention import SHORT, kernel_dtype
from mmpt.types import Slice


class Pieces(NamedTuple):
    """Rectangles one after the other: the queries of each see its keys. Or, if `causal`, squares: they see those up to theirs."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    causal: bool


class Run(NamedTuple):
    """Pieces, and which queries and keys are theirs."""

    queries: slice
    keys: slice
    pieces: Pieces

    @classmethod
    def of(cls, group: Sequence[Slice]) -> Run:
        """Of slices that follow one another."""
        first, last = group[0], group[-1]
        lengths = ((x.q_stop - x.q_start, x.k_stop - x.k_start) for x in group)
        q_lengths, k_lengths = zip(*lengths, strict=True)
        queries, keys = slice(first.q_start, last.q_stop), slice(first.k_start, last.k_stop)
        return cls(queries, keys, Pieces(q_lengths, k_lengths, first.causal))


def make_runs(slices: Sequence[Slice]) -> list[Run]:
    """As few runs as the slices allow in the order in which they come: many short documents make one."""
    groups: list[list[Slice]] = []
    for piece in slices:
        last = groups[-1][-1] if groups else None
        if last and (last.q_stop, last.k_stop, last.causal) == (piece.q_start, piece.k_start, piece.causal):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [Run.of(group) for group in groups]


class Kernel(Protocol):
    """Attention of the pieces of a run: queries, out, dout and dq of n rows, keys, values, dk and dv of m.

    All have the shape (heads, rows, head_dim), whatever their strides; queries that share keys stand in order of heads. `lse` is
    the natural logarithm of each row's sum of exp(q k / sqrt(head_dim)), in fp32 (fp64 for fp64). No piece is empty.
    """

    def forward(
        self, q: Float[Tensor, "h n d"], k: Float[Tensor, "hk m d"], v: Float[Tensor, "hk m d"], pieces: Pieces
    ) -> tuple[Float[Tensor, "h n d"], Float[Tensor, "h n"]]: ...

    def backward(
        self,
        dout: Float[Tensor, "h n d"],
        q: Float[Tensor, "h n d"],
        k: Float[Tensor, "hk m d"],
        v: Float[Tensor, "hk m d"],
        out: Float[Tensor, "h n d"],
        lse: Float[Tensor, "h n"],
        pieces: Pieces,
    ) -> tuple[Float[Tensor, "h n d"], Float[Tensor, "hk m d"], Float[Tensor, "hk m d"]]: ...


def choose_kernel(q: Float[Tensor, "h n d"]) -> Kernel:
    """The one that computes these queries."""
    if not q.is_cuda:
        return CpuFlash()
    half = q.dtype in (torch.bfloat16, torch.float16)
    return VarlenFlash() if half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 else Efficient()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """That in which parts are added up: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def empty_rows(heads: int, rows: int, head_dim: int, like: Tensor, dtype: torch.dtype) -> Float[Tensor, "heads rows head_dim"]:
    """As kernels write them: the heads of a row side by side."""
    return like.new_empty(rows, heads, head_dim, dtype=dtype).transpose(0, 1)


class CpuFlash:
    """torch's flash kernel for CPUs: pieces of equal size in one call. It is 7 % faster if the rows of a head of keys adjoin."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
        if _equal(pieces):
            count = len(pieces.q_lengths)
            found = self._forward(*(_split(x, count) for x in (q, k, v)), pieces.causal)
            return tuple(_join(x) for x in found)
        out = empty_rows(*q.shape, like=q, dtype=q.dtype)
        lse = out.new_empty(out.shape[1::-1], dtype=accumulation_dtype(q.dtype)).T
        for count, rows, keys in batches(pieces):
            stacks = (_split(x.index_select(1, at), count) for x, at in ((q, rows), (k, keys), (v, keys)))
            for whole, part in zip((out, lse), self._forward(*stacks, pieces.causal), strict=True):
                _put(whole, rows, part)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _equal(pieces):
            count = len(pieces.q_lengths)
            found = self._backward(*(_split(x, count) for x in (dout, q, k, v, out, lse)), pieces.causal)
            return tuple(_join(x) for x in found)
        grads = tuple(empty_rows(*x.shape, like=x, dtype=x.dtype) for x in (q, k, v))
        for count, rows, keys in batches(pieces):
            shown = ((dout, rows), (q, rows), (k, keys), (v, keys), (out, rows), (lse, rows))
            stacks = (_split(x.index_select(1, at), count) for x, at in shown)
            for whole, at, part in zip(grads, (rows, keys, keys), self._backward(*stacks, pieces.causal), strict=True):
                _put(whole, at, part)
        return grads

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Of stacks (count, heads, length, head_dim)."""
        q, k, v = (x.to(_cpu_dtype(q, k)) for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out = (x.to(_cpu_dtype(q, k)) for x in (dout, q, k, v, out))
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dout, q, k, v, out, lse, 0.0, causal)


def _cpu_dtype(q: Tensor, k: Tensor) -> torch.dtype:
    return kernel_dtype(q, min(q.shape[2], k.shape[2]) < SHORT)


def batches(pieces: Pieces) -> Iterator[tuple[int, Int[Tensor, " rows"], Int[Tensor, " keys"]]]:
    """For every size of a piece: how many there are, their queries and their keys, counted from the first of the run."""
    sizes = zip(pieces.q_lengths, pieces.k_lengths, strict=True)
    starts = zip(accumulate(pieces.q_lengths, initial=0), accumulate(pieces.k_lengths, initial=0), strict=True)
    same: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for size, start in zip(sizes, starts, strict=False):
        same[size].append(start)
    for (queries, keys), found in same.items():
        q_starts, k_starts = torch.tensor(found).unbind(1)
        yield len(found), _ranges(q_starts, queries), _ranges(k_starts, keys)


def _ranges(starts: Int[Tensor, " n"], length: int) -> Int[Tensor, " n_length"]:
    return (starts[:, None] + torch.arange(length)).flatten()


def _equal(pieces: Pieces) -> bool:
    return len(set(zip(pieces.q_lengths, pieces.k_lengths, strict=True))) == 1


def _split(x: Tensor, count: int) -> Tensor:
    """(heads, count length, ...) as (count, heads, length, ...)."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def _join(x: Tensor) -> Tensor:
    """The reverse; no copy of what the kernel made."""
    return x.transpose(0, 1).flatten(1, 2)


def _put(whole: Tensor, rows: Int[Tensor, " rows"], part: Tensor) -> None:
    whole.transpose(0, 1).index_copy_(0, rows, _join(part).transpose(0, 1).to(whole.dtype))


class VarlenFlash:
    """torch's flash attention for packed sequences on CUDA, in half precision: all pieces of a run in one call."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out, lse, _ = torch.ops.torch_attn._varlen_attn(q, k, v, *self._edges(q, pieces), pieces.causal)
        return out.transpose(0, 1), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out = (x.transpose(0, 1) for x in (dout, q, k, v, out))
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout
        edges = self._edges(q, pieces)
        backward = torch.ops.torch_attn._varlen_attn_backward
        grads = backward(dout, q, k, v, out, lse.contiguous(), *edges, pieces.causal, unused)
        return tuple(x.transpose(0, 1) for x in grads)

    def _edges(self, q: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor, int, int]:
        both = (pieces.q_lengths, pieces.k_lengths)
        return *(edges(lengths).to(q.device, non_blocking=True) for lengths in both), *map(max, both)


class Efficient:
    """xformers' attention on CUDA, which takes fp32 and any width of heads, with a block-diagonal mask.

    It shares no keys between heads, so they are repeated; its `lse` has a row of padded length for each piece.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
        from xformers.ops import fmha

        q, k, v = _side_by_side(q, k, v)
        kinds = {"attn_bias": self._mask(pieces, q.device), "op": fmha.cutlass.FwOp}
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, **kinds)
        return out[0].transpose(0, 1), pack(lse, pieces.q_lengths)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces
    ) -> tuple[Tensor, Tensor, Tensor]:
        from xformers.ops import fmha

        shared, padded = k.shape[0], pad(lse, pieces.q_lengths)
        q, k, v = _side_by_side(q, k, v)
        dout, out = (x.transpose(0, 1)[None].contiguous() for x in (dout, out))
        kinds = {"attn_bias": self._mask(pieces, q.device), "op": fmha.cutlass.BwOp}
        grads = fmha.memory_efficient_attention_backward(dout, out, padded, q, k, v, **kinds)
        dq, dk, dv = (x[0].transpose(0, 1) for x in grads)
        return dq, *(x.unflatten(0, (shared, -1)).sum(1) for x in (dk, dv))

    def _mask(self, pieces: Pieces, device: torch.device):
        from xformers.ops import fmha

        blocks = fmha.attn_bias.BlockDiagonalMask.from_seqlens(pieces.q_lengths, pieces.k_lengths, device=device)
        return blocks.make_causal() if pieces.causal else blocks


def _side_by_side(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """(1, rows, heads, head_dim), as many heads of keys as of queries."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    return tuple(x.transpose(0, 1)[None].contiguous() for x in (q, k, v))


def edges(lengths: Sequence[int]) -> Int[Tensor, "n_plus_1"]:
    """Where each of the pieces begins, and the last ends; int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def pack(lse: Float[Tensor, "pieces h longest"], lengths: Sequence[int]) -> Float[Tensor, "h n"]:
    """Rows piece after piece, without what is padded."""
    piece, place = _places(lengths, lse.device)
    return lse[piece, :, place].T


def pad(lse: Float[Tensor, "h n"], lengths: Sequence[int]) -> Float[Tensor, "pieces h longest"]:
    """The reverse; rows of padding, a multiple of 32 in all, have +inf: their weights are 0."""
    piece, place = _places(lengths, lse.device)
    padded = lse.new_full((len(lengths), len(lse), -(-max(lengths) // 32) * 32), torch.inf)
    padded[piece, :, place] = lse.T
    return padded


def _places(lengths: Sequence[int], device: torch.device) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The piece of each row, and its place there."""
    sizes = torch.tensor(lengths)
    piece = torch.arange(len(sizes)).repeat_interleave(sizes)
    place = torch.arange(len(piece)) - (sizes.cumsum(0) - sizes)[piece]
    return piece.to(device), place.to(device)
