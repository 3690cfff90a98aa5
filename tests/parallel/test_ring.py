"""Ring attention on gloo ranks against attention by its definition, in fp64: output and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from rings import (
    Cases,
    Pack,
    Results,
    assert_cases,
    assert_equals_dense,
    by_hand,
    packs,
    plan_by_hand,
    planned,
    random_heads,
    random_packs,
    rectangles,
    results_of_cases,
    ring_results,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmpt.model.transformer import _selective
from mmpt.parallel.ring import RingLayout, Sum, Whole, ring_attention
from mmpt.types import RingPlan

EXACT = 1e-12
HEADS = (4, 2)  # of queries, of keys
ROUNDED = (torch.float32, torch.bfloat16)
Job = tuple[Callable[..., Any], tuple]


LENGTHS, SPANS = (900, 300, 700, 20, 100, 28), ((), ((100, 300),), ((0, 10), (300, 650)), (), (), ((5, 25),))
SPANS_OF_FIVE = ((), ((3, 40),), (), ((0, 9),), ())


def _jobs(jobs: list[Job]) -> list[Any]:
    """Several at once: ranks take long to start."""
    return [body(*arguments) for body, arguments in jobs]


def on_ranks_together(ranks: int, jobs: list[Job]) -> list[tuple[Any, ...]]:
    """What each job returned on each rank."""
    return list(zip(*on_ranks(ranks, _jobs, jobs), strict=True))


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    """What two ranks found, and the packs that they were given."""
    cases = [by_hand(pack) for pack in random_packs(2, 40)]
    leaks = [planned((50, 60, 5, 20, 120), 1, 2, "media", SPANS_OF_FIVE), planned((300, 7, 7, 80), 2, 2, "causal")]
    silent = by_hand(Pack((8, 8, 4), 0, "causal", 2, (0,) * 4 + (1,) * 12 + (0,) * 4))
    jobs = [
        (results_of_cases, (cases, HEADS, 8, torch.float64)),
        (_ways, planned((50, 7, 39), 4, 2, "causal")),
        (_perturbed, (leaks,)),
        (_messages, silent),
    ]
    results, ways, perturbed, messages = on_ranks_together(2, jobs)
    return {"cases": cases, "results": results, "ways": ways, "leaks": leaks, "perturbed": perturbed, "messages": messages}


@pytest.fixture(scope="module")
def four() -> dict[str, Any]:
    """The same of four."""
    cases = [by_hand(pack) for pack in random_packs(4, 40)]
    long = [planned((2048,), 0, 4, "causal"), planned(LENGTHS, 0, 4, "media", SPANS)]
    jobs = [(results_of_cases, (cases, HEADS, 8, torch.float64))]
    jobs += [(results_of_cases, (long, HEADS, 32, dtype)) for dtype in ROUNDED]
    results, *rounded = on_ranks_together(4, jobs)
    return {"cases": cases, "results": results, "long": long, **dict(zip(ROUNDED, rounded, strict=True))}


def test_the_rectangles_of_a_mask_are_found():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert rectangles(mask) == ((0, 2, 0, 2, True), (2, 4, 0, 4, False))


@given(pack=packs(ranks=3, tokens=20))
@settings(max_examples=50, deadline=None)
def test_plans_by_hand_cover_the_mask_once(pack):
    for rank in range(pack.ranks):
        plan, rows = plan_by_hand(pack, rank), pack.rows(rank)
        for hop, slices in enumerate(plan.slices):
            other = plan_by_hand(pack, (rank - hop) % pack.ranks)
            keys = pack.rows((rank - hop) % pack.ranks)
            start = sum(other.send_sizes[:hop])
            come = keys[other.send[start : start + other.send_sizes[hop]]] if hop else keys
            assert len(come) == plan.receive_sizes[hop]
            seen = torch.zeros(len(rows), len(come), dtype=torch.long)
            for q_start, q_stop, k_start, k_stop, causal in slices:
                block = torch.ones(q_stop - q_start, k_stop - k_start, dtype=torch.long)
                seen[q_start:q_stop, k_start:k_stop] += block.tril() if causal else block
            assert torch.equal(seen, pack.seen[rows][:, come].long())


def test_random_packs_on_one_rank_equal_dense_attention():
    for pack, (plan,) in map(by_hand, random_packs(1, 40)):
        heads = random_heads(len(pack.owners), HEADS)
        assert_equals_dense([ring_results(heads, pack, plan, None)], heads, pack, EXACT)


def test_random_packs_on_two_ranks_equal_dense_attention(two):
    assert_cases(two["results"], two["cases"], HEADS, 8, torch.float64, EXACT)


def test_random_packs_on_four_ranks_equal_dense_attention(four):
    assert_cases(four["results"], four["cases"], HEADS, 8, torch.float64, EXACT)


def _errors(found: Results, expected: Results) -> list[float]:
    """The norm of the difference over the norm, of output and gradients."""
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]


def test_rounding_in_fp32_is_small(four):
    assert_cases(four[torch.float32], four["long"], HEADS, 32, torch.float32, 1e-5)


def test_rounding_in_bf16_is_at_most_half_as_much_again_as_that_of_one_call(four):
    for found, (pack, _) in zip(zip(*four[torch.bfloat16], strict=True), four["long"], strict=True):
        heads = random_heads(len(pack.owners), HEADS, 32, torch.bfloat16)
        expected = ring_results([x.double() for x in heads], *_alone(pack), None)
        alone = _errors(ring_results(heads, *_alone(pack), None), expected)
        whole = [torch.empty_like(x) for x in expected]
        for rank, parts in enumerate(found):
            for x, part in zip(whole, parts, strict=True):
                x[pack.rows(rank)] = part.double()
        assert all(part <= 1.5 * one for part, one in zip(_errors(whole, expected), alone, strict=True)), (pack, alone)


def _alone(pack: Pack) -> tuple[Pack, RingPlan]:
    """The same on one rank."""
    pack, (plan,) = planned(pack.lengths, pack.padding, 1, pack.mask, pack.spans)
    return pack, plan


def _perturbed(cases: Cases) -> list[tuple[Results, list[Results]]]:
    """The results of every pack, and those when one document after the other is another; in fp32 and in bf16."""
    rank, found = dist.get_rank(), []
    for dtype in ROUNDED:
        for pack, plans in cases:
            heads = random_heads(len(pack.owners), (2, 1), 16, dtype)
            others = []
            for document in range(len(pack.lengths)):
                inside = (pack.document_ids == document)[:, None, None]
                changed = [torch.where(inside, 3 - 2 * x, x) for x in heads]
                others.append(ring_results(changed, pack, plans[rank], dist.group.WORLD))
            found.append((ring_results(heads, pack, plans[rank], dist.group.WORLD), others))
    return found


def test_documents_do_not_see_each_other_by_one_bit(two):
    for rank, results in enumerate(two["perturbed"]):
        for (pack, _), (before, others) in zip(two["leaks"] * len(ROUNDED), results, strict=True):
            for document, after in enumerate(others):
                inside = pack.document_ids[pack.rows(rank)] == document
                for x, y in zip(before, after, strict=True):
                    assert torch.equal(x[~inside], y[~inside])
                    assert not inside.any() or not torch.equal(x[inside], y[inside])


def _ways(pack: Pack, plans: list[RingPlan]) -> list[float]:
    """How far each way of calling is from the plain one."""
    plan, group, rows = plans[dist.get_rank()], dist.group.WORLD, pack.rows(dist.get_rank())
    heads = random_heads(len(pack.owners), (4, 2))
    plain = ring_results(heads, pack, plan, group)
    q, k, v, dout = (x[rows] for x in heads)

    def differ(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        return max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True))

    def called(attend) -> float:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return differ([out.detach(), *torch.autograd.grad(out, leaves, dout)], plain)

    def attend(*parts: Tensor) -> Tensor:
        return ring_attention(*parts, plan, group)

    def side_by_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*torch.cat([q, k, v], dim=1).split([4, 2, 2], dim=1))

    layout = RingLayout(plan, group, None)
    found = [called(side_by_side), called(layout.attend)]
    found.append(called(lambda *x: checkpoint(attend, *x, use_reentrant=False)))
    found.append(called(lambda *x: _selective(attend, *x)))
    for needed in range(3):  # one gradient alone is asked for
        leaves = [x.clone().requires_grad_(number == needed) for number, x in enumerate((q, k, v))]
        found.append(differ(torch.autograd.grad(attend(*leaves), leaves[needed], dout), [plain[1 + needed]]))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    strided = dout.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    found.append(differ(torch.autograd.grad(attend(*leaves), leaves, strided), plain[1:]))
    expanded = torch.autograd.grad(attend(*leaves).sum(), leaves)  # whose gradient has no strides at all
    found.append(differ(expanded, torch.autograd.grad(attend(*leaves), leaves, torch.ones_like(dout))))
    with torch.no_grad():
        found.append(differ([attend(q, k, v)], plain[:1]))
    return found


def test_every_way_of_calling_gives_the_same(two):
    for differences in two["ways"]:
        assert max(differences) < EXACT, differences


def _messages(pack: Pack, plans: list[RingPlan]) -> list[int]:
    sizes = []
    send = dist.batch_isend_irecv

    def counted(operations):
        sizes.extend(op.tensor.numel() for op in operations if op.op is dist.isend)
        return send(operations)

    dist.batch_isend_irecv = counted
    ring_results(random_heads(len(pack.owners), (2, 1)), pack, plans[dist.get_rank()], dist.group.WORLD)
    dist.batch_isend_irecv = send
    return sizes


def test_needed_keys_alone_travel(two):
    """Of a document on two ranks the first half goes to the other one, whose gradients come back; the others stay."""
    assert list(two["messages"]) == [[4 * 8] * 2, [4 * 8] * 2]  # k and v there; dk and dv home


@given(data=st.data(), rows=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_sum_and_a_merge_do_not_depend_on_order_or_ranges(data, rows):
    """Ranges that hold, meet, or miss one another: sums, and means weighted by exp(lse)."""
    like = torch.zeros(2, rows, 3, dtype=torch.float64)
    total, whole, added = Sum(like), Whole(like), torch.zeros_like(like)
    weighted, weights = torch.zeros_like(like), torch.zeros(2, rows, dtype=torch.float64)
    for _ in range(data.draw(st.integers(0, 5))):
        start, stop = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2, unique=True)))
        part, lse = torch.randn(2, stop - start, 3, dtype=torch.float64), torch.randn(2, stop - start, dtype=torch.float64)
        added[:, start:stop] += part
        weighted[:, start:stop] += part * lse.exp()[..., None]
        weights[:, start:stop] += lse.exp()
        whole.merge(slice(start, stop), part.clone(), lse)
        index = data.draw(st.booleans())
        total.add(torch.arange(start, stop) if index else slice(start, stop), part)
    out, lse = whole.result()
    torch.testing.assert_close(total.result(), added)
    torch.testing.assert_close(lse, weights.log())
    torch.testing.assert_close(out, torch.where(weights[..., None] > 0, weighted / weights[..., None], 0.0))


def test_a_difference_of_large_scores_is_no_overflow():
    like = torch.zeros(1, 1, 1)
    for scores in ((-1e4, 1e4), (1e4, -1e4)):
        whole = Whole(like)
        for value, score in zip((1.0, 2.0), scores, strict=True):
            whole.merge(slice(0, 1), torch.full((1, 1, 1), value), torch.full((1, 1), score))
        out, lse = whole.result()
        assert (out.item(), lse.item()) == (1.0 if scores[0] > 0 else 2.0, 1e4)


def test_hops_are_counted_from_each_rank():
    """Three ranks with a token each of one document: what each sends and receives, by hand."""
    pack = Pack((3,), 0, "causal", 3, (0, 1, 2))
    plans = by_hand(pack)[1]
    assert [plan.send_sizes for plan in plans] == [(0, 1, 1), (0, 1, 0), (0, 0, 0)]
    assert [plan.receive_sizes for plan in plans] == [(1, 0, 0), (1, 1, 0), (1, 1, 1)]
    assert all(a <= b for plan in plans for a, b in pairwise(plan.send.tolist()))
