"""Packs for tests of ring attention, whichever rank holds a token; slices worked out from the mask itself; dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Int
from torch import Tensor

from mmpt.parallel.planner import plan_sequence, ring_plan
from mmpt.parallel.ring import ring_attention
from mmpt.types import RingPlan, Slice


@dataclass(frozen=True)
class Pack:
    """Documents end to end, then padding, and the rank that holds each token."""

    lengths: tuple[int, ...]
    padding: int
    mask: str  # causal, bidirectional or media
    ranks: int
    owners: tuple[int, ...]  # by token
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()  # of every document: (start, stop) within it

    @property
    def document_ids(self) -> Int[Tensor, " T"]:
        numbers = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))
        return torch.cat([numbers, torch.full((self.padding,), -1)])

    @property
    def seen(self) -> Bool[Tensor, "T T"]:
        """Whether the token of the row sees that of the column."""
        numbers, places = self.document_ids, torch.arange(len(self.owners))
        same = (numbers[:, None] == numbers) & (numbers >= 0)
        if self.mask == "bidirectional":
            return same
        seen = same & (places[:, None] >= places)
        start = 0
        for length, spans in zip(self.lengths, self.spans, strict=False):
            for first, last in spans:
                seen[start + first : start + last, start + first : start + last] = True
            start += length
        return seen

    def rows(self, rank: int) -> Int[Tensor, " t"]:
        """The tokens of a rank in order of document and place; padding has the last numbers."""
        return (torch.tensor(self.owners) == rank).nonzero().flatten()


Results = list[Tensor]
"""Output and the gradients of queries, keys and values."""

Cases = list[tuple[Pack, list[RingPlan]]]
"""Packs with the plan of every rank."""


def plan_by_hand(pack: Pack, rank: int) -> RingPlan:
    """What the planner is to find, from the whole mask: needed keys alone, and rectangles that cover the mask once."""
    seen, hops = pack.seen, range(pack.ranks)
    slices, send, receive_sizes = [], [], []
    for hop in hops:
        mask = seen[pack.rows(rank)][:, pack.rows((rank - hop) % pack.ranks)]
        needed = torch.ones(mask.shape[1], dtype=torch.bool) if hop == 0 else mask.any(0)
        slices.append(rectangles(mask[:, needed]))
        receive_sizes.append(int(needed.sum()))
        other = seen[pack.rows((rank + hop) % pack.ranks)][:, pack.rows(rank)]
        send.append(other.any(0).nonzero().flatten() if hop else torch.empty(0, dtype=torch.int64))
    return RingPlan(
        slices=tuple(slices), send=torch.cat(send), send_sizes=tuple(map(len, send)), receive_sizes=tuple(receive_sizes)
    )


def by_hand(pack: Pack) -> tuple[Pack, list[RingPlan]]:
    return pack, [plan_by_hand(pack, rank) for rank in range(pack.ranks)]


def planned(
    lengths: tuple[int, ...], padding: int, ranks: int, mask: str, spans: tuple[tuple[tuple[int, int], ...], ...] = ()
) -> tuple[Pack, list[RingPlan]]:
    """As the planner shares it."""
    plan = plan_sequence(lengths, spans or None, padding, ranks, mask=mask)
    owners = np.empty(len(plan.order), dtype=np.int64)
    owners[plan.order] = np.arange(ranks).repeat(len(plan.order) // ranks)
    pack = Pack(lengths, padding, mask, ranks, tuple(owners.tolist()), spans)
    return pack, [ring_plan(plan, rank) for rank in range(ranks)]


def rectangles(mask: Bool[Tensor, "n m"]) -> tuple[Slice, ...]:
    """Disjoint slices that cover a mask, each as large as greed makes it, the largest causal square first."""
    left, found = mask.clone(), []
    while left.any():
        row = int(left.any(1).nonzero()[0])
        column = int(left[row].nonzero()[0])
        square = _square(left, row, column)
        if square > 1:
            found.append(Slice(row, row + square, column, column + square, True))
            left[row : row + square, column : column + square] = False
            continue
        width = _count(left[row, column:])
        height = _count(left[row:, column : column + width].all(1) & (left[row:, column : column + width + 1].sum(1) == width))
        found.append(Slice(row, row + height, column, column + width, False))
        left[row : row + height, column : column + width] = False
    return tuple(found)


def _square(mask: Bool[Tensor, "n m"], row: int, column: int) -> int:
    """The side of the largest causal square with this corner that is just so."""
    side = 0
    while row + side < mask.shape[0] and column + side < mask.shape[1]:
        line = mask[row + side, column:]
        if not line[: side + 1].all() or line[side + 1 :].any():
            break
        side += 1
    return side


def _count(line: Bool[Tensor, " n"]) -> int:
    """How many are true before the first that is not."""
    return int(line.long().cumprod(0).sum())


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Bool[Tensor, "T T"]) -> Tensor:
    """Attention by its definition; a row that sees nothing is 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("hqk,khd->qhd", weights, v)


def random_heads(tokens: int, heads: tuple[int, int], head_dim: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, drawn in fp64 and rounded. `heads`: of queries, of keys."""
    generator = torch.Generator().manual_seed(tokens)
    counts = (heads[0], heads[1], heads[1], heads[0])
    wide = [torch.randn(tokens, h, head_dim, dtype=torch.float64, generator=generator) for h in counts]
    return [x.to(dtype) for x in wide]


def dense_results(heads: Sequence[Tensor], pack: Pack) -> Results:
    """By definition, in fp64."""
    q, k, v = (x.double().requires_grad_() for x in heads[:3])
    out = dense(q, k, v, pack.seen)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), heads[3].double())]


def ring_results(heads: Sequence[Tensor], pack: Pack, plan: RingPlan, group: dist.ProcessGroup | None) -> Results:
    """Of this rank's tokens."""
    rows = pack.rows(0 if group is None else dist.get_rank(group))
    *leaves, dout = (x[rows] for x in heads)
    leaves = [x.requires_grad_() for x in leaves]
    out = ring_attention(*leaves, plan, group)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def results_of_cases(cases: Cases, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[Results]:
    """For a body of ranks: of this rank, for every pack."""
    rank, group = dist.get_rank(), dist.group.WORLD
    return [ring_results(random_heads(len(x.owners), heads, head_dim, dtype), x, plans[rank], group) for x, plans in cases]


def assert_equals_dense(found: Sequence[Results], heads: Sequence[Tensor], pack: Pack, bound: float) -> None:
    """What the ranks found, one after the other, is what the definition says."""
    for name, whole, *parts in zip(("out", "dq", "dk", "dv"), dense_results(heads, pack), *found, strict=True):
        for rank, part in enumerate(parts):
            expected = whole[pack.rows(rank)]
            torch.testing.assert_close(
                part.double(), expected, rtol=bound, atol=bound, msg=lambda text, at=(name, rank): f"{at} of {pack}: {text}"
            )


def assert_cases(
    found: Sequence[list[Results]], cases: Cases, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, bound: float
) -> None:
    """The same of what `results_of_cases` found on every rank."""
    for parts, (pack, _) in zip(zip(*found, strict=True), cases, strict=True):
        assert_equals_dense(parts, random_heads(len(pack.owners), heads, head_dim, dtype), pack, bound)


def random_packs(ranks: int, count: int, tokens: int = 40) -> list[Pack]:
    """Documents of 1 token, giants, spans across borders, tokens anywhere, ranks that hold few, none, or padding alone."""
    found: list[Pack] = []

    @given(pack=packs(ranks, tokens))
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate])
    def draw(pack: Pack) -> None:
        found.append(pack)

    draw()
    return found


@st.composite
def packs(draw: st.DrawFn, ranks: int, tokens: int) -> Pack:
    lengths = tuple(draw(st.lists(st.one_of(st.integers(1, 6), st.integers(1, tokens)), min_size=1, max_size=6)))
    mask = draw(st.sampled_from(["causal", "bidirectional", "media"]))
    total = sum(lengths) + (padding := draw(st.integers(0, 5)))
    kind = draw(st.sampled_from(["anywhere", "contiguous", "chunks", "documents"]))
    if kind == "anywhere":
        owners = draw(st.lists(st.integers(0, ranks - 1), min_size=total, max_size=total))
    elif kind == "documents":
        holders = draw(st.lists(st.integers(0, ranks - 1), min_size=len(lengths), max_size=len(lengths)))
        owners = [holder for holder, n in zip(holders, lengths, strict=True) for _ in range(n)] + [ranks - 1] * padding
    else:
        chunk = -(-total // ranks) if kind == "contiguous" else draw(st.integers(1, 5))
        owners = [token // chunk % ranks for token in range(total)]
    spans = tuple(tuple(draw(_spans(length))) for length in lengths) if mask == "media" else ()
    return Pack(lengths, padding, mask, ranks, tuple(owners), spans)


@st.composite
def _spans(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    edges = sorted(draw(st.sets(st.integers(0, length), max_size=4)))
    return list(zip(edges[::2], edges[1::2], strict=False))
