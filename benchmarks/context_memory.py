"""Memory of a rank over tokens, under ring attention: at four lengths, a line through them, and what that line says of 10M.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/context_memory.py

One document of so many tokens, one training step of a small model, on 1, 2, 4 and 8 gloo ranks of this machine, each case in new
processes. Counted is what a rank's resident memory grows by at its peak during the step, weights and libraries left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import record
import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from mmpt.config import RunConfig, parse
from mmpt.data.collate import PackEntry, collate
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout, splitter_of
from mmpt.parallel.mesh import join_world
from mmpt.train.machine import keep_freed_memory, make_repeatable
from mmpt.train.optimizer import make_optimizer
from mmpt.train.step import train_step
from mmpt.types import IGNORE, DocumentRef, LoaderState, LoadReport, PackedBatch, PlanCursor, TokenizedDocument

TOKENS = (8192, 16384, 32768, 65536)
RANKS = (1, 2, 4, 8)
MOST = 32768  # tokens of one rank, which bounds the minutes that this takes
PROJECTED = 10 * 2**20
VOCABULARY = 512


def make_config(tokens: int, ranks: int, recompute: str) -> RunConfig:
    transformer = {"dim": 64, "layers": 2, "n_heads": 2, "ffn_dim": 192}
    return parse(
        {
            "name": "memory",
            "model": {"vocabulary": VOCABULARY, "levels": [], "transformer": transformer},
            "data": {"spec": "made", "tokenizer": "made", "pack_tokens": tokens, "packs_per_batch": 1},
            "train": {"steps": 1, "precision": "fp32", "recompute": recompute},
            "parallel": {"ring": ranks},
        },
        where="memory",
    )


def make_batch(config: RunConfig, tokens: int) -> PackedBatch:
    """A pack of `tokens`, all of them one document's."""
    drawn = np.random.default_rng(0).integers(1, VOCABULARY, tokens).tolist()
    document = TokenizedDocument(tokens=tuple(drawn), labels=(*drawn[1:], IGNORE))
    ref = DocumentRef(source="made", key="0", epoch=0, piece=0, pack=0, position=0, seed=0)
    return collate(
        [[PackEntry(ref=ref, tokens=tokens, segments=[document], items={})]],
        model=config.model,
        pack_tokens=tokens,
        pad=0,
        state=LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0),
        report=LoadReport(milliseconds={}, tokens={}, faults=()),
    )


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(rank: int, ranks: int, tokens: int, recompute: str, folder: str, port: int) -> None:
    """One rank's part of one case; writes growth and seconds into the folder."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    make_repeatable()
    keep_freed_memory()
    config = make_config(tokens, ranks, recompute)
    with join_world(config) as world:
        model = apply_layout(MultimodalModel(config.model).initialize(seed=0), config.train, world)
        optimizer, split = make_optimizer(model, config.optimizer), splitter_of(config.model, world)
        small, whole = make_batch(config, 64 * ranks), make_batch(config, tokens)
        batch = split(whole) if split else whole
        del whole
        train_step(model, optimizer, [split(small) if split else small], 0, config, world, detailed=False)  # what comes once
        before, began = memory("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        train_step(model, optimizer, [batch], 0, config, world, detailed=False)
        figures = f"{memory('VmHWM') - before} {time.perf_counter() - began}"
    Path(folder, str(rank)).write_text(figures)


def run_case(ranks: int, tokens: int, recompute: str, port: int) -> dict[str, float]:
    """The most that a rank grew by, and the longest that one took."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (ranks, tokens, recompute, folder, port), nprocs=ranks, start_method="spawn")
        found = [[float(word) for word in Path(folder, str(rank)).read_text().split()] for rank in range(ranks)]
    growth, seconds = (max(column) for column in zip(*found, strict=True))
    return {"ranks": ranks, "tokens": tokens, "bytes": growth, "seconds": seconds}


def fit(cases: list[dict[str, float]]) -> tuple[float, float]:
    """Bytes a token of a rank, and bytes besides, by relative least squares."""
    share = np.array([case["tokens"] / case["ranks"] for case in cases])
    grown = np.array([case["bytes"] for case in cases])
    slope, constant = np.linalg.lstsq(np.stack([share / grown, 1 / grown], axis=1), np.ones_like(grown), rcond=None)[0]
    return float(slope), float(constant)


def report(cases: list[dict[str, float]], slope: float, constant: float) -> dict[str, float]:
    """Print the cases beside the line, and what the line says of PROJECTED tokens."""
    table = Table("ranks", "tokens", "tokens a rank", "measured, MiB", "line, MiB", "off", "s", title="Growth of a rank's memory")
    errors = []
    for case in cases:
        share = case["tokens"] / case["ranks"]
        line = slope * share + constant
        errors.append(line / case["bytes"] - 1)
        sizes = (f"{case['bytes'] / 2**20:,.1f}", f"{line / 2**20:,.1f}", f"{errors[-1]:+.1%}", f"{case['seconds']:.0f}")
        table.add_row(str(case["ranks"]), f"{case['tokens']:,}", f"{share:,.0f}", *sizes)
    Console().print(table)
    print(f"line: {slope:,.0f} bytes a token of a rank + {constant / 2**20:.1f} MiB; furthest off {max(map(abs, errors)):.1%}")
    print(f"PROJECTION by that line, not measured: {PROJECTED:,} tokens of this model on")
    projection = {}
    for ranks in (64, 256, 1024):
        projection[f"{ranks} ranks"] = slope * PROJECTED / ranks + constant
        print(f"  {ranks:>5} ranks, {PROJECTED // ranks:>7,} tokens each: {projection[f'{ranks} ranks'] / 2**20:,.0f} MiB a rank")
    return projection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--port", type=int, default=29_600, help="the first of those that ranks meet at")
    arguments = parser.parse_args()
    cases = []
    for tokens in arguments.tokens:
        for ranks in RANKS:
            if tokens / ranks <= MOST:
                cases.append(run_case(ranks, tokens, arguments.recompute, arguments.port + len(cases)))
                print(f"{ranks} rank(s), {tokens:,} tokens: {cases[-1]['bytes'] / 2**20:,.1f} MiB", flush=True)
    slope, constant = fit(cases)
    projection = report(cases, slope, constant)
    line = {"bytes_a_token": slope, "bytes_besides": constant}
    figures = {"cases": cases, "line": line, f"projection_of_{PROJECTED}_tokens_not_measured": projection}
    print(record.write("context_memory", vars(arguments), figures, ("torch", "mmpt")))


if __name__ == "__main__":
    main()
