"""The planner of ring attention alone: how even work is, how many keys travel, how long a plan takes.

    python benchmarks/planner.py [--packs 40]

Packs are simulated: documents of log-normal lengths (sigma 1), spans of media in about half of their tokens, up to half a
percent of padding. On the same packs: contiguous cuts, zigzag over the whole pack, zigzag within every document. Imbalance is
the most pairs of a rank over the mean; remote keys are those received over those that gathering all would bring. A plan's time
is that of all ranks' pieces and of one rank's slices and rows to send, the best of three.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import record
from rich.console import Console
from rich.table import Table

from mmpt.parallel.planner import SequencePlan, plan_sequence, ring_plan, ring_slices
from mmpt.parallel.trade import joined
from mmpt.parallel.visible import Mask, Piece, Visible

ROUNDS = 3  # the fastest counts: a plan is the same each time, what disturbs it is not
SPANS = (64, 144, 256, 576)  # tokens of a medium


class Pack(NamedTuple):
    lengths: list[int]
    spans: list[list[tuple[int, int]]]
    padding: int


def pack(seed: int, tokens: int, documents: float) -> Pack:
    """About so many documents, and padding, `tokens` in all."""
    random = np.random.default_rng(seed)
    shares = random.lognormal(size=max(1, random.poisson(documents)))
    padding = int(random.integers(tokens // 200))
    lengths = np.maximum((shares / shares.sum() * (tokens - padding)).astype(int), 1)
    lengths[lengths.argmax()] += tokens - padding - lengths.sum()
    spans = []
    for length in lengths.tolist():
        own, start = [], int(random.integers(400))
        while (stop := start + int(random.choice(SPANS))) <= length:
            own.append((start, stop))
            start = stop + int(random.exponential(300))
        spans.append(own)
    return Pack(lengths.tolist(), spans, padding)


def contiguous(pack: Pack, ranks: int, mask: Mask) -> SequencePlan:
    return cut(pack, mask, [[(rank / ranks, (rank + 1) / ranks)] for rank in range(ranks)], whole=True)


def zigzag(pack: Pack, ranks: int, mask: Mask) -> SequencePlan:
    return cut(pack, mask, both_ends(ranks), whole=True)


def zigzag_within(pack: Pack, ranks: int, mask: Mask) -> SequencePlan:
    """Every document shared by all ranks; what does not divide goes to some of them."""
    return cut(pack, mask, both_ends(ranks), whole=False)


def both_ends(ranks: int) -> list[list[tuple[float, float]]]:
    """Shares of each rank: of twice as many chunks one from the front and one from the back."""
    chunks = 2 * ranks
    return [[(number / chunks, (number + 1) / chunks) for number in (rank, chunks - 1 - rank)] for rank in range(ranks)]


def cut(pack: Pack, mask: Mask, shares: list[list[tuple[float, float]]], whole: bool) -> SequencePlan:
    """A plan that gives each rank its shares of all documents end to end (`whole`), or of every document."""
    visible = Visible(pack.lengths, pack.spans, mask)
    documents = list(enumerate(pairwise(visible.starts)))
    held = []
    for own in shares:
        pieces = []
        for low, high in own:
            for document, (first, end) in documents:
                begin, length = (0, visible.tokens) if whole else (first, end - first)
                start, stop = max(first, begin + round(low * length)), min(end, begin + round(high * length))
                pieces += [Piece(document, start, stop)] if start < stop else []
        held.append(tuple(joined(pieces)))
    return SequencePlan(visible=visible, pieces=tuple(held), padding=(pack.padding // len(shares),) * len(shares))


def planned(pack: Pack, ranks: int, mask: Mask) -> SequencePlan:
    return plan_sequence(pack.lengths, pack.spans, pack.padding, ranks, mask=mask)


WAYS: dict[str, Callable[[Pack, int, Mask], SequencePlan]] = {
    "planner": planned,
    "contiguous": contiguous,
    "zigzag": zigzag,
    "zigzag in documents": zigzag_within,
}


def measure(packs: list[Pack], ranks: int, way: str, mask: Mask) -> dict[str, float]:
    """Medians and the worst over the packs."""
    imbalance, remote, milliseconds, calls = [], [], [], []
    for one in packs:
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            plan = WAYS[way](one, ranks, mask)
            ring_plan(plan, 0)
            seconds.append(time.perf_counter() - start)
        milliseconds.append(1e3 * min(seconds))
        imbalance.append(plan.imbalance)
        remote.append(plan.remote)
        calls.append(sum(len(hop) for rank in range(ranks) for hop in ring_slices(plan, rank)[0]) / ranks)
    series = {"imbalance": imbalance, "remote": remote, "milliseconds": milliseconds, "slices": calls}
    return {
        **{name: statistics.median(values) for name, values in series.items()},
        **{f"{name}_worst": max(values) for name, values in series.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=40)
    arguments = parser.parse_args()
    kinds: dict[str, tuple[int, float, int, Mask]] = {
        **{f"64K, 18 documents, {ranks} ranks": (65536, 18, ranks, "media") for ranks in (2, 4, 8, 16)},
        "64K, 18 documents, 8 ranks, causal": (65536, 18, 8, "causal"),
        "64K, 18 documents, 8 ranks, bidirectional": (65536, 18, 8, "bidirectional"),
        "64K, 600 documents, 8 ranks": (65536, 600, 8, "media"),
        "64K, one document, 8 ranks": (65536, 0, 8, "media"),
        "1M, 260 documents, 8 ranks": (2**20, 260, 8, "media"),
    }
    figures: dict[str, Any] = {}
    for kind, (tokens, documents, ranks, mask) in kinds.items():
        packs = [pack(seed, tokens, documents) for seed in range(arguments.packs)]
        figures[kind] = {way: measure(packs, ranks, way, mask) for way in WAYS}
    report(figures, arguments.packs)


def report(figures: dict[str, Any], packs: int) -> None:
    """Print the table and write the JSON."""
    table = Table(title=f"Median (worst) of {packs} packs")
    for column in ("packs", "", "imbalance", "remote keys", "slices of a rank", "ms"):
        table.add_column(column, justify="right" if column not in ("packs", "") else "left", no_wrap=True)
    cells = (("imbalance", ".3f"), ("remote", ".3f"), ("slices", ".0f"), ("milliseconds", ".1f"))
    for kind, ways in figures.items():
        for way, row in ways.items():
            title = kind if way == "planner" else ""
            table.add_row(title, way, *(f"{row[name]:{form}} ({row[name + '_worst']:{form}})" for name, form in cells))
    Console(width=140).print(table)
    print(record.write("planner", {"packs": packs, "rounds": ROUNDS, "spans": SPANS}, figures, ("mmpt", "numpy")))


if __name__ == "__main__":
    main()
