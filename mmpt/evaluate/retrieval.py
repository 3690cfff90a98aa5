"""Zero-shot retrieval: pure functions of embeddings. One protocol for pictures, sound and films.

    items (N, E), texts (M, E), owner (M,) -> scores, a block of queries at a time -> ranks -> recall, median, precision

A query's relevant candidates are those with its own label: one item for a text, one or more texts for an item. The rank of
a query is that of its best relevant candidate: 1 + the irrelevant ones that score strictly more. Equal scores have no true
order, so everything is computed twice: with ties won (the figures that others print, up to their sorting) and with ties lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

KS = (1, 5, 10)
BLOCK_SCORES = 1 << 24
"""Scores held at once (64 MiB in fp32); a block has as many queries as fit, and one at least."""

PROTOCOL = (
    "Cosine scores over all candidates of the split, in fp32. text_to_item: averaged over texts, one right item each. "
    "item_to_text: averaged over items, a hit if any of its texts is in the top k. Rank is 1 + the number of wrong "
    "candidates that score strictly more; ties_lost counts equal ones as well. mAP@10 divides by min(right candidates, 10). "
    "Chance: the expected value under a random order."
)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Averages over the queries of one direction; recall and mean average precision lie in [0, 1]."""

    recall: dict[int, float]  # k -> fraction of queries with a relevant candidate in the top k
    median_rank: float
    map_10: float

    def to_json(self) -> dict[str, float]:
        return {**{f"R@{k}": value for k, value in self.recall.items()}, "median_rank": self.median_rank, "mAP@10": self.map_10}


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One direction of retrieval."""

    queries: int
    candidates: int
    ties_won: Ranking
    ties_lost: Ranking
    chance: dict[int, float]  # k -> expected recall under a random order

    def to_json(self) -> dict[str, Any]:
        chance = {f"R@{k}": value for k, value in self.chance.items()}
        counts = {"queries": self.queries, "candidates": self.candidates}
        return {**counts, **self.ties_won.to_json(), "ties_lost": self.ties_lost.to_json(), "chance": chance}


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    items: int
    texts: int
    item_to_text: Direction
    text_to_item: Direction

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: counts, and for each direction the figures with ties won, `ties_lost` and `chance`."""
        directions = {"item_to_text": self.item_to_text.to_json(), "text_to_item": self.text_to_item.to_json()}
        return {"items": self.items, "texts": self.texts, **directions}


def retrieval(items: Float[Tensor, "N E"], texts: Float[Tensor, "M E"], owner: Int[Tensor, " M"]) -> RetrievalResult:
    """Rank every item for every text and every text for every item, by cosine if the embeddings have unit length.

    `owner[t]` is the row of `items` that text t describes; an item may have any number of texts but none.
    Memory is linear in N + M. Raises ValueError for shapes that do not fit, an owner out of range, an item without a text,
    and values that are not finite (a NaN loses every comparison, so it would rank first).
    The recall is that of CLIP_benchmark (image_retrieval_recall and text_retrieval_recall of its zeroshot_retrieval).
    """
    _check(items, texts, owner)
    owner = owner.to(items.device, torch.long)
    rows = torch.arange(len(items), device=items.device)
    return RetrievalResult(
        items=len(items),
        texts=len(texts),
        item_to_text=_direction(items, texts, rows, owner),
        text_to_item=_direction(texts, items, owner, rows),
    )


def _check(items: Tensor, texts: Tensor, owner: Tensor) -> None:
    if items.ndim != 2 or texts.ndim != 2 or items.shape[1] != texts.shape[1]:
        raise ValueError(f"items {tuple(items.shape)} and texts {tuple(texts.shape)}: not two matrices of one width")
    if owner.shape != (len(texts),) or owner.dtype.is_floating_point:
        raise ValueError(f"owner is {owner.dtype} {tuple(owner.shape)}: needs one integer for each of the {len(texts)} texts")
    if not len(items):
        raise ValueError("items is empty: nothing to retrieve")
    outside = (owner < 0) | (owner >= len(items))
    if outside.any():
        text = int(outside.nonzero()[0])
        many = int(outside.sum())
        raise ValueError(f"owner[{text}] = {int(owner[text])} is outside the {len(items)} items ({many} such texts)")
    bare = (torch.bincount(owner, minlength=len(items)) == 0).nonzero()
    if len(bare):
        raise ValueError(f"item {int(bare[0])} has no text ({len(bare)} such items of {len(items)}): leave them out")
    for name, values in (("items", items), ("texts", texts)):
        if not values.isfinite().all():
            row = int((~values.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"{name}[{row}] holds a value that is not finite")


def _direction(
    queries: Float[Tensor, "Q E"], candidates: Float[Tensor, "C E"], query_labels: Int[Tensor, " Q"], labels: Int[Tensor, " C"]
) -> Direction:
    right, won, lost = [], [], []
    for scores, relevant in _blocks(queries, candidates, query_labels, labels):
        right.append(relevant.sum(dim=1))
        best = scores.masked_fill(~relevant, -torch.inf).topk(min(10, scores.shape[1])).values
        scores.masked_fill_(relevant, -torch.inf)  # the wrong candidates alone
        nearest = scores.topk(min(10, scores.shape[1])).values
        won.append(_rank_and_precision(scores, nearest, best, torch.gt))
        lost.append(_rank_and_precision(scores, nearest, best, torch.ge))
    counts = torch.cat(right)
    return Direction(
        queries=len(queries),
        candidates=len(candidates),
        ties_won=_ranking(won, counts),
        ties_lost=_ranking(lost, counts),
        chance={k: _chance(counts, len(candidates), k) for k in KS},
    )


def _blocks(
    queries: Float[Tensor, "Q E"], candidates: Float[Tensor, "C E"], query_labels: Int[Tensor, " Q"], labels: Int[Tensor, " C"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores (block, C) in fp32 and whether each candidate is relevant, a block of queries at a time."""
    rows = max(1, BLOCK_SCORES // len(candidates))
    candidates = candidates.float()
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):  # a caller's autocast would score in bf16
        for start in range(0, len(queries), rows):
            block = slice(start, start + rows)
            yield queries[block].float() @ candidates.T, query_labels[block, None] == labels[None, :]


def _rank_and_precision(
    wrong: Float[Tensor, "B C"],
    nearest: Float[Tensor, "B K"],
    best: Float[Tensor, "B K"],
    beats: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Rank of the best relevant candidate, and the sum of precisions at the relevant ones of the top 10, if `beats` puts
    a wrong score before a relevant one.

    `nearest` and `best` are the ten highest wrong and relevant scores, falling, -inf where there are fewer: ten wrong candidates
    before a relevant one push it out of the top 10, however many more there are.
    """
    rank = 1 + beats(wrong, best[:, :1]).sum(dim=1)
    place = torch.arange(1, best.shape[1] + 1, device=best.device)
    ranks = place + beats(nearest[:, None, :], best[:, :, None]).sum(dim=2)
    counted = (ranks <= 10) & (best > -torch.inf)
    return rank, torch.where(counted, place / ranks, 0.0).sum(dim=1)


def _ranking(blocks: list[tuple[Tensor, Tensor]], counts: Int[Tensor, " Q"]) -> Ranking:
    ranks = torch.cat([rank for rank, _ in blocks]).double().sort().values
    precision = torch.cat([total for _, total in blocks]).double() / counts.clamp(max=10)
    return Ranking(
        recall={k: (ranks <= k).double().mean().item() for k in KS},
        median_rank=ranks[[(len(ranks) - 1) // 2, len(ranks) // 2]].mean().item(),
        map_10=precision.mean().item(),
    )


def _chance(counts: Int[Tensor, " Q"], candidates: int, k: int) -> float:
    """Mean chance that a random order of the candidates puts a relevant one in its top k."""
    missed = torch.ones(len(counts), dtype=torch.float64, device=counts.device)
    for place in range(min(k, candidates)):
        missed *= (candidates - counts - place).clamp(min=0).double() / (candidates - place)
    return (1 - missed.mean()).item()
