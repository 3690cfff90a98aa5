from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.mixture import Drawn, Mixture
from mmpt.types import SourceCursor, UserError

relaxed = settings(deadline=None)


@dataclass
class Listed:
    """A source whose documents come in their own order, epoch after epoch."""

    name: str
    lengths: list[int]
    weight: float = 1.0
    max_epochs: float | None = None
    on_exhausted: str = "renormalise"

    @property
    def size(self) -> int:
        return len(self.lengths)

    def draw(self, positions: np.ndarray) -> Drawn:
        epochs, documents = np.divmod(positions, self.size)
        tokens = np.array(self.lengths)[documents]
        return Drawn(epochs=epochs, documents=documents, tokens=tokens, media=tokens % 3)

    def pieces(self, document: int, epoch: int) -> list[tuple[int, int]]:
        raise AssertionError("nobody asked the mixture to cut")


def begin(sources: list[Listed]) -> dict[str, SourceCursor]:
    return {source.name: SourceCursor(position=0, consumed=0, weight=source.weight) for source in sources}


def drawn_from(sources: list[Listed], count: int, unit: str = "samples") -> str:
    """The names of the sources of the first draws: names are single letters here."""
    draws = Mixture(sources, unit).draw(count, begin(sources))
    return "".join(sources[slot.source].name for slot in draws.slots)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=20)
weights = st.floats(0.01, 100)


@st.composite
def mixtures(draw: st.DrawFn, most: int = 4) -> list[Listed]:
    count = draw(st.integers(1, most))
    return [Listed(name=chr(97 + number), lengths=draw(lengths), weight=draw(weights)) for number in range(count)]


def test_draws_worked_by_hand():
    """Deficits in samples with weights 1/2, 1/4, 1/4: a tie at nothing goes to the first, then whoever lags most."""
    sources = [Listed("a", [1], 2), Listed("b", [1], 1), Listed("c", [1], 1)]
    assert drawn_from(sources, 8) == "abcaabca"


def test_draws_in_tokens_worked_by_hand():
    """Documents of a have 3 tokens, those of b have 1: equal weights, so three of b to one of a."""
    assert drawn_from([Listed("a", [3]), Listed("b", [1])], 12, "tokens") == "abbbabbbabbb"


@relaxed
@given(mixtures(), st.sampled_from(["tokens", "samples"]), st.integers(1, 200))
def test_shares_stay_within_a_document_of_the_weights(sources: list[Listed], unit: str, count: int):
    """At all times: a source is at most one document over its share, and so, of two, at most one under it.

    Of k sources one may lag by up to the (k - 1)th harmonic number of documents, as in the cup game.
    """
    document = max(max(source.lengths) for source in sources) if unit == "tokens" else 1
    whole, consumed = sum(source.weight for source in sources), Counter[int]()
    for slot in Mixture(sources, unit).draw(count, begin(sources)).slots:
        consumed[slot.source] += slot.tokens if unit == "tokens" else 1
        for number, source in enumerate(sources):
            over = consumed[number] - source.weight / whole * consumed.total()
            assert over <= document + 1e-6
            assert -over <= document * sum(1 / k for k in range(1, len(sources))) + 1e-6


@relaxed
@given(mixtures(), st.sampled_from(["tokens", "samples"]), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_draws_go_on_from_the_cursors(sources: list[Listed], unit: str, counts: list[int]):
    """However a stretch is cut, and whether or not a new process reads the cursors."""
    whole = Mixture(sources, unit).draw(sum(counts), begin(sources))
    cursors, slots, media = begin(sources), [], []
    for count in counts:
        draws = Mixture(sources, unit).draw(count, cursors)
        slots, media, cursors = slots + draws.slots, media + draws.media, draws.after
    assert (slots, media, cursors) == (whole.slots, whole.media, whole.after)


@relaxed
@given(mixtures(), st.integers(0, 150))
def test_cursors_count_what_was_drawn(sources: list[Listed], count: int):
    draws = Mixture(sources, "tokens").draw(count, begin(sources))
    assert len(draws.slots) == len(draws.media) == count
    for number, source in enumerate(sources):
        own = [slot for slot in draws.slots if slot.source == number]
        assert [slot.epoch * source.size + slot.document for slot in own] == list(range(len(own)))
        assert [slot.tokens for slot in own] == [source.lengths[slot.document] for slot in own]
        cursor = SourceCursor(position=len(own), consumed=sum(slot.tokens for slot in own), weight=source.weight)
        assert draws.after[source.name] == cursor
    assert all(media == slot.tokens % 3 for slot, media in zip(draws.slots, draws.media, strict=True))


@relaxed
@given(mixtures(), st.randoms(use_true_random=False))
def test_the_order_of_sources_and_cursors_does_not_matter(sources: list[Listed], random):
    shuffled, cursors = random.sample(sources, len(sources)), begin(sources)
    there = Mixture(sources, "tokens").draw(60, cursors)
    here = Mixture(shuffled, "tokens").draw(60, dict(random.sample(sorted(cursors.items()), len(cursors))))
    assert [sources[slot.source].name for slot in there.slots] == [shuffled[slot.source].name for slot in here.slots]
    assert there.after == here.after


def test_weight_0_is_never_drawn_and_keeps_its_place():
    sources = [Listed("a", [1], 0.0), Listed("b", [1])]
    cursors = {**begin(sources), "a": SourceCursor(position=7, consumed=0, weight=0.0)}
    draws = Mixture(sources, "tokens").draw(50, cursors)
    assert {slot.source for slot in draws.slots} == {1} and draws.after["a"] == cursors["a"]


def test_sources_without_a_cursor_rest():
    sources = [Listed("a", [1]), Listed("b", [1])]
    draws = Mixture(sources, "tokens").draw(5, begin(sources[1:]))
    assert {slot.source for slot in draws.slots} == {1} and draws.after.keys() == {"b"}


def test_documents_without_tokens_cost_no_share():
    assert drawn_from([Listed("a", [1]), Listed("b", [0, 0, 1])], 9, "tokens") == "abbbabbba"


@pytest.mark.parametrize("max_epochs", [0.0, 0.5, 1.0, 2.5])
def test_others_go_on_with_their_weights_when_one_is_exhausted(max_epochs: float, caplog: pytest.LogCaptureFixture):
    sources = [Listed("a", [1] * 10, 8.0, max_epochs), Listed("b", [1], 3.0), Listed("c", [1], 1.0)]
    most = math.floor(max_epochs * 10)
    mixture = Mixture(sources, "samples")
    with caplog.at_level(logging.WARNING, "mmpt.data"):
        draws = mixture.draw(most * 2 + 100, begin(sources))
        mixture.draw(10, draws.after)
    names = [sources[slot.source].name for slot in draws.slots]
    rest = names[len(names) - names[::-1].index("a") :] if most else names
    assert names.count("a") == most and len(rest) >= 90
    assert abs(rest.count("b") - 0.75 * len(rest)) <= 2
    assert [record.getMessage() for record in caplog.records] == [f"source a: exhausted after {max_epochs:g} epochs: renormalise"]


def test_the_draws_end_when_all_are_exhausted():
    sources = [Listed("a", [1] * 4, 1.0, 1.0), Listed("b", [1] * 4, 5.0, 2.0)]
    draws = Mixture(sources, "tokens").draw(100, begin(sources))
    assert Counter(slot.source for slot in draws.slots) == {0: 4, 1: 8}
    after = Mixture(sources, "tokens").draw(100, draws.after)
    assert not after.slots and after.after == draws.after
    Mixture(sources, "tokens").finish(draws.after)


@pytest.mark.parametrize("policy", ["stop", "fail"])
def test_an_exhausted_source_ends_the_draws(policy: str):
    sources = [Listed("a", [1] * 4, 1.0, 1.5, policy), Listed("b", [1])]
    mixture = Mixture(sources, "tokens")
    draws = mixture.draw(100, begin(sources))
    assert [slot.source for slot in draws.slots] == [0, 1] * 5 + [0]
    assert not mixture.draw(1, draws.after).slots
    if policy == "stop":
        mixture.finish(draws.after)
    else:
        with pytest.raises(UserError, match=r"source a: exhausted after max_epochs = 1\.5.*'fail'"):
            mixture.finish(draws.after)
    weightless = {**draws.after, "a": SourceCursor(position=6, consumed=0, weight=0.0)}
    assert len(mixture.draw(10, weightless).slots) == 10
