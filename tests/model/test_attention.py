"""Attention within segments against one dense masked softmax in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.model import attention
from mmpt.model.attention import AttentionLayout, Reorder

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def allowed(document_ids, causal, window, spans):
    """Token by token: whether row may see column."""
    total = len(document_ids)
    out = torch.zeros(total, total, dtype=torch.bool)
    for i in range(total):
        for j in range(total):
            first, last = min(i, j), max(i, j)
            same = i == j or ((document_ids[first : last + 1] == document_ids[i]).all() and document_ids[i] >= 0)
            seen = j <= i and (window is None or i - j < window) if causal else True
            together = spans is not None and spans[i] >= 0 and spans[i] == spans[j]
            out[i, j] = same and (seen or together)
    return out


def dense(q, k, v, mask):
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def attend_in_order(q, k, v, layout):
    """`layout.attend` for tokens in the order of the batch."""
    ordered = (Reorder.apply(x, layout.order, layout.inverse) for x in (q, k, v))
    return Reorder.apply(layout.attend(*ordered), layout.inverse, layout.order)


def random_heads(total: int, kv_heads: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(total)
    heads = (4, kv_heads, kv_heads)
    return [torch.randn(total, h, 8, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for h in heads]


def assert_equals_dense(document_ids, kv_heads=2, *, causal=True, window=None, spans=None) -> None:
    """Output and every gradient."""
    q, k, v = random_heads(len(document_ids), kv_heads)
    layout = AttentionLayout.from_document_ids(document_ids, causal=causal, window=window, spans=spans)
    expected = dense(q, k, v, allowed(document_ids, causal, window, spans))
    found = attend_in_order(q, k, v, layout)
    torch.testing.assert_close(found, expected, **EXACT)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    for mine, other in zip(torch.autograd.grad(found, (q, k, v), upstream), theirs, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def ids(lengths: list[int], padding: int = 0) -> torch.Tensor:
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return torch.cat([numbers, torch.full((padding,), -1)])


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
KV_HEADS = st.sampled_from([1, 2, 4])
PADDING = st.integers(0, 3)


@given(lengths=LENGTHS, padding=PADDING, causal=st.booleans(), kv_heads=KV_HEADS)
@settings(max_examples=30, deadline=None)
def test_plain_attention_equals_dense(lengths, padding, causal, kv_heads):
    assert_equals_dense(ids(lengths, padding), kv_heads, causal=causal)


@given(lengths=LENGTHS, padding=PADDING, window=st.integers(1, 10), kv_heads=KV_HEADS)
@settings(max_examples=30, deadline=None)
def test_a_sliding_window_equals_dense(lengths, padding, window, kv_heads):
    assert_equals_dense(ids(lengths, padding), kv_heads, window=window)


@given(data=st.data(), lengths=LENGTHS, padding=PADDING, kv_heads=KV_HEADS)
@settings(max_examples=40, deadline=None)
def test_spans_that_see_themselves_equal_dense(data, lengths, padding, kv_heads):
    """Spans of any place and length, two of one number in two documents among them."""
    total = sum(lengths) + padding
    runs = data.draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 5)), min_size=total, max_size=total))
    spans = torch.cat([torch.full((length,), number) for number, length in runs])[:total]
    assert_equals_dense(ids(lengths, padding), kv_heads, spans=spans)


@given(lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5), window=st.integers(1, 6), elements=st.integers(20, 200))
@settings(max_examples=40, deadline=None)
def test_masks_are_bounded_and_blocks_equal_dense(lengths, window, elements):
    """With a small bound every path is cut into blocks, none of whose masks is larger (but for one row of keys)."""
    spans = torch.arange(sum(lengths)) // 3
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        whole = attention._mask

        def counted(*args):
            sizes.append(whole(*args).numel())
            return whole(*args)

        patch.setattr(attention, "_mask", counted)
        patch.setattr(attention, "MASK_ELEMENTS", elements)
        patch.setattr(attention, "SHORT", 2)
        assert_equals_dense(ids(lengths), window=window)
        assert_equals_dense(ids(lengths), spans=spans)
    assert all(size <= elements for size in sizes), (sizes, elements)


def test_only_segments_with_spans_are_masked():
    spans = torch.tensor([-1, -1, -1, -1, 0, 0, -1, -1, -1])
    layout = AttentionLayout.from_document_ids(ids([3, 3, 3]), causal=True, spans=spans)
    assert layout.groups == ((2, 3), (1, 3))
    assert layout.order.tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5]
    assert layout.spans[0] is None and layout.spans[1].tolist() == [[-1, 0, 0]]


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "window", "spans"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_do_not_see_each_other_by_one_bit(kind: str, dtype: torch.dtype):
    numbers = ids([5, 2, 5, 1, 7], padding=2)
    spans = torch.arange(len(numbers)) // 4 if kind == "spans" else None
    window = 3 if kind == "window" else None
    layout = AttentionLayout.from_document_ids(numbers, causal=kind != "bidirectional", window=window, spans=spans)
    q, k, v = random_heads(len(numbers), 2, dtype)
    before = attend_in_order(q, k, v, layout)
    for changed in range(len(numbers)):
        inside = torch.zeros(len(numbers), dtype=torch.bool)
        inside[changed] = True
        if numbers[changed] >= 0:
            inside |= numbers == numbers[changed]
        other = [torch.where(inside[:, None, None], 3 - 2 * x, x) for x in (q, k, v)]
        after = attend_in_order(*other, layout)
        assert torch.equal(before[~inside], after[~inside]) and not torch.equal(before[inside], after[inside])


def test_a_token_alone_takes_its_own_value():
    q, k, v = random_heads(4, 2)
    layout = AttentionLayout.from_document_ids(torch.tensor([-1, 3, -1, -1]), causal=True)
    assert torch.equal(attend_in_order(q, k, v, layout), v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("longest", [attention.SHORT - 1, attention.SHORT])
def test_short_segments_of_bf16_are_computed_in_fp32_on_a_cpu(longest: int):
    layout = AttentionLayout.from_lengths(torch.tensor([3, longest]), causal=True)
    q, k, v = random_heads(3 + longest, 2, torch.bfloat16)
    out = layout.attend(q, k, v)
    assert out.dtype == torch.bfloat16
    exact = layout.attend(q.float(), k.float(), v.float()).bfloat16()
    assert torch.equal(out, exact) == (longest < attention.SHORT)
    torch.testing.assert_close(out, exact, rtol=0.05, atol=0.02)


def test_the_call_of_the_varlen_kernel(monkeypatch: pytest.MonkeyPatch):
    """A kernel as torch documents its own: segments by edges; (left, right) tokens to both sides, -1 for all."""

    def kernel(q, k, v, edges, key_edges, longest, key_longest, *, window_size):
        assert edges.dtype == torch.int32 and edges is key_edges and longest == key_longest == int(edges.diff().max())
        left, right = (len(q) if size < 0 else size for size in window_size)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        numbers = torch.arange(len(edges) - 1).repeat_interleave(edges.diff().long())
        return dense(q, k, v, (numbers[:, None] == numbers) & (distance <= left) & (distance >= -right))

    q, k, v = random_heads(14, 2)
    for kind in ({"causal": True}, {"causal": False}, {"causal": True, "window": 3}):
        layout = AttentionLayout.from_lengths(torch.tensor([5, 2, 6, 1]), **kind)
        assert not attention._has_varlen_kernel(v.bfloat16(), layout)
        plain = layout.attend(q, k, v)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "varlen_attn", kernel)
            patch.setattr(attention, "_has_varlen_kernel", lambda v, layout: True)
            torch.testing.assert_close(layout.attend(q, k, v), plain, **EXACT)


def test_layout_on_literal_numbers():
    """Segments of 2, 1, 2 tokens and two of padding: the length-1 segments come first, padding among them, each alone."""
    layout = AttentionLayout.from_document_ids(torch.tensor([0, 0, 1, 2, 2, -1, -1]), causal=True)
    assert layout.order.tolist() == [2, 5, 6, 0, 1, 3, 4]
    assert layout.groups == ((3, 1), (2, 2))
    assert layout.cu_seqlens.tolist() == [0, 1, 2, 3, 5, 7]
    assert layout.order[layout.inverse].tolist() == list(range(7))


def test_segments_with_the_same_number_apart_are_two():
    assert AttentionLayout.from_document_ids(torch.tensor([0, 1, 0]), causal=True).groups == ((3, 1),)


def test_no_tokens_at_all():
    layout = AttentionLayout.from_document_ids(torch.zeros(0, dtype=torch.long), causal=True)
    nothing = torch.zeros(0, 2, 8)
    assert layout.attend(nothing, nothing, nothing).shape == (0, 2, 8)
