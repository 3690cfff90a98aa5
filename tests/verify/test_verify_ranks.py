"""Ranks that raise, die or hang are told of in time, and are gone then."""

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from mmpt.verify.ranks import Failed, on_ranks


def count(things: int) -> Iterator[tuple[int, int]]:
    """Each rank's number, and the sum over ranks of what it adds."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for number in range(things):
        total = torch.tensor(10 * rank + number)
        if dist.is_initialized():
            dist.all_reduce(total)
        yield rank, int(total)


def test_results_of_all_ranks_one_after_the_other():
    assert list(on_ranks(3, count, 2, limit=60)) == [[(0, 30), (1, 30), (2, 30)], [(0, 33), (1, 33), (2, 33)]]
    assert list(on_ranks(2, count, 1, limit=60)) == [[(0, 10), (1, 10)]]
    assert list(on_ranks(1, count, 1, limit=60)) == [[(0, 0)]]


def fail(how: str) -> Iterator[int]:
    """On rank 1; the others wait for it."""
    yield 1
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("two kinds of 3")
        if how == "die":
            os._exit(7)
        if how == "end":
            return
        time.sleep(1000)
    yield 2
    dist.barrier()
    yield 3


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", "rank 1 of 3: ValueError: two kinds of 3\nTraceback"),
        ("die", "rank 1 of 3: it ended without a word"),
        ("end", "some ranks ended before others"),
        ("hang", r"ranks? "),
    ],
)
def test_a_failure_ends_in_time(how: str, told: str):
    began = time.monotonic()
    walk = on_ranks(3, fail, how, limit=5)
    assert next(walk) == [1, 1, 1]
    with pytest.raises(Failed, match="^" + told):
        list(walk)
    assert time.monotonic() - began < 30
