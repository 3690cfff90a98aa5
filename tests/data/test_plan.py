from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.mixture import Drawn
from mmpt.data.plan import Order, Plan, Slot, keyed_hash, permute
from mmpt.types import LoaderState, PlanCursor, SourceCursor, UserError

relaxed = settings(deadline=None)
CAPACITY, MEDIA = 64, 6


@dataclass
class Listed:
    """A source of documents of (tokens, media), cut into pieces of at most CAPACITY and MEDIA."""

    name: str
    documents: list[tuple[int, int]]
    weight: float = 1.0
    max_epochs: float | None = None
    on_exhausted: str = "renormalise"
    in_pieces: list[bool] | None = None  # whether a document goes in two halves though a pack would hold it

    @property
    def size(self) -> int:
        return len(self.documents)

    def draw(self, positions: np.ndarray) -> Drawn:
        epochs, documents = Order(self.name, np.array([self.size]), 0, 0)(positions)
        tokens, media = np.array(self.documents)[documents].T
        in_pieces = None if self.in_pieces is None else np.array(self.in_pieces)[documents]
        return Drawn(epochs=epochs, documents=documents, tokens=tokens, media=media, in_pieces=in_pieces)

    def pieces(self, document: int, epoch: int) -> list[tuple[int, int]]:
        tokens, media = self.documents[document]
        count = max(-(-tokens // CAPACITY), -(-media // MEDIA), 2 if self.in_pieces else 1)
        return [(tokens // count + (i < tokens % count), media // count + (i < media % count)) for i in range(count)]


def plan(sources: list[Listed], window: int = 16, seed: int = 0, unit: str = "tokens", media: int | None = MEDIA) -> Plan:
    return Plan(sources, seed=seed, unit=unit, pack_tokens=CAPACITY, pack_media=media, window=window)


def documents_of(packs: list[list[Slot]]) -> Counter[tuple[int, int, int]]:
    """How often each (source, epoch, document) came, its pieces counted as one."""
    return Counter((slot.source, slot.epoch, slot.document) for pack in packs for slot in pack if slot.piece == 0)


documents = st.tuples(st.integers(10, 200), st.integers(0, 10))
"""Some over a capacity; of ten tokens or more, so that even ten media make no piece empty."""
small = st.tuples(st.integers(1, CAPACITY), st.integers(0, MEDIA))
windows = st.integers(1, 40)


@st.composite
def mixtures(draw: st.DrawFn, most: int = 3) -> list[Listed]:
    names = [f"source-{number}" for number in range(draw(st.integers(1, most)))]
    listed = st.lists(documents | st.just((0, 0)), max_size=12).map(lambda some: [(20, 1), *some])
    policies, caps = st.sampled_from(["renormalise", "stop"]), st.floats(0, 4) | st.none()
    return [Listed(name, draw(listed), draw(st.floats(0.1, 10)), draw(caps), draw(policies)) for name in names]


# The permutation


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_permute_is_a_bijection(size: int, key: int):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(st.integers(1, 2**50), st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**50), max_size=20))
def test_permute_answers_each_position_alone(size: int, key: int, positions: list[int]):
    inside = np.array([position % size for position in positions], dtype=np.int64)
    together = permute(inside, size, key)
    assert ((together >= 0) & (together < size)).all()
    assert together.tolist() == [int(permute(inside[i : i + 1], size, key)[0]) for i in range(len(inside))]


def test_permute_is_even():
    """Each of the 24 orders of four things comes up about equally often: chi-square below its 99.99 % point."""
    orders = Counter(tuple(permute(np.arange(4), 4, keyed_hash("test", key)).tolist()) for key in range(4800))
    assert len(orders) == 24 and sum((count - 200) ** 2 / 200 for count in orders.values()) < 58


def test_runs_of_old_are_continued_bit_for_bit():
    assert keyed_hash("documents", 0, 0) == keyed_hash("documents", 0, 0) != keyed_hash("documents", 0, 1)
    assert [keyed_hash(1, "a"), keyed_hash("1a")] == [4207620368297011618, 1851804775104196079]
    assert permute(np.arange(10), 10, 5).tolist() == [1, 3, 5, 9, 0, 2, 6, 4, 8, 7]
    assert permute(np.arange(3), 10**10, 5).tolist() == [9576918263, 7272325262, 3427058528]


# The order of one source


@relaxed
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any), st.integers(0, 5), st.integers(0, 9))
def test_every_epoch_has_each_document_once(sizes: list[int], block: int, seed: int):
    order = Order("a", np.array(sizes), seed, block)
    epochs, documents = order(np.arange(3 * order.size))
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(order.size)]
    for epoch in range(3):
        assert sorted(documents[epochs == epoch]) == list(range(sum(sizes)))


@relaxed
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    st.integers(0, 5),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
)
def test_order_answers_each_position_alone(sizes: list[int], block: int, positions: list[int]):
    epochs, documents = Order("a", np.array(sizes), 0, block)(np.array(positions))
    alone = [Order("a", np.array(sizes), 0, block)(np.array([position])) for position in positions]
    assert [(int(epoch[0]), int(document[0])) for epoch, document in alone] == list(zip(epochs, documents, strict=True))


@relaxed
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 9))
def test_a_block_is_drawn_from_its_shards_alone(sizes: list[int], block: int, seed: int):
    """Once a shard of a block has been read, at most `block` are open until the block's last document."""
    _, documents = Order("a", np.array(sizes), seed, block)(np.arange(sum(sizes)))
    shards = np.searchsorted(np.cumsum(sizes), documents, side="right").tolist()
    blocks = 0
    while shards:
        own = []
        while shards and (shards[0] in own or len(own) < block):
            own = own if shards[0] in own else [*own, shards[0]]
            shards = shards[1:]
        assert not set(own) & set(shards)
        blocks += 1
    assert blocks == -(-len(sizes) // block)


@pytest.mark.parametrize(("sizes", "block"), [([10] * 10, 0), ([100], 1), ([1] * 100, 1)])
def test_names_seeds_and_epochs_have_orders_of_their_own(sizes: list[int], block: int):
    """All documents at once; those within a block; the shards."""
    orders = [Order(name, np.array(sizes), seed, block)(np.arange(200))[1] for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert len({tuple(half.tolist()) for order in orders for half in (order[:100], order[100:])}) == 6


def test_ten_billion_documents_need_no_table():
    order = Order("a", np.full(1000, 10**7), 0, 16)
    epochs, documents = order(np.array([0, 10**10 - 1, 10**10, 10**15]))
    assert epochs.tolist() == [0, 0, 1, 10**5] and ((documents >= 0) & (documents < 10**10)).all()


# The packs


@relaxed
@given(mixtures(), windows, st.sampled_from(["tokens", "samples"]))
def test_no_pack_is_empty_or_over_a_capacity(sources: list[Listed], window: int, unit: str):
    for pack, _ in islice(plan(sources, window, unit=unit).walk(plan(sources).begin()), 60):
        assert 0 < sum(slot.tokens for slot in pack) <= CAPACITY
        media = [sources[slot.source].pieces(slot.document, slot.epoch)[slot.piece][1] for slot in pack]
        assert sum(media) <= MEDIA


@relaxed
@given(st.lists(small, min_size=1, max_size=60), windows, st.integers(0, 5))
def test_the_plan_sees_each_document_once_an_epoch(listed: list[tuple[int, int]], window: int, seed: int):
    sources = [Listed("a", listed, max_epochs=3)]
    packs = [pack for pack, _ in plan(sources, window, seed).walk(plan(sources).begin())]
    assert documents_of(packs) == Counter((0, epoch, document) for epoch in range(3) for document in range(len(listed)))


@relaxed
@given(st.lists(documents, min_size=1, max_size=20), windows)
def test_long_documents_come_in_all_their_pieces(listed: list[tuple[int, int]], window: int):
    sources = [Listed("a", listed, max_epochs=2)]
    slots = [slot for pack, _ in plan(sources, window).walk(plan(sources).begin()) for slot in pack]
    wanted = [
        Slot(source=0, document=document, epoch=epoch, piece=piece, tokens=tokens)
        for epoch in range(2)
        for document in range(len(listed))
        for piece, (tokens, _) in enumerate(sources[0].pieces(document, epoch))
    ]
    assert sorted(slots) == sorted(wanted)


@relaxed
@given(st.lists(st.tuples(st.integers(2, CAPACITY), st.booleans()), min_size=1, max_size=20), windows)
def test_documents_that_a_source_wants_in_pieces_come_so(listed: list[tuple[int, bool]], window: int):
    """Though a pack would hold them: a segment may not be as long as a pack."""
    lengths, in_pieces = zip(*listed, strict=True)
    source = Listed("a", [(length, 0) for length in lengths], max_epochs=1, in_pieces=list(in_pieces))
    slots = [slot for pack, _ in plan([source], window).walk(plan([source]).begin()) for slot in pack]
    found = {number: sorted((s.piece, s.tokens) for s in slots if s.document == number) for number in range(len(lengths))}
    for number, (length, is_cut) in enumerate(listed):
        assert found[number] == ([(0, length - length // 2), (1, length // 2)] if is_cut else [(0, length)])


def test_without_a_capacity_media_do_not_matter():
    sources = [Listed("a", [(32, 1000)])]
    pack, _ = next(plan(sources, 2, media=None).walk(plan(sources).begin()))
    assert len(pack) == 2


def test_documents_without_tokens_make_no_slot():
    sources = [Listed("a", [(0, 0), (5, 0), (0, 0)], max_epochs=2)]
    for window in (1, 2, 6, 7):
        packs = [pack for pack, _ in plan(sources, window).walk(plan(sources).begin())]
        assert documents_of(packs) == {(0, 0, 1): 1, (0, 1, 1): 1}


def test_empty_documents_at_a_seam_are_no_empty_source():
    """Two epochs that meet may end and begin with empty documents: nearly two epochs of them in a row."""
    sources = [Listed("a", [(20, 1)] + [(0, 0)] * 20)]
    packs = [pack for pack, _ in islice(plan(sources, 1).walk(plan(sources).begin()), 60)]
    assert documents_of(packs) == Counter((0, epoch, 0) for epoch in range(60))


@pytest.mark.parametrize("others", [[], [Listed("b", [(5, 0)] * 3)]])
def test_a_source_without_any_tokens_is_no_endless_loop(others: list[Listed]):
    sources = [Listed("a", [(0, 0)] * 40), *others]
    with pytest.raises(UserError, match=r"source a: the last [0-9]+ documents drawn have no tokens"):
        list(plan(sources, 4).walk(plan(sources).begin()))


def test_packs_of_a_window_are_shuffled():
    """Best-fit-decreasing opens bins longest first; taken in that order, batches would differ in kind."""
    sources = [Listed("a", [(CAPACITY, 0)] * 60, max_epochs=1)]
    made = plan(sources, 20)
    drawn = [slot.document for slot in made.mixture.draw(60, made.begin().sources).slots]
    places = [drawn.index(pack[0].document) for pack, _ in made.walk(made.begin())]
    orders = {tuple(place - start for place in places[start : start + 20]) for start in (0, 20, 40)}
    assert len(orders) == 3 and all(sorted(order) == list(range(20)) for order in orders)
    assert tuple(range(20)) not in orders


LOGNORMAL = np.clip(np.random.default_rng(0).lognormal(3.0, 0.8, 4096), 1, CAPACITY).astype(int)


@pytest.mark.parametrize(("window", "fill"), [(64, 0.97), (256, 0.99)])
def test_packs_are_nearly_full(window: int, fill: float):
    """A window leaves half a pack open at its end, so the more packs to a window, the fuller they are."""
    sources = [Listed("a", [(length, 0) for length in LOGNORMAL.tolist()], max_epochs=1)]
    packs = [pack for pack, _ in plan(sources, window).walk(plan(sources).begin())]
    assert LOGNORMAL.sum() >= fill * CAPACITY * len(packs)


def test_a_source_keeps_its_order_beside_others():
    alone, others = Listed("b", [(9, 0)] * 30), [Listed("a", [(5, 0)] * 7), Listed("c", [(3, 0)] * 50)]
    sources = [others[0], alone, others[1]]

    def order(sources: list[Listed], number: int) -> list[tuple[int, int]]:
        draws = plan(sources).mixture.draw(90, plan(sources).begin().sources)
        return [(slot.epoch, slot.document) for slot in draws.slots if slot.source == number]

    beside = order(sources, 1)
    assert len(beside) > 10 and beside == order([alone], 0)[: len(beside)]


# Cursors


@relaxed
@given(mixtures(), windows, st.integers(0, 40))
def test_walking_goes_on_from_any_cursor(sources: list[Listed], window: int, steps: int):
    """By a new plan, and from the cursor as JSON."""
    whole = list(islice(plan(sources, window).walk(plan(sources).begin()), steps + 12))
    cursor = whole[min(steps, len(whole)) - 1][1] if steps and whole else plan(sources).begin()
    state = LoaderState(fingerprint={}, cursor=cursor, packs_consumed=steps)
    saved = LoaderState.from_json(json.loads(json.dumps(asdict(state), sort_keys=True))).cursor
    assert saved == cursor
    assert list(islice(plan(sources, window).walk(saved), 12)) == whole[steps:]


@relaxed
@given(mixtures(), windows)
def test_walks_of_one_plan_do_not_disturb_each_other(sources: list[Listed], window: int):
    shared = plan(sources, window)
    whole = list(islice(plan(sources, window).walk(shared.begin()), 60))
    late = shared.walk(whole[len(whole) // 2][1]) if whole else iter(())
    early = shared.walk(shared.begin())
    taken = list(zip(islice(late, 20), islice(early, 20), strict=False))
    assert [pack for pack, _ in taken] == whole[len(whole) // 2 + 1 :][: len(taken)]
    assert [pack for _, pack in taken] == whole[: len(taken)]


@relaxed
@given(mixtures(), windows, st.integers(1, 30), st.data())
def test_changed_weights_and_new_sources_repeat_and_lose_nothing(
    sources: list[Listed], window: int, steps: int, data: st.DataObject
):
    """Stopped anywhere and gone on under other weights, each source still comes in its own order, without a gap."""
    sources = [replace(source, max_epochs=None) for source in sources]
    before = list(islice(plan(sources, window).walk(plan(sources).begin()), steps))
    changed = [replace(source, weight=data.draw(st.floats(0, 10))) for source in sources]
    changed.insert(0, Listed("added", [(7, 0)] * 5, weight=1.0))
    stopped, after = before[-1][1], []
    for pack, end in plan(changed, window).walk(stopped):
        after.append(pack)
        if end.pack == 0 and end.window >= stopped.window + 3:
            break
    names = [[source.name for source in mixture] for mixture in (sources, changed)]
    seen = Counter(
        (names[part][slot.source], slot.epoch, slot.document)
        for part, packs in enumerate(([pack for pack, _ in before], after))
        for pack in packs
        for slot in pack
        if slot.piece == 0
    )
    drawn: Counter[tuple[str, int, int]] = Counter()
    for source in changed:
        stream = source.draw(np.arange(end.sources[source.name].position))
        for epoch, document, tokens in zip(
            stream.epochs.tolist(), stream.documents.tolist(), stream.tokens.tolist(), strict=True
        ):
            drawn[source.name, epoch, document] += tokens > 0
    assert seen == +drawn
    assert end.sources["added"].position > 0
    assert {name: cursor.weight for name, cursor in end.sources.items()} == {s.name: s.weight for s in changed}


def test_a_window_that_has_begun_is_finished_under_its_weights():
    sources = [Listed("a", [(40, 0)] * 50), Listed("b", [(40, 0)] * 50)]
    whole = list(islice(plan(sources, 10).walk(plan(sources).begin()), 20))
    changed = [replace(sources[0], weight=0.0), sources[1]]
    resumed = list(islice(plan(changed, 10).walk(whole[3][1]), 16))
    assert [pack for pack, _ in resumed[:6]] == [pack for pack, _ in whole[4:10]]
    assert {slot.source for pack, _ in resumed[6:] for slot in pack} == {1}
    assert resumed[6][1].sources == {
        "a": SourceCursor(position=5, consumed=0, weight=0.0),
        "b": SourceCursor(position=5, consumed=0, weight=1.0),
    }


def test_a_source_taken_out_is_refused():
    sources = [Listed("a", [(4, 0)]), Listed("b", [(4, 0)])]
    with pytest.raises(UserError, match=r"source b: .*give it weight 0 instead"):
        next(plan(sources[:1]).walk(plan(sources).begin()))


def test_a_cursor_beyond_its_window_is_refused():
    sources = [Listed("a", [(4, 0)])]
    with pytest.raises(UserError, match="window 0 has 1 packs and no number 5"):
        next(plan(sources).walk(replace(plan(sources).begin(), pack=5)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Listed("a", [(4, 0)], 0.0), "no source has a weight above 0"),
        (Listed("a", [(4, 0)], -1.0), "source a: weight = -1"),
        (Listed("a", [(4, 0)], float("nan")), "source a: weight = nan"),
        (Listed("a", []), "source a: it has no documents"),
    ],
)
def test_sources_that_cannot_be_drawn_are_refused(source: Listed, message: str):
    with pytest.raises(UserError, match=message):
        plan([source])


# Exhaustion


@relaxed
@given(st.lists(small, min_size=1, max_size=20), st.floats(0, 3), windows)
def test_max_epochs_is_never_exceeded(listed: list[tuple[int, int]], max_epochs: float, window: int):
    sources = [Listed("a", listed, 5.0, max_epochs), Listed("b", [(4, 0)] * 9, 1.0, 6)]
    packs = [pack for pack, _ in plan(sources, window).walk(plan(sources).begin())]
    drawn = Counter(slot.source for pack in packs for slot in pack)
    assert drawn[0] == int(max_epochs * len(listed) + 1e-9) and drawn[1] == 54


@pytest.mark.parametrize("window", [1, 4, 7, 100])
def test_stop_packs_the_window_in_hand_and_ends(window: int):
    sources = [Listed("a", [(30, 0)] * 4, 1.0, 2.0, "stop"), Listed("b", [(30, 0)] * 4)]
    packs = list(plan(sources, window).walk(plan(sources).begin()))
    drawn = Counter(slot.source for pack, _ in packs for slot in pack)
    assert drawn[0] == 8 and 7 <= drawn[1] <= 8
    assert list(plan(sources, window).walk(packs[-1][1])) == []


@pytest.mark.parametrize("window", [1, 4, 7, 100])
def test_fail_comes_after_the_last_pack(window: int):
    sources = [Listed("a", [(30, 0)] * 4, 1.0, 2.0, "fail"), Listed("b", [(30, 0)] * 4)]
    packs, cursor = [], plan(sources).begin()
    with pytest.raises(UserError, match="source a: exhausted after max_epochs = 2,"):
        for pack, cursor in plan(sources, window).walk(cursor):  # noqa: B007, B020
            packs.append(pack)
    assert Counter(slot.source for pack in packs for slot in pack)[0] == 8
    with pytest.raises(UserError, match="source a"):
        next(plan(sources, window).walk(cursor))


def test_an_ended_plan_goes_on_under_other_weights():
    sources = [Listed("a", [(30, 0)] * 4, 1.0, 1.0, "stop"), Listed("b", [(30, 0)] * 4)]
    *_, (_, cursor) = plan(sources).walk(plan(sources).begin())
    changed = [replace(sources[0], weight=0.0), sources[1]]
    assert {slot.source for pack, _ in islice(plan(changed).walk(cursor), 9) for slot in pack} == {1}


def test_a_far_position_is_reached_at_once():
    """A cursor at document 10^10 gives packs of the same form as one at the beginning."""
    sources = [Listed("a", [(20, 1)] * 100), Listed("b", [(30, 2)] * 100)]
    far = {name: SourceCursor(position=10**10, consumed=10**12, weight=1.0) for name in ("a", "b")}
    cursor = PlanCursor(window=10**9, pack=2, sources=far)
    pack, after = next(plan(sources).walk(cursor))
    assert {slot.epoch for slot in pack} == {10**8} and (after.window, after.pack) == (10**9, 3)
