"""Faults that ring attention could have: under each of them the comparison of test_ring.py fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from rings import Pack, Results, assert_equals_dense, plan_by_hand, random_heads, ring_results

from mmpt.parallel import ring
from mmpt.parallel.kernels import CpuFlash
from mmpt.parallel.ring import Ring, Sum, Whole

# Two documents on each rank in turn, so that hops have several slices and rows that see no key of a hop.
PACK = Pack((21, 8), 3, "causal", 2, tuple(token // 4 % 2 for token in range(32)))


def swapped(ring_: Ring, hop: int, dk: Sum, dv: Sum) -> Any:
    return SEND_HOME(ring_, hop, dv, dk)


def last_dropped(ring_: Ring, hop: int, returning: Any, own: tuple[Sum, Sum]) -> None:
    if hop == 1:  # the last that comes home
        returning.take()
    else:
        BRING_HOME(ring_, hop, returning, own)


def zero_for_nothing(whole: Whole) -> None:
    opened = whole._out is not None
    OPEN(whole)
    if not opened:
        whole._lse.masked_fill_(whole._lse.isneginf(), 0.0)


def local_lse(kernel: CpuFlash, dout, q, k, v, out, lse, pieces):
    """A slice's own `out` and `lse` in place of the whole row's."""
    return BACKWARD(kernel, dout, q, k, v, *kernel.forward(q, k, v, pieces), pieces)


def plain_mean(whole: Whole, rows: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Parts are averaged as if they had as much weight."""
    MERGE(whole, rows, out, torch.zeros_like(lse))


def first_keys_again(ring_: Ring, hop: int, k: torch.Tensor, v: torch.Tensor) -> Any:
    """Values come for keys."""
    return SEND_KEYS(ring_, hop, v, v)


def causality_dropped(slices: Any) -> Any:
    return MAKE_RUNS([piece._replace(causal=False) for piece in slices])


SEND_HOME, BRING_HOME, SEND_KEYS, OPEN, MERGE = Ring.send_home, Ring.bring_home, Ring.send_keys, Whole._open, Whole.merge
BACKWARD, MAKE_RUNS = CpuFlash.backward, ring.make_runs

MUTATIONS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "none": (Ring, "send_home", SEND_HOME),
    "dK and dV swapped": (Ring, "send_home", swapped),
    "gradients of the last hop dropped": (Ring, "bring_home", last_dropped),
    "lse 0 for -inf": (Whole, "_open", zero_for_nothing),
    "a slice's own lse going back": (CpuFlash, "backward", local_lse),
    "parts not weighted": (Whole, "merge", plain_mean),
    "values for keys": (Ring, "send_keys", first_keys_again),
    "squares as rectangles": (ring, "make_runs", causality_dropped),
}


def _mutated() -> dict[str, Results]:
    """The results of this rank under each of the faults."""
    heads, plan, found = random_heads(len(PACK.owners), (2, 1)), plan_by_hand(PACK, dist.get_rank()), {}
    for name, (owner, attribute, fault) in MUTATIONS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, fault)
            found[name] = ring_results(heads, PACK, plan, dist.group.WORLD)
    return found


def test_the_comparison_fails_under_every_fault_and_under_no_other():
    on_two = on_ranks(2, _mutated)
    heads = random_heads(len(PACK.owners), (2, 1))
    for name in MUTATIONS:
        found = [results[name] for results in on_two]
        if name == "none":
            assert_equals_dense(found, heads, PACK, 1e-12)
            continue
        with pytest.raises(AssertionError, match="Mismatched elements"):
            assert_equals_dense(found, heads, PACK, 1e-12)
