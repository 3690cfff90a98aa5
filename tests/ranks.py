"""Run a function on several gloo ranks of this machine, each a process, with a time limit."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 120  # seconds


def _rank(rank: int, size: int, port: int, body: Callable[..., Any], arguments: tuple, results: Any) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    results[rank] = body(*arguments)
    dist.destroy_process_group()


def on_ranks(size: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `body(*arguments)` returns on each of `size` ranks, in order of rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        context = mp.start_processes(_rank, (size, port, body, arguments, results), nprocs=size, join=False, start_method="spawn")
        deadline = time.monotonic() + LIMIT
        while not context.join(timeout=1):  # true once all ranks are done; raises what a rank raised
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"ranks did not end within {LIMIT} s")
        return [results[rank] for rank in range(size)]
