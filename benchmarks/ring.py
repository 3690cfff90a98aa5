"""Ring attention on two ranks of one thread: time forward and backward as a fraction of ideal, half of one thread's time.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/ring.py [--rounds 15] [--device cuda]

Beside it torch's internal ring and ring-attention-pytorch (in an environment of its own, made on the first run). One document:
one thread's time is that of torch's attention for all tokens in one process. Six packed documents with media spans: that of our
own kernel on the same slices; torch's ring knows no documents and runs all tokens as one, which shows the price of that.
Both at once: each rank computes all tokens for itself, without a message; what the machine leaves of ideal when both cores work.
Rounds are interleaved and figures are medians over rounds of the slower rank. Errors are norms of the difference to one process
over the norm, the largest of output and gradients; bf16: to fp32 of the same numbers. --device: see ring_kernels.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import record
import ring_kernels
import torch
import torch.distributed as dist
from peers.environment import make_environment
from peers.rings import Share, one_process, ring_attention_pytorch, torch_ring, with_gradients
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmpt.parallel.planner import plan_sequence, ring_plan
from mmpt.parallel.ring import ring_attention

HERE = Path(__file__).parent
RANKS, HEADS, HEAD_DIM = 2, 8, 64
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SYSTEMS = ("one thread", "both at once", "mmpt", "torch", "ring-attention-pytorch")
SLOW_ROUNDS = 3  # of ring-attention-pytorch, which takes many times as long
LIMIT = 1200  # seconds for all ranks


class Case(NamedTuple):
    name: str
    tokens: int
    kind: str  # fp32 or bf16
    packed: bool


CASES = [
    *(Case("one document", tokens, kind, False) for kind in TYPES for tokens in (4096, 8192)),
    *(Case("six documents", tokens, kind, True) for kind in TYPES for tokens in (4096, 8192)),
]


def document_lengths(case: Case) -> tuple[list[int], list[list[tuple[int, int]]] | None]:
    """Six documents, one of half of the tokens; a picture in each, which sees itself."""
    if not case.packed:
        return [case.tokens], None
    lengths = [case.tokens * part // 64 for part in (32, 12, 8, 6, 4, 2)]
    return lengths, [[(length // 8, length // 8 + length // 4)] for length in lengths]


def ours(case: Case, heads: Sequence[Tensor], ranks: int) -> Share:
    """Of this rank, or of one process that has all tokens."""
    rank, group = (dist.get_rank(), dist.group.WORLD) if ranks > 1 else (0, None)
    lengths, spans = document_lengths(case)
    plan = plan_sequence(lengths, spans, 0, ranks, mask="media" if spans else "causal")
    own = ring_plan(plan, rank)
    rows = torch.from_numpy(plan.order).chunk(ranks)[rank]
    *parts, dout = (x[:, rows].contiguous().transpose(0, 1) for x in heads)
    run = with_gradients(lambda q, k, v: ring_attention(q, k, v, own, group), *parts, dout.contiguous())
    return Share(rows, run, lambda x: x.transpose(0, 1))


def shares(case: Case, heads: Sequence[Tensor]) -> dict[str, Share]:
    """What this rank runs, by system. One thread's is the first rank's alone."""
    alone = ours(case, heads, 1) if case.packed else one_process(heads)
    found = {"both at once": alone, "mmpt": ours(case, heads, RANKS), "torch": torch_ring(heads)}
    if dist.get_rank() == 0:
        found["one thread"] = alone
    if not case.packed and case.kind == "fp32" and (other := ring_attention_pytorch(heads)):
        found["ring-attention-pytorch"] = other
    return found


def errors(case: Case, heads: Sequence[Tensor], found: dict[str, Share]) -> dict[str, float]:
    """Of every system whose answer is to be that of one process."""
    wide = [x.float() for x in heads]
    share = ours(case, wide, 1) if case.packed else one_process(wide)
    expected = [share.restore(x) for x in share.run()]
    result = {}
    for name in SYSTEMS:
        if name in SYSTEMS[:2] or name not in found or (name == "torch" and case.packed):
            continue
        parts: list[Any] = [None] * RANKS
        own = found[name]
        dist.all_gather_object(parts, (own.rows, [own.restore(x).float() for x in own.run()]))
        whole = [torch.empty_like(x) for x in expected]
        for rows, tensors in parts:
            for x, part in zip(whole, tensors, strict=True):
                x[:, rows] = part
        result[name] = max(float((x - y).norm() / y.norm()) for x, y in zip(whole, expected, strict=True))
    return result


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of every round, of the slower rank, by system; and errors."""
    generator = torch.Generator().manual_seed(case.tokens)
    heads = [torch.randn(HEADS, case.tokens, HEAD_DIM, generator=generator).to(TYPES[case.kind]) for _ in range(4)]
    found = shares(case, heads)
    seconds: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    wrong = errors(case, heads, found)
    for number in range(rounds):
        for name in SYSTEMS:
            if name == "ring-attention-pytorch" and (number >= SLOW_ROUNDS or name not in found):
                continue
            dist.barrier()
            began = time.perf_counter()
            if name in found:
                found[name].run()
            took = torch.tensor(time.perf_counter() - began if name in found else 0.0, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds[name].append(float(took))
    return {"seconds": {name: values for name, values in seconds.items() if values}, "errors": wrong}


def run_rank(rank: int, folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed at once: glibc then keeps blocks of such a size, as where one trains
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found = [measure(case, rounds) for case in CASES]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def on_ranks(python: Path, rounds: int) -> list[dict[str, Any]]:
    """What the first rank found, case by case."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    with TemporaryDirectory() as folder:
        command = [str(python), __file__, "--rounds", str(rounds), "--rank"]
        ranks = [subprocess.Popen([*command, str(rank), folder], env=environment) for rank in range(RANKS)]
        try:
            codes = [rank.wait(LIMIT) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        return json.loads(Path(folder, "found.json").read_text())


def figures_of(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and each ring's fraction of ideal."""
    medians = {name: statistics.median(values) for name, values in found["seconds"].items()}
    ideal = {name: medians["one thread"] / (1 if name == "both at once" else RANKS) for name in medians}
    return {
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "fraction_of_ideal": {name: ideal[name] / value for name, value in medians.items() if name != "one thread"},
        "errors": found["errors"],
        "rounds": {name: len(values) for name, values in found["seconds"].items()},
    }


def report(cases: list[dict[str, Any]], missing: dict[str, str]) -> None:
    table = Table(title=f"{RANKS} ranks of one thread, {HEADS} heads of {HEAD_DIM}, forward and backward: ms (fraction of ideal)")
    for column in ("", "tokens", "", *SYSTEMS, "error"):
        table.add_column(column, justify="left" if not column else "right")
    for case, found in zip(CASES, cases, strict=True):
        cells = [f"{found['milliseconds']['one thread']:.0f}"]
        for name in SYSTEMS[1:]:
            took = found["milliseconds"].get(name)
            cells.append("" if took is None else f"{took:.0f} ({found['fraction_of_ideal'][name]:.3f})")
        table.add_row(case.name, f"{case.tokens:,}", case.kind, *cells, f"{found['errors']['mmpt']:.0e}")
    console = Console()
    console.print(table)
    for name, reason in missing.items():
        console.print(f"{name}: not measured, {reason}")
    if wrong := cases[0]["errors"].get("ring-attention-pytorch"):
        console.print(f"ring-attention-pytorch's largest error in output or gradients: {wrong:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="cuda: the local kernels there, in place of two ranks on a CPU")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(int(arguments.rank[0]), Path(arguments.rank[1]), arguments.rounds)
        return
    if arguments.device != "cpu":
        print(ring_kernels.main(torch.device(arguments.device)))
        return
    load = os.getloadavg()[0]
    python, missing = make_environment(HERE / ".peers" / "ring", HERE / "peers" / "ring_requirements.txt")
    cases = [figures_of(found) for found in on_ranks(python, arguments.rounds)]
    report(cases, missing)
    figures = {f"{case.name} {case.kind} {case.tokens}": found for case, found in zip(CASES, cases, strict=True)}
    settings = {"ranks": RANKS, "heads": HEADS, "head_dim": HEAD_DIM, "load_before_ranks": round(load, 2), "missing": missing}
    print(record.write("ring", settings, figures, ("mmpt", "torch")))


if __name__ == "__main__":
    main()
