"""The local kernels of ring attention on one device: TFLOP/s of a document and of packed ones, and a ring of four played through.

Called by ring.py --device. The ring is simulated: four shards are computed in turn on the one device, each with all the keys that
its plan brings it, no network; the time of all four is set against one call for all tokens. FLOP are those of the pairs that are
seen: 4 per pair, head and channel forward, 10 backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmpt.parallel.kernels import CpuFlash, Efficient, Kernel, VarlenFlash, make_runs
from mmpt.parallel.planner import SequencePlan, plan_sequence, ring_plan
from mmpt.parallel.ring import ring_attention
from mmpt.types import RingPlan, Slice

SIZES = (8192, 32768, 131072)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHARDS, ROUNDS = 4, 5
PACKED = (32, 12, 8, 6, 4, 2)  # 64ths of the tokens


def packs(tokens: int) -> dict[str, list[int]]:
    return {"one document": [tokens], "six documents": [tokens * part // 64 for part in PACKED]}


def whole_plan(lengths: list[int], ranks: int) -> SequencePlan:
    return plan_sequence(lengths, None, 0, ranks, mask="causal")


def backends(device: torch.device) -> dict[str, tuple[Kernel, torch.dtype]]:
    """Every kernel for this device, with the type that it is measured in."""
    if device.type == "cpu":
        return {"flash, fp32": (CpuFlash(), torch.float32)}
    return {"varlen flash, bf16": (VarlenFlash(), torch.bfloat16), "xformers, bf16": (Efficient(), torch.bfloat16)}


def seconds(run: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """The median, the device idle before and after."""
    taken = []
    for _ in range(rounds + 1):  # the first warms up
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(rows: int, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(heads, rows, HEAD_DIM, dtype=dtype, device=device)


def kernel_rates(kernel: Kernel, lengths: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """TFLOP/s of all runs of a pack on one rank, forward and backward."""
    plan, tokens = whole_plan(lengths, 1), sum(lengths)
    runs = make_runs(ring_plan(plan, 0).slices[0])
    q, k, v, dout = (draw(tokens, heads, dtype, device) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    pairs = float(plan.work.sum()) * HEADS * HEAD_DIM
    rows = [(q[:, run.queries], k[:, run.keys], v[:, run.keys]) for run in runs]
    found = [kernel.forward(*each, run.pieces) for each, run in zip(rows, runs, strict=True)]

    def forward() -> None:
        for each, run in zip(rows, runs, strict=True):
            kernel.forward(*each, run.pieces)

    def backward() -> None:
        for each, (out, lse), run in zip(rows, found, runs, strict=True):
            kernel.backward(dout[:, run.queries], *each, out, lse, run.pieces)

    return {
        "forward": 4 * pairs / seconds(forward, device) / 1e12,
        "backward": 10 * pairs / seconds(backward, device) / 1e12,
    }


def shards(plan: SequencePlan) -> Iterator[tuple[Tensor, Tensor, RingPlan]]:
    """Of every rank: its tokens, the tokens whose keys it has after all hops, and its slices over these as one hop."""
    tokens = torch.from_numpy(plan.order).chunk(plan.ranks)
    plans = [ring_plan(plan, rank) for rank in range(plan.ranks)]
    for rank, own in enumerate(plans):
        keys, slices = [tokens[rank]], list(own.slices[0])
        for hop in range(1, plan.ranks):
            other = plans[(rank - hop) % plan.ranks]
            first, start = sum(map(len, keys)), sum(other.send_sizes[:hop])
            keys.append(tokens[(rank - hop) % plan.ranks][other.send[start : start + other.send_sizes[hop]]])
            slices += [Slice(a, b, first + c, first + d, causal) for a, b, c, d, causal in own.slices[hop]]
        seen = torch.cat(keys)
        one_hop = {"send": torch.empty(0, dtype=torch.int64), "send_sizes": (0,), "receive_sizes": (len(seen),)}
        yield tokens[rank], seen, RingPlan(slices=(tuple(slices),), **one_hop)


def simulated(plan: SequencePlan, heads: list[Tensor]) -> list[Tensor]:
    """Output and gradients of all tokens, shard after shard; q, k, v, dout are (tokens, heads, head_dim)."""
    q, k, v, dout = heads
    found = [torch.zeros_like(x) for x in (q, q, k, v)]
    for rows, seen, own in shards(plan):
        rows, seen = rows.to(q.device), seen.to(q.device)
        leaves = [x[at].requires_grad_() for x, at in ((q, rows), (k, seen), (v, seen))]
        out = ring_attention(*leaves, own, None)
        parts = torch.autograd.grad(out, leaves, dout[rows])
        for total, at, part in zip(found, (rows, rows, seen, seen), (out.detach(), *parts), strict=True):
            total.index_add_(0, at, part)
    return found


def ring_share(lengths: list[int], dtype: torch.dtype, device: torch.device) -> float:
    """The time of one call for all tokens over that of four shards."""
    heads = [draw(sum(lengths), n, dtype, device).transpose(0, 1) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    whole, shared = (seconds(partial(simulated, whole_plan(lengths, ranks), heads), device) for ranks in (1, SHARDS))
    return whole / shared


def figures(device: torch.device, sizes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    found = {}
    for tokens in sizes:
        for name, lengths in packs(tokens).items():
            for backend, (kernel, dtype) in backends(device).items():
                found[f"{name} {tokens}, {backend}"] = kernel_rates(kernel, lengths, dtype, device)
            (_, dtype), *_ = backends(device).values()
            found[f"{name} {tokens}, ring of {SHARDS}"] = {"share_of_one_call": ring_share(lengths, dtype, device)}
    return found


def main(device: torch.device, sizes: tuple[int, ...] = SIZES) -> Path | str:
    """Print and record; without such a device say that nothing was measured."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "not measured: there is no such accelerator here"
    found = figures(device, sizes)
    table = Table("", "forward, TFLOP/s", "backward, TFLOP/s", f"{SHARDS} shards, share of one call", title=str(device))
    for name, row in found.items():
        table.add_row(name, *(f"{row[key]:.2f}" if key in row else "" for key in ("forward", "backward", "share_of_one_call")))
    Console().print(table)
    settings = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "shards": SHARDS, "rounds": ROUNDS}
    return record.write("ring_kernels", settings, found, ("mmpt", "torch", "xformers"))
