"""Local kernels: runs of slices on small integers; each kernel against attention by its definition.

Those for CUDA cannot run here. What is tested of them is what is ours: which rows, lengths and log-sums they are given and
return, with a stand-in in the kernel's place that computes each sequence by definition.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rings import dense
from torch import Tensor

from mmpt.parallel import kernels
from mmpt.parallel.kernels import (
    CpuFlash,
    Efficient,
    Pieces,
    Run,
    VarlenFlash,
    batches,
    choose_kernel,
    edges,
    make_runs,
    pack,
    pad,
)
from mmpt.types import Slice


def test_slices_that_adjoin_make_one_run():
    slices = (
        Slice(0, 2, 0, 2, True),
        Slice(2, 5, 2, 5, True),
        Slice(5, 6, 5, 6, False),  # another kind
        Slice(6, 8, 0, 4, False),  # queries adjoin, keys do not
        Slice(8, 9, 4, 9, False),
    )
    assert make_runs(slices) == [
        Run(slice(0, 5), slice(0, 5), Pieces((2, 3), (2, 3), True)),
        Run(slice(5, 6), slice(5, 6), Pieces((1,), (1,), False)),
        Run(slice(6, 9), slice(0, 9), Pieces((2, 1), (4, 5), False)),
    ]
    assert make_runs(()) == []


def test_pieces_of_equal_size_are_one_batch_wherever_they_stand():
    found = [(count, rows.tolist(), keys.tolist()) for count, rows, keys in batches(Pieces((2, 1, 2), (1, 3, 1), False))]
    assert found == [(2, [0, 1, 3, 4], [0, 4]), (1, [2], [1, 2, 3])]


def test_a_thousand_short_documents_take_one_call_for_each_length(monkeypatch):
    calls = []
    forward = CpuFlash._forward
    monkeypatch.setattr(CpuFlash, "_forward", lambda self, *x: calls.append(x[0].shape) or forward(self, *x))
    lengths = (3, 5) * 500
    stops = edges(lengths)[1:].tolist()
    (run,) = make_runs([Slice(stop - n, stop, stop - n, stop, True) for n, stop in zip(lengths, stops, strict=True)])
    q, k, v = (torch.randn(2, 4000, 4) for _ in range(3))
    CpuFlash().forward(q, k, v, run.pieces)
    assert calls == [(500, 2, 3, 4), (500, 2, 5, 4)]


def test_where_pieces_begin_and_what_is_padded():
    assert edges((3, 1, 4)).tolist() == [0, 3, 4, 8] and edges((1,)).dtype == torch.int32
    lse = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # two heads, rows of pieces of 1 and 2
    padded = pad(lse, (1, 2))
    assert padded.shape == (2, 2, 32)
    inf = torch.inf
    assert padded[:, :, :3].tolist() == [[[1, inf, inf], [4, inf, inf]], [[2, 3, inf], [5, 6, inf]]]
    assert torch.equal(pack(padded, (1, 2)), lse)


def test_a_cpu_has_one_kernel_and_an_accelerator_two():
    def kind(dtype: torch.dtype, head_dim: int, is_cuda: bool = True) -> type:
        return type(choose_kernel(SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(8, 100, head_dim))))

    assert kind(torch.bfloat16, 64, is_cuda=False) is CpuFlash
    assert kind(torch.bfloat16, 64) is kind(torch.float16, 256) is VarlenFlash
    assert kind(torch.float32, 64) is kind(torch.bfloat16, 260) is kind(torch.bfloat16, 36) is Efficient


def seen_of(pieces: Pieces) -> Tensor:
    blocks = [torch.ones(n, m, dtype=torch.bool) for n, m in zip(pieces.q_lengths, pieces.k_lengths, strict=True)]
    return torch.block_diag(*(block.tril() if pieces.causal else block for block in blocks)).bool()


def by_definition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, heads, head_dim) and (heads, rows)."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) / q.shape[-1] ** 0.5
    return dense(q, k, v, seen), scores.masked_fill(~seen, -torch.inf).logsumexp(-1)


def share_of_gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor) -> list[Tensor]:
    """What pieces add to the gradients of whole rows, of which `out` and `lse` are."""
    repeat = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / q.shape[-1] ** 0.5
    weights = (scores - lse[..., None]).exp() * seen
    dscores = weights * (torch.einsum("qhd,khd->hqk", dout, values) - (dout * out).sum(-1).T[..., None]) / q.shape[-1] ** 0.5
    dq = torch.einsum("hqk,khd->qhd", dscores, keys)
    dk, dv = torch.einsum("hqk,qhd->khd", dscores, q), torch.einsum("hqk,qhd->khd", weights, dout)
    return [dq, *(x.unflatten(1, (-1, repeat)).sum(2) for x in (dk, dv))]


@st.composite
def runs(draw: st.DrawFn) -> Pieces:
    sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6))
    causal = draw(st.booleans())
    q_lengths, k_lengths = zip(*sizes, strict=True)
    return Pieces(q_lengths, q_lengths if causal else k_lengths, causal)


def assert_computes(kernel: kernels.Kernel, pieces: Pieces, kv_heads: int) -> None:
    """Both ways, heads and rows in any memory order; the backward pass with an `out` and `lse` that are not the pieces' own."""
    n, m, seen = sum(pieces.q_lengths), sum(pieces.k_lengths), seen_of(pieces)
    generator = torch.Generator().manual_seed(n + 100 * m)
    shapes = ((n, 4), (m, kv_heads), (m, kv_heads), (n, 4), (n, 4))
    q, k, v, dout, out = (torch.randn(*shape, 8, dtype=torch.float64, generator=generator) for shape in shapes)
    lse = torch.randn(4, n, dtype=torch.float64, generator=generator) + 3
    turned = [x.transpose(0, 1) for x in (dout, q, k, v, out)]
    turned[2] = turned[2].contiguous()
    expected, expected_lse = by_definition(q, k, v, seen)
    found, found_lse = kernel.forward(*turned[1:4], pieces)
    torch.testing.assert_close(found.transpose(0, 1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_lse, expected_lse, rtol=1e-12, atol=1e-12)
    for mine, other in zip(kernel.backward(*turned, lse, pieces), share_of_gradients(dout, q, k, v, out, lse, seen), strict=True):
        torch.testing.assert_close(mine.transpose(0, 1), other, rtol=1e-12, atol=1e-12)


@given(pieces=runs(), kv_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_the_kernel_for_cpus_equals_its_definition(pieces, kv_heads):
    assert_computes(CpuFlash(), pieces, kv_heads)


def _pieces_of(cu_q: Tensor, cu_k: Tensor, causal: bool) -> Pieces:
    return Pieces(tuple(cu_q.diff().tolist()), tuple(cu_k.diff().tolist()), causal)


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal):
    pieces = _pieces_of(cu_q, cu_k, causal)
    assert (max_q, max_k) == (max(pieces.q_lengths), max(pieces.k_lengths)) and cu_q.dtype == torch.int32
    return *by_definition(q, k, v, seen_of(pieces)), None


def _varlen_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, state):
    return share_of_gradients(dout, q, k, v, out, lse, seen_of(_pieces_of(cu_q, cu_k, causal)))


@given(pieces=runs(), kv_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_varlen_flash_is_given_what_it_wants(pieces, kv_heads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "torch_attn", SimpleNamespace(_varlen_attn=_varlen, _varlen_attn_backward=_varlen_backward))
        assert_computes(VarlenFlash(), pieces, kv_heads)


class Blocks(SimpleNamespace):
    """xformers' mask."""

    @classmethod
    def from_seqlens(cls, q_lengths, k_lengths, device):
        return cls(pieces=Pieces(q_lengths, k_lengths, False))

    def make_causal(self):
        return Blocks(pieces=self.pieces._replace(causal=True))


def _efficient(q, k, v, attn_bias, op):
    assert q.shape[2] == k.shape[2] and op == "forward"
    out, lse = by_definition(q[0], k[0], v[0], seen_of(attn_bias.pieces))
    return out[None], pad(lse, attn_bias.pieces.q_lengths)


def _efficient_backward(dout, out, lse, q, k, v, attn_bias, op):
    assert op == "backward"
    rows = pack(lse, attn_bias.pieces.q_lengths)
    grads = share_of_gradients(dout[0], q[0], k[0], v[0], out[0], rows, seen_of(attn_bias.pieces))
    return tuple(x[None] for x in grads)


@given(pieces=runs(), kv_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_xformers_is_given_what_it_wants(pieces, kv_heads):
    fmha = SimpleNamespace(
        attn_bias=SimpleNamespace(BlockDiagonalMask=Blocks),
        cutlass=SimpleNamespace(FwOp="forward", BwOp="backward"),
        memory_efficient_attention_forward_requires_grad=_efficient,
        memory_efficient_attention_backward=_efficient_backward,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "xformers", SimpleNamespace(ops=SimpleNamespace(fmha=fmha)))
        patch.setitem(sys.modules, "xformers.ops", SimpleNamespace(fmha=fmha))
        assert_computes(Efficient(), pieces, kv_heads)
