"""Routes between parts, by index arithmetic alone; and rows and gradients that take them, over gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks

from mmpt.parallel.exchange import exchange, make_route
from mmpt.types import Route

Look = tuple[int, int, int]  # the part that made the row, its number there, the part that looks at it

WIDTH = 3


def routes(looks: list[Look], parts: int) -> list[tuple[Route, torch.Tensor]]:
    columns = torch.tensor(looks, dtype=torch.int64).reshape(-1, 3).T
    return [make_route(*columns, part, parts) for part in range(parts)]


@st.composite
def many_looks(draw: st.DrawFn) -> tuple[int, list[Look]]:
    parts = draw(st.integers(1, 5))
    part = st.integers(0, parts - 1)
    return parts, draw(st.lists(st.tuples(part, st.integers(0, 6), part), max_size=40))


def test_a_route_by_hand():
    """Part 0 has rows 4 and 7; part 1 looks at 7, at 4, at 7 again, and at its own row 2."""
    (first, none), (second, found) = routes([(0, 7, 1), (0, 4, 1), (0, 7, 1), (1, 2, 1)], 2)
    assert (first.send.tolist(), first.send_sizes, first.receive_sizes, none.tolist()) == ([4, 7], (0, 2), (0, 0), [])
    assert (second.send.tolist(), second.send_sizes, second.receive_sizes) == ([2], (0, 1), (2, 1))
    assert found.tolist() == [1, 0, 1, 2]


@settings(deadline=None)
@given(many_looks())
def test_everyone_finds_what_he_looks_at(case: tuple[int, list[Look]]):
    """What parts send fits what the others receive, and no row goes to a part twice."""
    parts, looks = case
    made = routes(looks, parts)
    sent = [[(source, int(row)) for row in route.send] for source, (route, _) in enumerate(made)]
    letters = [
        [
            sent[source][sum(made[source][0].send_sizes[:target]) :][: made[source][0].send_sizes[target]]
            for target in range(parts)
        ]
        for source in range(parts)
    ]
    for target, (route, found) in enumerate(made):
        received = [row for source in range(parts) for row in letters[source][target]]
        assert route.receive_sizes == tuple(len(letters[source][target]) for source in range(parts))
        assert len(set(received)) == len(received)
        assert [received[i] for i in found] == [(source, row) for source, row, to in looks if to == target]


CASES: dict[str, list[Look]] = {
    "to all": [(source, row, target) for source in range(4) for row in range(5) for target in range(4)],
    "some": [(0, 0, 1), (0, 4, 1), (1, 2, 3), (1, 2, 0), (1, 2, 1), (1, 2, 2), (3, 3, 0)],
    "one way": [(2, row, 3) for row in (4, 0)],
    "nobody": [],
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def rows_of(part: int, dtype: torch.dtype) -> torch.Tensor:
    return (100 * part + torch.arange(5 * WIDTH).view(5, WIDTH)).to(dtype)


def body(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every case and type: what this rank receives, and the gradient of its rows where rank r's k-th row counts r + k + 1."""
    rank, seen = dist.get_rank(), []
    for looks in CASES.values():
        route, _ = routes([look for look in looks if max(look[0], look[2]) < size], size)[rank]
        for dtype in DTYPES:
            rows = rows_of(rank, dtype).requires_grad_()
            found = exchange(rows, route, dist.group.WORLD)
            weight = (rank + 1 + torch.arange(len(found)))[:, None].expand(-1, WIDTH)
            (found * weight.to(dtype)).sum().backward()
            seen.append((found.detach(), rows.grad))
    return seen


@pytest.mark.parametrize("size", [1, 4])
def test_rows_and_gradients_arrive(size: int):
    by_rank = on_ranks(size, body, size)
    number = 0
    for looks in CASES.values():
        looks = sorted({look for look in looks if max(look[0], look[2]) < size})
        for dtype in DTYPES:
            gradients = [torch.zeros(5, WIDTH, dtype=dtype) for _ in range(size)]
            for target in range(size):
                wanted = [(source, row) for source, row, to in looks if to == target]
                expected = [rows_of(source, dtype)[row] for source, row in wanted]
                assert torch.equal(
                    by_rank[target][number][0], torch.stack(expected) if expected else torch.zeros(0, WIDTH, dtype=dtype)
                )
                for k, (source, row) in enumerate(wanted):
                    gradients[source][row] += target + 1 + k
            for rank, gradient in enumerate(gradients):
                assert torch.equal(by_rank[rank][number][1], gradient)
            number += 1


def test_alone_it_is_an_index():
    rows = rows_of(0, torch.float64).requires_grad_()
    (route, found), *_ = routes([(0, 4, 0), (0, 1, 0), (0, 4, 0)], 1)
    seen = exchange(rows, route, None)[found]
    assert torch.equal(seen, rows[[4, 1, 4]])
    (gradient,) = torch.autograd.grad(seen.sum(), rows)
    assert gradient[:, 0].tolist() == [0, 1, 0, 0, 2]
