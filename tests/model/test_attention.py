"""Attention within segments against one dense masked softmax in fp64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.model.attention import AttentionLayout, Reorder, attend


def dense(q, k, v, document_ids, causal):
    """All pairs at once, those across segments and (causal) those of the future masked out."""
    same = document_ids[:, None] == document_ids[None]
    allowed = same.tril() if causal else same
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=8), causal=st.booleans(), kv_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_equals_dense_attention_in_every_gradient(lengths, causal, kv_heads):
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    total = len(document_ids)
    generator = torch.Generator().manual_seed(total)
    q, k, v = (
        torch.randn(total, heads, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    )
    layout = AttentionLayout.from_document_ids(document_ids)

    def ours(*qkv):
        ordered = (Reorder.apply(x, layout.order, layout.inverse) for x in qkv)
        return Reorder.apply(attend(*ordered, layout, causal=causal), layout.inverse, layout.order)

    expected = dense(q, k, v, document_ids, causal)
    torch.testing.assert_close(ours(q, k, v), expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad(ours(q, k, v), (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_layout_on_literal_numbers():
    """Segments of 2, 1, 2 tokens and two of padding: the length-1 segments come first, padding among them, each alone."""
    layout = AttentionLayout.from_document_ids(torch.tensor([0, 0, 1, 2, 2, -1, -1]))
    assert layout.order.tolist() == [2, 5, 6, 0, 1, 3, 4]
    assert layout.groups == ((3, 1), (2, 2))
    assert layout.order[layout.inverse].tolist() == list(range(7))


def test_segments_with_the_same_number_apart_are_two():
    assert AttentionLayout.from_document_ids(torch.tensor([0, 1, 0])).groups == ((3, 1),)
