"""The cost model beside what ring attention takes on this machine, hop by hop: two gloo ranks of one thread each.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/ring_cost.py

The model is given two speeds, measured in the same run: of the kernel on a causal square of one rank's tokens, both ranks at
once, and of messages of that size while nothing is computed. Shown is the median over rounds, of the rank that took longer.
Ranks, the threads that carry messages, and memory share the cores here, which the model does not know.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from mmpt.parallel.cost import Direction, Heads, Machine, hops_of, predict
from mmpt.parallel.kernels import CpuFlash, make_runs
from mmpt.parallel.planner import plan_sequence, ring_plan
from mmpt.parallel.ring import Coming, ring_attention
from mmpt.types import RingPlan

RANKS = 2
HEADS = Heads(queries=8, keys=8, dim=64, bytes=4)
PACKED = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)  # shares of a pack's documents
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


class Watch:
    """Seconds of every kernel call and of every wait for a message, in order, while `ring_attention` runs."""

    def __init__(self) -> None:
        self.kernels: dict[Direction, list[float]] = {direction: [] for direction in DIRECTIONS}
        self.waits: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        kernels = {name: timed(getattr(CpuFlash, name), seconds) for name, seconds in self.kernels.items()}
        with mock.patch.multiple(CpuFlash, **kernels), mock.patch.object(Coming, "take", timed(Coming.take, self.waits)):
            yield


def timed(call: Callable, seconds: list[float]) -> Callable:
    def run(*args):
        began = time.perf_counter()
        result = call(*args)
        seconds.append(time.perf_counter() - began)
        return result

    return run


def kernel_rates(tokens: int) -> dict[Direction, float]:
    """FLOP/s of the kernel on a causal square of so many tokens."""
    plan = plan_sequence([tokens], None, 0, 1, mask="causal")
    watch, hop = one_pass(ring_plan(plan, 0), tokens, None), hops_of(plan)[0][0]
    return {direction: hop.flops(HEADS, direction) / watch.kernels[direction][0] for direction in DIRECTIONS}


def link_speed(numbers: int) -> float:
    """Bytes/s one way, both ways at once, of fp32 messages of this size."""
    there, back, other = torch.zeros(numbers), torch.zeros(numbers), 1 - dist.get_rank()
    began = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, there, other), dist.P2POp(dist.irecv, back, other)]):
        work.wait()
    return 4 * numbers / (time.perf_counter() - began)


def one_pass(plan: RingPlan, tokens: int, group: dist.ProcessGroup | None) -> Watch:
    q, k, v = (torch.randn(tokens, n, HEADS.dim, requires_grad=True) for n in (HEADS.queries, HEADS.keys, HEADS.keys))
    watch = Watch()
    with watch.watching():
        out = ring_attention(q, k, v, plan, group)
        out.backward(torch.ones_like(out))
    return watch


def of_hops(watch: Watch, plan: RingPlan) -> dict[str, float]:
    """Seconds by direction and hop: computing, and waiting before the pass goes on."""
    found: dict[str, float] = defaultdict(float)
    runs = [len(make_runs(slices)) for slices in plan.slices]
    for direction in DIRECTIONS:
        order = range(RANKS) if direction == "forward" else reversed(range(RANKS))
        seconds = iter(watch.kernels[direction])
        for hop in order:
            found[f"{direction}/{hop}/compute"] = sum(next(seconds) for _ in range(runs[hop]))
    found["forward/0/wait"], found["backward/0/wait"] = watch.waits  # for the other's keys; for the gradients of one's own
    return found


def run_rank(rank: int, lengths: dict[str, list[int]], rounds: int, folder: str) -> None:
    """One rank's medians by name, over rounds in which speeds are taken beside what they are to predict."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    tokens = sum(next(iter(lengths.values()))) // RANKS
    plans = {name: ring_plan(plan_sequence(each, None, 0, RANKS, mask="causal"), rank) for name, each in lengths.items()}
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        dist.barrier()
        figures = {f"rate/{direction}": rate for direction, rate in kernel_rates(tokens).items()}
        dist.barrier()
        figures["speed"] = link_speed(tokens * HEADS.keys * HEADS.dim)
        for name, plan in plans.items():
            dist.barrier()
            took = of_hops(one_pass(plan, tokens, dist.group.WORLD), plan)
            figures |= {f"{name}/{what}": seconds for what, seconds in took.items()}
        for what, value in figures.items() if number else ():  # the first round warms up
            found[what].append(value)
    Path(folder, str(rank)).write_text(json.dumps({what: statistics.median(values) for what, values in found.items()}))
    dist.destroy_process_group()


def compare(lengths: dict[str, list[int]], ranks: Sequence[dict[str, float]]) -> list[dict]:
    """Predicted beside measured, of the rank that took longer."""
    rows = []
    for name, each in lengths.items():
        hops = hops_of(plan_sequence(each, None, 0, RANKS, mask="causal"))
        for direction in DIRECTIONS:
            start = f"{name}/{direction}/"
            slow = max(range(RANKS), key=lambda r: sum(s for what, s in ranks[r].items() if what.startswith(start)))
            machine = Machine(flops=ranks[slow][f"rate/{direction}"], bandwidth=ranks[slow]["speed"])
            for window in predict(hops[slow], HEADS, machine, direction).windows:
                found = {what: ranks[slow].get(f"{start}{window.hop}/{what}", 0.0) for what in ("compute", "wait")}
                predicted = {"compute": window.compute, "transfer": window.transfer, "wait": window.waited}
                row = {"case": name, "direction": direction, "hop": window.hop, "bytes": window.bytes}
                rows.append(row | {"predicted": predicted, "measured": found})
    return rows


def report(rows: list[dict], ranks: Sequence[dict[str, float]]) -> None:
    table = Table(
        "case", "hop", "MB", "compute", "measured", "transfer", "waited", "measured", title="Predicted and measured, ms"
    )
    for row in rows:
        predicted, found = row["predicted"], row["measured"]
        seconds = (predicted["compute"], found["compute"], predicted["transfer"], predicted["wait"], found["wait"])
        cells = (f"{1e3 * each:.1f}" for each in seconds)
        table.add_row(f"{row['case']} {row['direction']}", str(row["hop"]), f"{row['bytes'] / 1e6:.1f}", *cells)
    Console().print(table)
    rates = {direction: min(rank[f"rate/{direction}"] for rank in ranks) / 1e9 for direction in DIRECTIONS}
    speed = min(rank["speed"] for rank in ranks) / 1e9
    print(f"kernel {rates['forward']:.1f} and {rates['backward']:.1f} GFLOP/s a rank, messages {speed:.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    packed = [round(arguments.tokens * share) for share in PACKED[:-1]]
    lengths = {"one": [arguments.tokens], "six": [*packed, arguments.tokens - sum(packed)]}
    with TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (lengths, arguments.rounds, folder), nprocs=RANKS, start_method="spawn")
        ranks = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(RANKS)]
    rows = compare(lengths, ranks)
    report(rows, ranks)
    figures = {"rows": rows, "ranks": ranks}
    print(record.write("ring_cost", vars(arguments), figures, ("torch", "mmpt")))


if __name__ == "__main__":
    main()
