"""Corrupted shards by the thousand, through Loader and validate: counts by kind, outcome and reason.

    python benchmarks/fuzz.py --cases 10000 --seed 1

Ends with code 1, naming seed and number of each, if any case crashes, hangs, takes too much memory, or goes unnoticed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import record
import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "data"))

from fuzzing import LIMIT_BYTES, LIMIT_S, SOUND, Case, Result, fuzz

PACKAGES = ("av", "numpy", "pillow", "soundfile", "torch", "torchaudio", "torchvision")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = (Case(arguments.seed, number) for number in range(arguments.cases))
        results = fuzz(cases, Path(folder), arguments.processes)
        found = list(track(results, "corruptions", total=arguments.cases))
    wrong = [result for result in found if result.outcome not in SOUND]
    for result in wrong:
        print(f"{result.case} {result.case.kind}: {result.outcome}\n{result.detail}")
    settings = {**vars(arguments), "seconds_allowed": LIMIT_S, "bytes_allowed": LIMIT_BYTES}
    print(record.write("fuzz", settings, figures(found, time.perf_counter() - began), PACKAGES))
    return 1 if wrong else 0


def figures(results: list[Result], seconds: float) -> dict[str, object]:
    """Counts of cases: by outcome, by outcome and reason, by kind and outcome."""
    kinds = {result.case.kind: Counter() for result in results}
    for result in results:
        kinds[result.case.kind][result.outcome] += 1
    reasons = Counter(f"{result.source} {result.outcome} {reason}" for result in results for reason in result.reasons)
    return {
        "outcomes": dict(Counter(result.outcome for result in results).most_common()),
        "reasons": dict(reasons.most_common()),
        "kinds": {kind: dict(counts.most_common()) for kind, counts in kinds.items()},
        "slowest_s": round(max(result.seconds for result in results), 2),
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
