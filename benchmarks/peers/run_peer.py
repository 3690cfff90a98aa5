"""One system in a process of its own, told line by line what to do: `python run_peer.py MODULE FOLDER`.

    stdin: command --> stdout: one line of JSON

    open CASE WORKERS     make a loader; CASE is raw or pictures
    pass                  one walk over all samples, timed: {"samples", "bytes", "seconds"}
    check                 one walk, not timed: {"samples", "digest"}, for pictures {"samples", "mean"}
    close                 end the loader and its workers
    first CASE WORKERS    from making a loader to its first batch, timed: {"seconds"}

MODULE (a file beside this one) has `prepare(folder)`, for what is done once, and a function for each case: `raw(folder, workers)`
and `pictures(folder, workers)`, iterables that may be walked again and again. raw gives batches of samples, each the bytes of its
members; pictures gives batches as uint8, (B, 3, 224, 224) or (B, 224, 224, 3).
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BATCH = 64
SIDE = 224  # pixels


class Runner:
    """Holds the loader that is open."""

    def __init__(self, system: ModuleType, folder: Path) -> None:
        self.system, self.folder, self.case = system, folder, ""
        self.loader: Iterable[Any] = ()

    def open(self, case: str, workers: str) -> dict[str, Any]:
        self.case, self.loader = case, getattr(self.system, case)(self.folder, int(workers))
        return {}

    def close(self) -> dict[str, Any]:
        getattr(self.loader, "close", lambda: None)()
        self.loader = ()
        gc.collect()
        return {}

    def first(self, case: str, workers: str) -> dict[str, Any]:
        began = time.perf_counter()
        self.open(case, workers)
        batches = iter(self.loader)
        size = len(next(batches))
        seconds = time.perf_counter() - began
        del batches
        self.close()
        return {"seconds": seconds, "samples": size}

    def walk(self) -> dict[str, Any]:
        samples = size = 0
        began = time.perf_counter()
        if self.case == "raw":
            for batch in self.loader:
                for members in batch:
                    samples += 1
                    for data in members:
                        size += len(data)
        else:
            for pictures in self.loader:
                samples += len(pictures)
                size += pictures.nbytes
        return {"samples": samples, "bytes": size, "seconds": time.perf_counter() - began}

    def check(self) -> dict[str, Any]:
        """The same from every system that delivers the same bytes, or much the same pictures, in whatever order."""
        samples = total = 0
        for batch in self.loader:
            samples += len(batch)
            if self.case == "raw":
                total += sum(zlib.crc32(data) for members in batch for data in members)
            else:
                pictures = torch.as_tensor(batch)
                if pictures.dtype != torch.uint8 or sorted(pictures.shape[1:]) != [3, SIDE, SIDE]:
                    raise ValueError(f"pictures of {pictures.dtype}, {tuple(pictures.shape)}")
                total += float(pictures.float().mean((1, 2, 3)).sum())
        return {"samples": samples, "digest": total} if self.case == "raw" else {"samples": samples, "mean": total / samples}


def main() -> None:
    # What a system prints, of its own accord or its workers', must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    system, folder = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    system.prepare(folder)
    runner = Runner(system, folder)
    commands = {"open": runner.open, "pass": runner.walk, "check": runner.check, "close": runner.close, "first": runner.first}
    versions = {name: importlib.metadata.version(name) for name in system.PACKAGES}
    answers.write(json.dumps({"versions": versions}) + "\n")
    for line in sys.stdin:
        name, *arguments = line.split()
        answers.write(json.dumps(commands[name](*arguments)) + "\n")
    os._exit(0)  # whatever threads and workers a system has left


if __name__ == "__main__":
    main()
