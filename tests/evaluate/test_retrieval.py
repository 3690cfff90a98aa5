import json
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmpt.evaluate import retrieval as module
from mmpt.evaluate.retrieval import retrieval


def one_hot_scores(table):
    """Items and texts whose scores are exactly `table` (texts x items)."""
    table = torch.tensor(table, dtype=torch.float32)
    return torch.eye(table.shape[1]), table


def test_a_table_worked_by_hand():
    # Scores, texts down and items across; text 0 and 1 belong to item 0, text 2 to item 1, text 3 to item 2.
    items, texts = one_hot_scores(
        [
            [0.9, 0.5, 0.1],  # right 0.9: rank 1
            [0.2, 0.6, 0.7],  # right 0.2: rank 3
            [0.3, 0.8, 0.4],  # right 0.8: rank 1
            [0.5, 0.3, 0.5],  # right 0.5, tied with item 0: rank 1 if ties are won, 2 if lost
        ]
    )
    result = retrieval(items, texts, torch.tensor([0, 0, 1, 2]))
    assert (result.items, result.texts) == (3, 4)

    t2i = result.text_to_item
    assert (t2i.queries, t2i.candidates) == (4, 3)
    assert t2i.ties_won.recall == {1: 0.75, 5: 1.0, 10: 1.0}
    assert t2i.ties_lost.recall == {1: 0.5, 5: 1.0, 10: 1.0}
    assert (t2i.ties_won.median_rank, t2i.ties_lost.median_rank) == (1.0, 1.5)
    assert t2i.ties_won.map_10 == pytest.approx((1 + 1 / 3 + 1 + 1) / 4)
    assert t2i.ties_lost.map_10 == pytest.approx((1 + 1 / 3 + 1 + 1 / 2) / 4)
    assert t2i.chance == {1: pytest.approx(1 / 3, rel=1e-12), 5: 1.0, 10: 1.0}

    # Item 0: texts by score 0 (0.9, right), 3 (0.5), 2 (0.3), 1 (0.2, right): precisions 1/1 and 2/4.
    # Item 1: 2 (0.8, right), ...: precision 1. Item 2: 1 (0.7), 3 (0.5, right), ...: precision 1/2.
    i2t = result.item_to_text
    assert (i2t.queries, i2t.candidates) == (3, 4)
    assert i2t.ties_won.recall == {1: pytest.approx(2 / 3), 5: 1.0, 10: 1.0}
    assert i2t.ties_won.median_rank == 1.0
    assert i2t.ties_won.map_10 == pytest.approx(((1 + 1 / 2) / 2 + 1 + 1 / 2) / 3)
    assert i2t.chance[1] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_a_collapsed_model_wins_every_tie_and_loses_every_tie():
    ones = torch.full((20, 4), 0.5)
    result = retrieval(ones, ones, torch.arange(20))
    for direction in (result.item_to_text, result.text_to_item):
        assert direction.ties_won.recall[1] == 1.0
        assert direction.ties_lost.recall == {1: 0.0, 5: 0.0, 10: 0.0}
        assert direction.ties_lost.median_rank == 20
        assert direction.ties_lost.map_10 == 0.0


def test_duplicates_of_real_embeddings_tie_exactly():
    generator = torch.Generator().manual_seed(0)
    items = F.normalize(torch.randn(777, 96, generator=generator), dim=1)
    items[[13, 400, 776]] = items[5].clone()
    result = retrieval(items, items, torch.arange(777)).text_to_item
    assert result.ties_won.recall[1] == 1.0
    assert result.ties_lost.recall[1] == pytest.approx(1 - 4 / 777)
    assert result.ties_lost.recall[5] == 1.0


@st.composite
def ragged(draw):
    """Embeddings of small integers, so that fp32 scores are exact and ties are common; 1 to 4 texts an item."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    width = draw(st.integers(1, 3))
    values = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    items = draw(st.lists(values, min_size=len(counts), max_size=len(counts)))
    texts = draw(st.lists(values, min_size=sum(counts), max_size=sum(counts)))
    owner = draw(st.permutations(np.repeat(np.arange(len(counts)), counts).tolist()))
    return torch.tensor(items, dtype=torch.float32), torch.tensor(texts, dtype=torch.float32), torch.tensor(owner)


def naive(scores, relevant, lost):
    """Rank and average precision of each query by sorting: among equal scores the wrong ones go last, or first if `lost`."""
    ranks, precisions = [], []
    for row, right in zip(scores, relevant, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], right[c] if lost else not right[c]))
        places = [place for place, c in enumerate(order, start=1) if right[c]]
        ranks.append(places[0])
        hits = [number / place for number, place in enumerate(places, start=1) if place <= 10]
        precisions.append(sum(hits) / min(len(places), 10))
    return np.array(ranks), np.mean(precisions)


@settings(deadline=None, max_examples=60)
@given(ragged(), st.integers(1, 40))
def test_equals_sorting_at_every_block_size(data, block_scores):
    items, texts, owner = data
    with mock.patch.object(module, "BLOCK_SCORES", block_scores):
        result = retrieval(items, texts, owner)
    scores = (texts @ items.T).numpy()
    relevant = owner.numpy()[:, None] == np.arange(len(items))[None, :]
    for direction, s, r in ((result.text_to_item, scores, relevant), (result.item_to_text, scores.T, relevant.T)):
        for ranking, lost in ((direction.ties_won, False), (direction.ties_lost, True)):
            ranks, precision = naive(s, r, lost)
            assert ranking.recall == {k: pytest.approx((ranks <= k).mean()) for k in (1, 5, 10)}
            assert ranking.median_rank == np.median(ranks)
            assert ranking.map_10 == pytest.approx(precision)


CLIP_BENCHMARK = {
    "1": ((0.2800, 0.5350, 0.6950), (0.2650, 0.5200, 0.7050)),
    "5": ((0.2900, 0.5460, 0.6760), (0.4750, 0.7950, 0.9100)),
    "ragged": ((0.2988, 0.5738, 0.6988), (0.4600, 0.7150, 0.8200)),
}
"""What `clip_benchmark.metrics.zeroshot_retrieval.evaluate` of version 1.6.2 gave for the embeddings of the test below, to four
places: by captions of a picture, image_retrieval_recall@1, 5, 10, and text_retrieval_recall@1, 5, 10. It is no dependency: what
it asks for beside that one module are 150 MB of other metrics."""


def top_k_recall(scores, right, k):
    """The same by its definition: the share of queries of which a right candidate is among the k best."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.mean([bool(set(places) & set(np.flatnonzero(row))) for places, row in zip(best, right, strict=True)])


@pytest.mark.parametrize("captions", CLIP_BENCHMARK)
def test_recall_is_that_of_clip_benchmark(captions):
    generator = torch.Generator().manual_seed(1)
    low, high = {"1": (1, 2), "5": (5, 6), "ragged": (1, 8)}[captions]
    owner = torch.arange(200).repeat_interleave(torch.randint(low, high, (200,), generator=generator))
    items = torch.randn(200, 32, generator=generator)
    texts = F.normalize(items[owner] + 2.5 * torch.randn(len(owner), 32, generator=generator), dim=1)
    items = F.normalize(items, dim=1)
    result = retrieval(items, texts, owner)
    scores, right = (texts @ items.T).numpy(), owner.numpy()[:, None] == np.arange(200)
    ways = (result.text_to_item, scores, right), (result.item_to_text, scores.T, right.T)
    for (direction, each_scores, each_right), printed in zip(ways, CLIP_BENCHMARK[captions], strict=True):
        for k, figure in zip((1, 5, 10), printed, strict=True):
            assert direction.ties_won.recall[k] == pytest.approx(figure, abs=5e-5)
            assert direction.ties_won.recall[k] == pytest.approx(top_k_recall(each_scores, each_right, k), abs=1e-12)


def test_chance_is_what_random_embeddings_reach():
    generator = torch.Generator().manual_seed(2)
    owner = torch.arange(50).repeat_interleave(torch.randint(1, 6, (50,), generator=generator))
    draws = [torch.randn(50 + len(owner), 16, generator=generator) for _ in range(60)]
    runs = [retrieval(draw[:50], draw[50:], owner) for draw in draws]
    for name in ("item_to_text", "text_to_item"):
        for k in (1, 5, 10):
            reached = np.mean([getattr(run, name).ties_won.recall[k] for run in runs])
            assert reached == pytest.approx(getattr(runs[0], name).chance[k], abs=0.025)


def test_autocast_of_the_caller_does_not_touch_the_scores():
    generator = torch.Generator().manual_seed(3)
    items = F.normalize(torch.randn(300, 64, generator=generator), dim=1)
    texts = F.normalize(items + 0.2 * torch.randn(300, 64, generator=generator), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = retrieval(items, texts, torch.arange(300))
    assert inside == retrieval(items, texts, torch.arange(300))


def test_json_is_plain_and_complete():
    items, texts = one_hot_scores([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])
    result = retrieval(items, texts, torch.tensor([0, 1, 1]))
    tree = json.loads(json.dumps(result.to_json()))
    assert tree["text_to_item"]["R@1"] == pytest.approx(2 / 3)
    assert tree["text_to_item"]["chance"]["R@1"] == 0.5
    assert tree["item_to_text"]["ties_lost"]["R@1"] == 0.5  # item 0 scores 1 with its own text and with text 2


@pytest.mark.parametrize(
    ("items", "texts", "owner", "complaint"),
    [
        (torch.eye(3), torch.eye(3), torch.tensor([0, 1, 3]), r"owner\[2\] = 3 is outside the 3 items"),
        (torch.eye(3), torch.eye(3), torch.tensor([0, -1, 2]), r"owner\[1\] = -1"),
        (torch.eye(3), torch.eye(3), torch.tensor([0, 0, 2]), "item 1 has no text"),
        (torch.eye(3), torch.eye(3), torch.tensor([0, 1]), "one integer for each of the 3 texts"),
        (torch.eye(3), torch.eye(3), torch.tensor([0.0, 1.0, 2.0]), "float32"),
        (torch.eye(3), torch.eye(4), torch.arange(4), "not two matrices of one width"),
        (torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "items is empty"),
        (torch.eye(3) / torch.tensor([1.0, 0.0, 1.0]), torch.eye(3), torch.arange(3), r"items\[0\] holds a value that is not"),
    ],
)
def test_refuses_what_it_cannot_rank(items, texts, owner, complaint):
    with pytest.raises(ValueError, match=complaint):
        retrieval(items, texts, owner)
