"""The plan of packs alone, on simulated lengths: how full packs are, how fast they come, what memory and what start cost.

    python benchmarks/plan.py [--packs 1000000]

Lengths have a mean of 1,665 tokens and packs hold 8,192. Fill is for windows packed on their own, as the plan does, beside
next-fit and the best that any packing of windows of 256 could reach. Speed, memory and start are of plans over 10^10
documents, whose lengths follow from their numbers: one source, and three at weights 3 : 2 : 1.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import record
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from mmpt.data.mixture import Drawn
from mmpt.data.packing import best_fit_decreasing, next_fit
from mmpt.data.plan import Order, Plan
from mmpt.types import PlanCursor, SourceCursor

CAPACITY, MEAN, DOCUMENTS = 8192, 1665, 10**10
WINDOW, SHARDS, BLOCK = 256, 10_000, 16
WEIGHTS = {"one source": (1.0,), "three sources": (3.0, 2.0, 1.0)}


def lengths(name: str, count: int) -> Int[np.ndarray, " count"]:
    """Token counts of a distribution, clipped to a pack and scaled to the mean as it is after clipping."""
    random = np.random.default_rng(0)
    shapes: dict[str, Callable[[], np.ndarray]] = {
        "log-normal, sigma 0.5": lambda: random.lognormal(0.0, 0.5, count),
        "log-normal, sigma 1.0": lambda: random.lognormal(0.0, 1.0, count),
        "log-normal, sigma 1.3": lambda: random.lognormal(0.0, 1.3, count),
        "exponential": lambda: random.standard_exponential(count),
        "uniform from 1": lambda: random.random(count),
        "uniform, mean +- 865": lambda: 1 + random.uniform(-0.52, 0.52, count),
        "normal, mean +- 200": lambda: random.normal(1.0, 0.12, count),
        "all the same": lambda: np.ones(count),
    }
    shape = shapes[name]()
    low, high = 1.0, 1e5
    while high - low > 0.01:
        scale = (low + high) / 2
        low, high = (scale, high) if np.clip(scale * shape, 1, CAPACITY).mean() < MEAN else (low, scale)
    return np.clip(low * shape, 1, CAPACITY).round().astype(np.int64)


DISTRIBUTIONS = (
    *(f"log-normal, sigma {sigma}" for sigma in (0.5, 1.0, 1.3)),
    *("exponential", "uniform from 1", "uniform, mean +- 865", "normal, mean +- 200", "all the same"),
)


def fill(name: str) -> dict[str, float]:
    """Share of the packs' tokens that is not padding, for each way of packing."""
    tokens = lengths(name, 200 * 1024)
    packs = {"next-fit": len(next_fit(tokens.tolist(), CAPACITY))}
    for window in (256, 1024):
        windows = tokens.reshape(-1, window)
        packs[f"windows of {window}"] = sum(len(best_fit_decreasing(row.tolist(), CAPACITY)) for row in windows)
    packs["bound of 256"] = int((-(-tokens.reshape(-1, 256).sum(axis=1) // CAPACITY)).sum())
    return {way: float(tokens.sum() / CAPACITY / count) for way, count in packs.items()}


class Simulated:
    """A source of 10^10 documents whose lengths follow from their numbers."""

    size, max_epochs, on_exhausted = DOCUMENTS, None, "renormalise"

    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self.order = Order(name, np.full(SHARDS, DOCUMENTS // SHARDS), 0, BLOCK)
        self.lengths = lengths("log-normal, sigma 1.0", 1 << 16)

    def draw(self, positions: Int[np.ndarray, " n"]) -> Drawn:
        epochs, documents = self.order(positions)
        tokens = self.lengths[documents * 0x9E3779B1 >> 8 & 0xFFFF]
        return Drawn(epochs=epochs, documents=documents, tokens=tokens, media=np.zeros_like(tokens))

    def pieces(self, document: int, epoch: int) -> list[tuple[int, int]]:
        raise AssertionError("lengths are clipped to a pack")


def simulated(weights: tuple[float, ...]) -> Plan:
    sources = [Simulated(f"source-{number}", weight) for number, weight in enumerate(weights)]
    return Plan(sources, seed=0, unit="tokens", pack_tokens=CAPACITY, pack_media=None, window=WINDOW)


def packs_per_second(plan: Plan, count: int, rounds: int) -> list[float]:
    figures = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in islice(plan.walk(plan.begin()), count):
            pass
        figures.append(count / (time.perf_counter() - start))
    return figures


def megabytes(weights: tuple[float, ...]) -> dict[str, float]:
    """Peak of what a plan allocates for 2,000 packs from each power of ten of documents on, and over a seam of epochs."""
    figures = {}
    for position in (0, *(10**power for power in range(4, 11)), 3 * DOCUMENTS - 1000):
        tracemalloc.start()
        plan = simulated(weights)
        at = {source.name: SourceCursor(position=position, consumed=0, weight=source.weight) for source in plan.sources}
        for _ in islice(plan.walk(PlanCursor(window=position // WINDOW, pack=0, sources=at)), 2000):
            pass
        figures[f"{position:,}"] = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
    return figures


def resident_mb() -> float:
    """Now, not at most: an earlier peak would hide growth. Linux alone."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def start_at(weights: tuple[float, ...], packs: int) -> dict[str, float]:
    """Seconds to the pack behind the first `packs`: by walking there, and by its cursor, which must give the same."""
    plan = simulated(weights)
    for _ in islice(plan.walk(plan.begin()), 1000):
        pass  # what a plan holds at all is held before resident memory is read
    resident = resident_mb()
    start, cpu = time.perf_counter(), time.process_time()
    walk = plan.walk(plan.begin())
    _, cursor = next(islice(walk, packs - 1, None))
    walking = {"walking_seconds": time.perf_counter() - start, "walking_cpu_seconds": time.process_time() - cpu}
    grown = resident_mb() - resident
    start = time.perf_counter()
    fresh = simulated(weights)
    built = time.perf_counter() - start
    found = next(fresh.walk(cursor))
    by_cursor = time.perf_counter() - start - built
    assert found == next(walk), "a cursor gave another pack than walking"
    return {**walking, "cursor_seconds": by_cursor, "walking_resident_mb": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=10**6, help="packs to the step that is started at")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"fill": {name: fill(name) for name in DISTRIBUTIONS}}
    for name, weights in WEIGHTS.items():
        speed = packs_per_second(simulated(weights), 20_000, arguments.rounds)
        figures[name] = {
            "packs_per_second": statistics.median(speed),
            "packs_per_second_best": max(speed),
            "peak_mb": megabytes(weights),
            **start_at(weights, arguments.packs),
        }
    report(figures, arguments)


def report(figures: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the tables and write the JSON."""
    ways = next(iter(figures["fill"].values()))
    filled = Table(title=f"Fill of packs of {CAPACITY:,}, mean document {MEAN:,} tokens")
    for column in ("lengths", *ways):
        filled.add_column(column, justify="left" if column == "lengths" else "right")
    for name, row in figures["fill"].items():
        filled.add_row(name, *(f"{share:.2%}" for share in row.values()))
    costs = Table(title=f"Plan over {DOCUMENTS:,} documents, windows of {WINDOW}; seconds to pack {arguments.packs:,}")
    columns = ("", "packs/s", "best", "walking", "of CPU", "by cursor", "peak MB", "RSS growth")
    for column in columns:
        costs.add_column(column, justify="right" if column else "left")
    for name in WEIGHTS:
        row = figures[name]
        speed = f"{row['packs_per_second']:,.0f}", f"{row['packs_per_second_best']:,.0f}"
        seconds = f"{row['walking_seconds']:.1f}", f"{row['walking_cpu_seconds']:.1f}", f"{row['cursor_seconds']:.3f}"
        peak, grown = max(row["peak_mb"].values()), row["walking_resident_mb"]
        costs.add_row(name, *speed, *seconds, f"{peak:.1f}", f"{grown:.1f} MB")
    console = Console()
    console.print(filled)
    console.print(costs)
    settings = {"documents": DOCUMENTS, "shards": SHARDS, "block": BLOCK, "window": WINDOW, "packs": arguments.packs}
    print(record.write("plan", settings, figures, ("mmpt", "numpy")))


if __name__ == "__main__":
    main()
