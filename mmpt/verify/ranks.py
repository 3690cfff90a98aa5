"""Processes that stand for the ranks of a layout, on one machine and with a time limit: a hang is a failure, not a wait.

body, arguments --pipe--> each of n ranks, a gloo group of n --pipe, one for all that the body yields--> results of all ranks
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Children of a server that has imported torch start in a tenth of a second. It has computed nothing, so it has no threads.
_START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_IMPORTED = ["mmpt.verify.steps", "torch._dynamo"]  # the second by fully_shard, when it is first called
_GRACE = 3.0  # seconds in which ranks may say what went wrong with them


class Failed(Exception):
    """A rank raised something, died, or did not answer in time."""


def on_ranks(ranks: int, body: Callable[..., Iterable[Any]], *arguments: Any, limit: float) -> Iterator[list[Any]]:
    """All that `body(*arguments)` yields on each of so many ranks: each time what it is on all of them, in order.

    One rank alone has no process group. Every call has processes of its own: torch remembers meshes, and takes one whose groups
    are gone for another of the same shape. They end with the walk, however it ends. Raises Failed where a rank raises, dies, or
    takes more than `limit` seconds for one result.
    """
    context = multiprocessing.get_context(_START_METHOD)
    if _START_METHOD == "forkserver":
        context.set_forkserver_preload(_IMPORTED)
    # This process keeps the store by which ranks find one another; it takes any port that is free.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
    pipes, processes = [], []
    try:
        for rank in range(ranks):
            here, there = context.Pipe()
            job = (there, rank, ranks, store.port if store else 0, limit, body, arguments)
            process = context.Process(target=_work, args=job, name=f"rank-{rank}", daemon=True)
            process.start()
            there.close()  # so that the pipe breaks when the process ends
            pipes.append(here)
            processes.append(process)
        while (answers := _answers(pipes, limit + _GRACE)) is not None:
            yield answers
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(pipes: Sequence[Connection], seconds: float) -> list[Any] | None:
    """The next result of each rank; None once they are done."""
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    answers, faults, deadline = {}, {}, time.monotonic() + seconds
    while waiting:
        ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                answers[rank], fault = pipe.recv()
            except EOFError:
                fault = "it ended without a word"
            if fault and not faults:
                deadline = min(deadline, time.monotonic() + _GRACE)
            if fault:
                faults[rank] = fault
    if faults:
        raise Failed("\n".join(f"rank {rank} of {len(pipes)}: {fault}" for rank, fault in faults.items()))
    if waiting:
        raise Failed(f"ranks {sorted(waiting.values())} of {len(pipes)} did not answer in time")
    if len({answer is None for answer in answers.values()}) > 1:
        raise Failed("some ranks ended before others")
    return None if answers[0] is None else [answers[rank][0] for rank in range(len(pipes))]


def _work(
    pipe: Connection, rank: int, ranks: int, port: int, limit: float, body: Callable[..., Iterable[Any]], arguments: tuple
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    torch.set_num_threads(1)
    # That it is slow to bring a tensor together which tp and FSDP have cut: here it is wanted.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    try:
        if ranks > 1:
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=limit))
        for value in body(*arguments):
            pipe.send(((value,), None))
        pipe.send((None, None))
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    pipe.poll(None)  # until the parent ends this process: if it went, the others would complain of that
