"""Batches of any mixture of modalities on four ranks, each step compared with one process's: no hang, the same gradients.

    python benchmarks/mixes.py --mixes 1000 --seed 1

Packs may lack pictures, sounds, clips, pairs, labels, documents at all, and a rank with them; ten layouts and two families take
turns. Ends with code 1 if a mix hangs, fails or differs by more than 1e-10, naming its number.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import record
from rich.progress import track

from mmpt.config import load
from mmpt.verify.families import families
from mmpt.verify.fuzz import RANKS, Mix, fuzz
from mmpt.verify.ranks import Failed
from mmpt.verify.table import TOLERANCE

LIMIT = 60.0  # seconds of one step on all ranks
AT_ONCE = 20
FAMILIES = ("demo", "four modalities")
PACKAGES = ("numpy", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    small = families(load(Path(__file__).parents[1] / "configs" / "demo.yaml"))
    began, found, failure = time.perf_counter(), [], None
    mixes = fuzz({name: small[name] for name in FAMILIES}, arguments.seed, at_once=AT_ONCE, limit=LIMIT)
    try:
        for mix in track(islice(mixes, arguments.mixes), "mixes", total=arguments.mixes):
            found.append(mix)
    except Failed as error:
        failure = f"mix {len(found)} of seed {arguments.seed}:\n{error}"
    wrong = [mix for mix in found if mix.difference.worst > TOLERANCE["fp64"]]
    for mix in wrong:
        print(f"mix {mix.number}: {mix.family}, {mix.case}: {mix.difference}")
    if failure:
        print(failure)
    if not found:
        return 1
    settings = {**vars(arguments), "ranks": RANKS, "seconds_allowed": LIMIT, "difference_allowed": TOLERANCE["fp64"]}
    seconds = round(time.perf_counter() - began)
    print(record.write("mixes", settings, figures(found) | {"seconds": seconds, "failure": failure}, PACKAGES))
    return 1 if wrong or failure else 0


def figures(found: list[Mix]) -> dict[str, object]:
    """Mixes by layout and family, the largest differences, and how often something was nowhere in a mix, or not on all ranks."""
    worst = max(found, key=lambda mix: mix.difference.worst)
    columns = ("losses", "grad_norm", "gradient", "weights", "embeddings")
    lacking = Counter(name for mix in found for name, has in mix.present.items() if not any(has))
    partly = Counter(name for mix in found for name, has in mix.present.items() if any(has) and not all(has))
    return {
        "mixes": len(found),
        "layouts": dict(Counter(str(mix.case) for mix in found)),
        "families": dict(Counter(mix.family for mix in found)),
        "largest_difference": {name: max(getattr(mix.difference, name) for mix in found) for name in columns},
        "worst": f"mix {worst.number}: {worst.family}, {worst.case}, {worst.difference.parameter}",
        "nowhere": dict(lacking),
        "on_some_ranks": dict(partly),
    }


if __name__ == "__main__":
    sys.exit(main())
