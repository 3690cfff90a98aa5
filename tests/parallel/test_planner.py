from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.parallel.planner import SequencePlan, plan_sequence, ring_plan, ring_slices
from mmpt.parallel.visible import Mask, Piece, Visible
from mmpt.types import Slice

Spans = list[tuple[int, int]]
MASKS = ("causal", "bidirectional", "media")


def dense(lengths: list[int], spans: list[Spans], padding: int, mask: Mask) -> np.ndarray:
    """Which keys (columns) every query (row) sees, token by token."""
    seen = np.zeros((sum(lengths) + padding,) * 2, dtype=bool)
    first = 0
    for length, media in zip(lengths, spans, strict=True):
        block = seen[first : first + length, first : first + length]
        block[:] = mask == "bidirectional" or np.tri(length, dtype=bool)
        for start, stop in media if mask == "media" else ():
            block[start:stop, start:stop] = True
        first += length
    return seen


def by_hand(
    lengths: list[int], mask: Mask, pieces: list[list[tuple[int, int, int]]], spans: list[Spans] | None = None
) -> SequencePlan:
    """A plan whose pieces are given, without padding."""
    held = tuple(tuple(Piece(*piece) for piece in own) for own in pieces)
    return SequencePlan(visible=Visible(lengths, spans, mask), pieces=held, padding=(0,) * len(pieces))


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[int], list[Spans], int, int]:
    """Lengths, spans, padding, ranks: documents of one token, a giant among small ones, spans side by side, padding alone."""
    ranks = draw(st.sampled_from((1, 2, 3, 4, 8)))
    lengths = draw(st.lists(st.integers(1, draw(st.sampled_from((1, 9, 60)))), max_size=draw(st.sampled_from((1, 3, 24)))))
    if lengths and draw(st.booleans()):
        lengths[0] += draw(st.integers(0, 200))
    spans: list[Spans] = []
    for length in lengths:
        ends = sorted(draw(st.sets(st.integers(0, length), max_size=8)))
        spans.append([(start, stop) for start, stop in pairwise(ends) if draw(st.booleans())])
    padding = -sum(lengths) % ranks + ranks * draw(st.sampled_from((0, 0, 1, 7, 60)))
    return lengths, spans, padding, ranks


@settings(deadline=None, max_examples=200)
@given(packs(), st.sampled_from(MASKS))
def test_every_pair_is_computed_once_and_every_key_that_comes_is_needed(
    pack: tuple[list[int], list[Spans], int, int], mask: Mask
):
    lengths, spans, padding, ranks = pack
    plan = plan_sequence(lengths, spans, padding, ranks, mask=mask)
    seen = dense(lengths, spans, padding, mask)
    assert sorted(plan.order) == list(range(len(seen)))
    own = plan.order.reshape(ranks, -1)
    assert (np.diff(own) > 0).all()  # documents and places go up, and padding is last
    plans = [ring_plan(plan, rank) for rank in range(ranks)]
    computed = np.zeros(seen.shape, dtype=int)
    for rank, mine in enumerate(plans):
        assert mine.receive_sizes[0] == own.shape[1] and mine.send_sizes[0] == 0
        assert len(mine.send) == sum(mine.send_sizes) and plan.keys[rank] == sum(mine.receive_sizes[1:])
        for hop, slices in enumerate(mine.slices):
            owner = (rank - hop) % ranks
            keys = own[owner]
            if hop:
                theirs = plans[owner]
                keys = keys[theirs.send.split(theirs.send_sizes)[hop].numpy()]
                assert keys.tolist() == [key for key in own[owner] if seen[own[rank], key].any()]
                assert mine.receive_sizes[hop] == len(keys)
            for piece in slices:
                computed[np.ix_(own[rank][piece.q_start : piece.q_stop], keys[piece.k_start : piece.k_stop])] += part(piece, hop)
        assert plan.work[rank] == seen[own[rank]].sum()
    np.testing.assert_array_equal(computed, seen)


def part(piece: Slice, hop: int) -> np.ndarray | int:
    """What a slice computes of its rectangle, which must not be empty; squares on the diagonal are of a rank's own keys."""
    assert piece.q_start < piece.q_stop and piece.k_start < piece.k_stop
    if not piece.causal:
        return 1
    assert hop == 0 and piece.q_start == piece.k_start and piece.q_stop == piece.k_stop
    return np.tri(piece.q_stop - piece.q_start, dtype=int)


@settings(deadline=None, max_examples=200)
@given(packs(), st.sampled_from(MASKS))
def test_the_mask_in_closed_form(pack: tuple[list[int], list[Spans], int, int], mask: Mask):
    lengths, spans, _, _ = pack
    seen = dense(lengths, spans, 0, mask)
    visible = Visible(lengths, spans, mask)
    below = [0, *np.cumsum(seen.sum(axis=1)).tolist()]
    assert [visible.pairs(token) for token in range(-1, len(seen) + 1)] == [0, *below]
    if lengths:
        assert visible.pairs_below(np.arange(len(seen) + 1)).tolist() == below
    firsts = np.repeat(visible.starts[:-1], lengths)
    assert [visible.bound(token) for token in range(len(seen))] == (firsts + seen.sum(axis=1)).tolist()


def test_one_document_on_two_ranks_is_zigzag():
    plan = plan_sequence([1024], None, 0, 2, mask="causal")
    assert plan.pieces == (((0, 0, 256), (0, 768, 1024)), ((0, 256, 768),))
    first, second = ring_plan(plan, 0), ring_plan(plan, 1)
    assert first.slices == ((Slice(0, 512, 0, 512, True),), (Slice(256, 512, 0, 512, False),))
    assert second.slices == ((Slice(0, 512, 0, 512, True),), (Slice(0, 512, 0, 256, False),))
    assert first.send.tolist() == list(range(256)) and second.send.tolist() == list(range(512))
    assert first.send_sizes == (0, 256) and first.receive_sizes == (512, 512)
    assert plan.keys.tolist() == [512, 256] and plan.remote == 0.75


def test_documents_that_fit_stay_whole():
    plan = plan_sequence([300] * 8, None, 0, 4, mask="causal")
    assert plan.keys.tolist() == [0] * 4 and plan.imbalance == 1
    assert ring_plan(plan, 3).slices[0] == (Slice(0, 300, 0, 300, True), Slice(300, 600, 300, 600, True))
    assert not any(ring_plan(plan, 3).slices[1:])


def test_a_span_over_two_ranks_worked_by_hand():
    """Tokens 2, 3 and 4 see each other; rank 0 holds the first of them, and the token behind them, which sees the same keys."""
    plan = by_hand([8], "media", [[(0, 0, 3), (0, 5, 6)], [(0, 3, 5), (0, 6, 8)]], [[(2, 5)]])
    own = Slice(2, 4, 0, 3, False), Slice(0, 2, 0, 2, True), Slice(3, 4, 3, 4, True)
    assert ring_slices(plan, 0) == ((own, (Slice(2, 4, 0, 2, False),)), (4, 2))
    own = Slice(0, 4, 0, 2, False), Slice(2, 4, 2, 4, True)
    assert ring_slices(plan, 1) == ((own, (Slice(0, 2, 0, 3, False), Slice(2, 4, 0, 4, False))), (4, 4))


def test_only_keys_that_are_seen_are_sent():
    """Of rank 1's keys rank 0 needs the first two of document 0, and both of document 1."""
    plan = by_hand([6, 4, 2], "causal", [[(0, 2, 4), (1, 8, 10), (2, 10, 12)], [(0, 0, 2), (0, 4, 6), (1, 6, 8)]])
    mine, theirs = ring_plan(plan, 0), ring_plan(plan, 1)
    assert mine.slices[1] == (Slice(0, 2, 0, 2, False), Slice(2, 4, 2, 4, False))
    assert theirs.send.tolist() == [0, 1, 4, 5]
    assert mine.receive_sizes == (6, 4) and theirs.send_sizes == (0, 4)
    assert theirs.slices[1] == (Slice(2, 4, 0, 2, False),) and mine.send.tolist() == [0, 1]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_work_is_even_and_few_keys_travel(ranks: int, mask: Mask):
    """Of packs of about 18 documents, log-normal, half of whose tokens are media; one is half padding."""
    for seed, padding in ((0, 0), (1, 160), (2, 8192)):
        shares = np.random.default_rng(seed).lognormal(size=18)
        lengths = (shares / shares.sum() * (16384 - padding)).astype(int).tolist()
        lengths[0] += 16384 - padding - sum(lengths)
        spans = [[(start, start + 64) for start in range(20, length - 64, 128)] for length in lengths]
        plan = plan_sequence(lengths, spans, padding, ranks, mask=mask)
        again = plan_sequence(lengths, spans, padding, ranks, mask=mask)
        assert plan.pieces == again.pieces
        assert plan.imbalance < 1.03 and plan.remote < 0.6


def test_a_rank_may_have_padding_alone():
    plan = plan_sequence([5], None, 59, 4, mask="causal")
    assert plan.work.sum() == 15 and sum(plan.padding) == 59
    empty = plan_sequence([], None, 8, 4, mask="media")
    assert (empty.imbalance, empty.remote, empty.order.tolist()) == (1.0, 0.0, list(range(8)))
    assert not any(ring_plan(empty, 0).slices)


def test_tokens_that_cannot_be_shared_equally_are_refused():
    with pytest.raises(AssertionError, match="7 tokens cannot be shared equally by 2 ranks"):
        plan_sequence([4], None, 3, 2, mask="causal")
