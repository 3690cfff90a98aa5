"""Actions in forked processes, for tests of what processes share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("fork")


def in_children(actions: list[Callable[[], Any]]) -> list[Any]:
    """What the actions return, each in a forked process; all of them start at once."""
    barrier, pipes = FORK.Barrier(len(actions)), [FORK.Pipe(duplex=False) for _ in actions]

    def work(number: int) -> None:
        barrier.wait(timeout=10)
        pipes[number][1].send(actions[number]())

    children = [FORK.Process(target=work, args=(number,)) for number in range(len(actions))]
    try:
        for child in children:
            child.start()
        for _, writer in pipes:
            writer.close()  # else a child that died would be waited for
        for reader, _ in pipes:
            assert reader.poll(20), "a child hangs"
        answers = [reader.recv() for reader, _ in pipes]
        for child in children:
            child.join(timeout=20)
        assert [child.exitcode for child in children] == [0] * len(children)
        return answers
    finally:
        for child in children:
            child.kill()
