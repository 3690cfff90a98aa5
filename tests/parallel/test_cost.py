"""The cost model: its counts against dense masks and its own plan, its seconds by hand, its bound against RING's formula."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt import cli
from mmpt.cli.cost import pack_lengths
from mmpt.parallel.cost import Heads, Hop, Machine, hops_of, length_seen, length_that_hides, predict, slowest, ulysses_bytes
from mmpt.parallel.layout import Layout
from mmpt.parallel.planner import plan_sequence

HEADS = Heads(queries=4, keys=1, dim=8, bytes=2)
MACHINE = Machine(flops=1000.0, bandwidth=10.0)


@st.composite
def packs(draw) -> tuple[list[int], int, int]:
    ranks = draw(st.sampled_from([1, 2, 3, 4, 8]))
    lengths = draw(st.lists(st.integers(1, 700), min_size=1, max_size=12))
    return lengths, -sum(lengths) % ranks, ranks


@given(packs(), st.sampled_from(["causal", "bidirectional"]))
@settings(max_examples=60, deadline=None)
def test_every_pair_is_counted_once_and_every_key_sent_is_received(pack, mask):
    lengths, padding, ranks = pack
    plan = plan_sequence(lengths, None, padding, ranks, mask=mask)
    hops = hops_of(plan)
    pairs = sum(n * n if mask == "bidirectional" else n * (n + 1) // 2 for n in lengths)
    assert sum(hop.pairs for own in hops for hop in own) == pairs
    assert [sum(hop.pairs for hop in own) for own in hops] == plan.work.tolist()
    assert [sum(hop.received for hop in own) for own in hops] == plan.keys.tolist()
    for rank, own in enumerate(hops):
        for hop in own:
            there = {other.number: other.sent for other in hops[(rank - hop.number) % ranks]}
            assert there.get(hop.number, 0) == hop.received


def test_seconds_by_hand():
    """A key and its value are 16 numbers, so 32 bytes, and as gradients 64; a pair is 2 * 2 * 4 * 8 = 128 FLOP forward."""
    hops = [Hop(number=0, pairs=100, received=0, sent=0), Hop(number=1, pairs=50, received=5, sent=3)]
    forward = predict(hops, HEADS, MACHINE, "forward")
    assert [w.compute for w in forward.windows] == [12.8, 6.4]
    assert [w.bytes for w in forward.windows] == [160, 0]  # beside hop 0: what comes, which is more than what goes
    assert forward.seconds == 16.0 + 6.4
    assert forward.hidden == pytest.approx(12.8 / 16.0)
    backward = predict(hops, HEADS, MACHINE, "backward")
    assert [w.hop for w in backward.windows] == [1, 0]  # the last hop's keys are still there
    assert [w.compute for w in backward.windows] == [16.0, 32.0]  # five products, not two
    assert [w.bytes for w in backward.windows] == [0, 320]  # beside the own keys: the gradients of the five go home
    assert backward.seconds == 16.0 + 32.0 and backward.hidden == 1


def test_going_back_gradients_travel_beside_the_keys_of_the_hop_after_the_next():
    hops = [Hop(number=n, pairs=1, received=n, sent=2 * n) for n in range(4)]
    backward = predict(hops, HEADS, MACHINE, "backward")
    assert [w.hop for w in backward.windows] == [3, 2, 1, 0]
    leaving = [4 * 32, 2 * 32 + 3 * 64, 2 * 64, 1 * 64]  # keys sent at hop 2, at 1; gradients of those received at 3, 2, 1
    arriving = [2 * 32, 1 * 32 + 6 * 64, 4 * 64, 2 * 64]
    assert [w.bytes for w in backward.windows] == [max(pair) for pair in zip(leaving, arriving, strict=True)]


def test_one_rank_sends_nothing():
    hops = hops_of(plan_sequence([100, 28], None, 0, 1, mask="causal"))
    found = predict(hops[0], HEADS, MACHINE, "backward")
    assert found.hidden == 1 and all(w.bytes == 0 for w in found.windows)
    assert found.seconds == pytest.approx((100 * 101 + 28 * 29) // 2 * 10 * 4 * 8 / 1000)


def test_latency_is_paid_for_each_message():
    hops = [Hop(number=0, pairs=0, received=0, sent=0), Hop(number=1, pairs=0, received=5, sent=0)]
    late = Machine(flops=1000.0, bandwidth=10.0, latency=2.0)
    assert predict(hops, HEADS, late, "forward").seconds == 18.0


@pytest.mark.parametrize(("bandwidth", "tokens"), [(150e9, 6_500), (45e9, 22_000)])
def test_the_bound_is_that_of_the_design(bandwidth: float, tokens: int):
    """400 TFLOP/s, four queries to a key, R = 8, kappa = 0.7; going back it is 1.2 times that."""
    plan = SimpleNamespace(remote=0.7, ranks=8)
    heads, machine = Heads(queries=32, keys=8, dim=128, bytes=2), Machine(flops=400e12, bandwidth=bandwidth)
    forward, backward = (length_that_hides(plan, heads, machine, direction) for direction in ("forward", "backward"))
    assert forward == pytest.approx(2 * 0.7 * 7 / 4 * 400e12 / bandwidth)
    assert forward == pytest.approx(tokens, rel=0.02)
    assert backward == pytest.approx(1.2 * forward)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.sampled_from([2, 4, 8]))
@settings(max_examples=30, deadline=None)
def test_the_bound_is_where_transfers_take_as_long_as_computing(lengths: list[int], ranks: int):
    """Over all ranks: bytes / bandwidth over FLOP / rate is the bound over the length seen."""
    plan = plan_sequence(lengths, None, -sum(lengths) % ranks, ranks, mask="causal")
    hops = [hop for own in hops_of(plan) for hop in own]
    tokens = len(plan.order)
    seconds = sum(hop.flops(HEADS, "forward") for hop in hops) / MACHINE.flops
    transfers = sum(hop.received for hop in hops) * 2 * HEADS.keys * HEADS.dim * HEADS.bytes / MACHINE.bandwidth
    seen = (sum(n * n for n in lengths) + sum(lengths)) / tokens  # a square's diagonal counts half more
    assert transfers / seconds == pytest.approx(length_that_hides(plan, HEADS, MACHINE, "forward") / seen)


def test_the_slowest_rank_is_found():
    ranks = [[Hop(number=0, pairs=pairs, received=0, sent=0)] for pairs in (5, 9, 7)]
    number, found = slowest(ranks, HEADS, MACHINE, "forward")
    assert number == 1 and found.seconds == pytest.approx(9 * 128 / 1000)


def test_lengths():
    assert length_seen([3, 1]) == 2.5
    assert pack_lengths(1000, None) == [1000]
    drawn = pack_lengths(1_000_000, 500)
    assert sum(drawn) == 1_000_000 and min(drawn) >= 1
    assert np.mean(drawn) == pytest.approx(500, rel=0.1)


def test_ulysses_bytes():
    """Of 12 tokens this rank has 4; it sends two thirds of their q, k, v and of 12 tokens' out: 2 * (4 + 1) * 8 numbers each."""
    assert ulysses_bytes(12, HEADS, Layout(ulysses=3)) == 4 * 2 * 80 * 2
    assert ulysses_bytes(12, HEADS, Layout()) == 0


def test_command(capsys):
    assert cli.main(["config", "cost", "configs/long_1m.yaml", "--documents", "50000"]) == 0
    printed = capsys.readouterr().out
    assert "64 rank(s), parallel: {dp_shard: 1, ring: 8, ulysses: 8}" in printed
    assert "1,048,576 tokens in" in printed and "16,384 a rank" in printed
    assert "One layer backward" in printed and "(predicted)" in printed and "hidden: " in printed
    assert "ulysses: 0.294 GB" in printed


def test_command_refuses_ranks_that_cannot_be(capsys):
    assert cli.main(["config", "cost", "configs/long_1m.yaml", "--ranks", "24"]) == 2
    assert "ring 8 x ulysses 8" in capsys.readouterr().err
