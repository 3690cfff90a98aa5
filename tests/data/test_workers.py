"""Results of worker processes: in order, equal, kept as long as they are held, and every fault told."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import pytest
import torch
from torch import Tensor

import mmpt.data.workers
from mmpt.data.workers import Workers
from mmpt.types import UserError

COUNT = 2  # workers


@dataclass(frozen=True)
class Result:
    number: int
    pixels: Tensor
    lengths: np.ndarray
    rest: tuple[Tensor, str, dict[str, Tensor]]


def compute(number: int) -> Result:
    """A function of the request alone, with arrays of many types, empty and scalar ones among them."""
    pixels = torch.full((number % 5, 3, 1000), number % 251, dtype=torch.uint8)
    lengths = torch.zeros(number % 3, 3, dtype=torch.int64).T[0]  # of none or one element, its stride is 3
    half = torch.arange(number % 7).to(torch.bfloat16)
    return Result(
        number, pixels, np.arange(number) * 2, (half, f"{number}", {"scalar": torch.tensor(number > 3), "stride": lengths})
    )


def same(left: Result, right: Result) -> bool:
    (half, text, last), (other_half, other_text, other_last) = left.rest, right.rest
    return (
        left.number == right.number
        and left.pixels.dtype == right.pixels.dtype
        and torch.equal(left.pixels, right.pixels)
        and left.lengths.dtype == right.lengths.dtype
        and np.array_equal(left.lengths, right.lengths)
        and torch.equal(half, other_half)
        and text == other_text
        and torch.equal(last["scalar"], other_last["scalar"])
    )


def wait_long(number: int) -> int:
    threading.Event().wait(30)
    return number


@pytest.fixture
def workers():
    made = []

    def make(function, count=COUNT):
        made.append(Workers(function, count))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_order_and_equal_and_again(workers, processes):
    pool = workers(compute, processes)
    for requests in (range(20), range(3), range(0), range(40, 60)):
        results = list(pool.map(requests))  # all kept: more than there are slots
        assert [result.number for result in results] == list(requests)
        assert all(same(result, compute(number)) for result, number in zip(results, requests, strict=True))


def test_what_is_held_is_not_written_over(workers):
    pool = workers(compute)
    walk = pool.map(range(100))
    held = [result.pixels[:, 0, 5:9] for result in islice(walk, 4)]  # views of views, their tensors gone
    copies = [each.clone() for each in held]
    for result in walk:
        assert same(result, compute(result.number))
    assert all(torch.equal(each, copy) for each, copy in zip(held, copies, strict=True))


def test_a_result_may_be_written_to(workers):
    for result in workers(compute).map(range(10)):
        result.pixels.fill_(7)
        assert (result.pixels == 7).all()


def test_slots_come_back_when_results_go(workers):
    pool = workers(lambda number: torch.full((1000,), number), COUNT)
    addresses = {result.data_ptr() for result in pool.map(range(200))}
    assert len(addresses) <= COUNT * 2 + 2


def test_a_result_larger_than_a_slot_arrives(workers, monkeypatch):
    monkeypatch.setattr(mmpt.data.workers, "_SLOT_BYTES", 4096)
    results = list(workers(compute).map([1, 9999, 2]))
    assert all(same(result, compute(result.number)) for result in results)


def fail(number: int) -> int:
    if number == 3:
        raise UserError("field x = 3: too much, lower it")
    if number == 4:
        raise KeyError("four")
    return number


def test_a_users_mistake_arrives_as_it_is_and_other_faults_with_their_traceback(workers):
    pool = workers(fail)
    with pytest.raises(UserError, match=r"^field x = 3: too much, lower it$"):
        list(pool.map(range(10)))
    with pytest.raises(RuntimeError, match="the workers are closed"):
        list(pool.map([5, 6]))
    with pytest.raises(RuntimeError, match=r"(?s)in fail.*KeyError: 'four'"):
        list(workers(fail).map([1, 4, 2]))


def test_what_ends_the_requests_comes_after_all_their_results(workers):
    def requests():
        yield from range(9)
        raise UserError("the data ended")

    for ahead in (1, 4):
        pool, results = Workers(compute, COUNT, ahead), []
        with pytest.raises(UserError, match="the data ended"):
            for result in pool.map(requests()):
                results.append(result.number)
        assert results == list(range(9))


def test_workers_that_were_interrupted_while_they_answered_are_closed(workers):
    """Nobody knows how much of the answer was read: the next walk would get what is left of it."""

    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    pool, before = workers(wait_long), signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupted):
            next(pool.map(range(4)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(RuntimeError, match="the workers are closed"):
        next(pool.map(range(4)))


def test_a_walk_may_be_left_early(workers):
    pool = workers(compute)
    walk = pool.map(count())
    assert [next(walk).number for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="busy"):
        next(pool.map(range(3)))
    walk.close()
    assert [result.number for result in pool.map(range(30))] == list(range(30))


def test_requests_are_drawn_only_as_far_ahead_as_the_workers_wait(workers):
    drawn = []
    walk = workers(compute).map(drawn.append(i) or i for i in count())
    next(walk)
    assert len(drawn) == COUNT * 2 + 1


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_dead_worker_is_told(workers):
    with pytest.raises(RuntimeError, match="exit code -9"):
        list(workers(die).map(range(10)))


def test_close_ends_the_processes(workers):
    pool = workers(lambda _: os.getpid())
    pids = set(pool.map(range(4)))
    assert len(pids) == COUNT
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
