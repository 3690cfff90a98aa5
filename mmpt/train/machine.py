"""Settings of this process that a run relies on: sums that repeat, memory that stays."""

from __future__ import annotations

import ctypes
import sys

import torch

# glibc's mallopt parameters, malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def make_repeatable() -> None:
    """The same sums in the same order every time: a resumed run must end in the same bits."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees. It would give large blocks back to the system and fault every page in again at
    the next step: a fifth of a step's time on a CPU (benchmarks/NOTES.md). Other C libraries are left alone."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_TOP_PAD, 1 << 26)
