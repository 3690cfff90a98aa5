"""Samples per second of mmpt's data plane beside its peers', on 2,000 JPEGs of 256 pixels with captions in four tars.

    python benchmarks/data.py [--rounds 9] [--systems mmpt,webdataset,wids]

    raw        every member of every sample in the main process, nothing decoded; without workers, and with two
    pictures   decoded and resized to 224 x 224, two workers, batches of 64, uint8
    first      from making a loader (pictures, two workers) to its first batch; modules are loaded, indices are there

Each system runs in a process of its own, the peers in an environment of their own that is made on the first run, under
benchmarks/.peers. They walk over the data in turns, so that whatever else the machine does meets all of them. A walk is one
epoch; workers are up when it starts, wherever a system keeps them. All must deliver the same bytes, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record
from peers import pictures
from peers.environment import link_ffmpeg, make_environment
from peers.process import Peer, PeerError
from rich.console import Console
from rich.table import Table

HOME = Path(__file__).parent / ".peers"
PEERS = {"webdataset": "webdataset", "wids": "wids", "litdata": "litdata", "energon": "megatron-energon", "spdl": "spdl"}
"""Names of systems, and of their packages."""
BASE = "webdataset"  # whose speed is 1
CASES = {"raw, no workers": "raw 0", "raw, 2 workers": "raw 2", "pictures, 2 workers": "pictures 2"}
FIRST = "pictures 2"
MEAN_TOLERANCE = 0.5  # of 255, between the pictures of two systems: they resize in ways of their own


@dataclass
class Results:
    """Of one system."""

    versions: dict[str, str] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)  # case -> samples per second, one a round
    first: list[float] = field(default_factory=list)  # seconds, one a round
    failed: dict[str, str] = field(default_factory=dict)  # case, or "" for all -> why


class Systems:
    """The processes that are up. One that fails is noted, ended, and not asked again."""

    def __init__(self, names: Iterable[str], console: Console) -> None:
        self.console, self.up, self.results = console, dict[str, Peer](), {name: Results() for name in names}

    def start(self) -> None:
        with self.console.status("the peers' environment (first time: some minutes)"):
            python, missing = make_environment(HOME / "environment")
        environment = {"LD_LIBRARY_PATH": str(link_ffmpeg(HOME / "ffmpeg"))}
        for name, results in self.results.items():
            if reason := missing.get(PEERS.get(name, "")):
                results.failed[""] = f"not installed: {reason}"
                continue
            with self.console.status(f"preparing {name}"):
                try:
                    own = Path(sys.executable) if name == "mmpt" else python
                    self.up[name] = Peer(name, own, HOME / "data", environment if name == "spdl" else {})
                    results.versions = self.up[name].versions
                except PeerError as error:
                    results.failed[""] = str(error)

    def tell(self, name: str, command: str, case: str) -> dict[str, Any] | None:
        """The answer; None, from now on, of a system that failed."""
        if name not in self.up:
            return None
        try:
            return self.up[name].tell(command)
        except PeerError as error:
            self.fail(name, case, str(error))
            return None

    def fail(self, name: str, case: str, reason: str) -> None:
        self.results[name].failed[case] = reason
        self.console.print(f"{name}, {case}: {reason}", style="red", markup=False)
        self.up.pop(name).end()

    def end(self) -> None:
        while self.up:
            self.up.popitem()[1].end()


def measure(systems: Systems, rounds: int, samples: int, digest: int) -> None:
    """All cases, rounds interleaved."""
    for case, loader in CASES.items():
        for name in systems.results:
            systems.tell(name, f"open {loader}", case)
        _check(systems, case, samples, digest)
        for round_ in range(rounds):
            with systems.console.status(f"{case}: round {round_ + 1} of {rounds}"):
                for name, results in systems.results.items():
                    if answer := systems.tell(name, "pass", case):
                        if answer["samples"] != samples:
                            systems.fail(name, case, f"{answer['samples']} of {samples} samples came")
                            continue
                        results.rates.setdefault(case, []).append(answer["samples"] / answer["seconds"])
        for name in systems.results:
            systems.tell(name, "close", case)
    for _ in range(rounds):
        for name, results in systems.results.items():
            if answer := systems.tell(name, f"first {FIRST}", "first batch"):
                results.first.append(answer["seconds"])


def _check(systems: Systems, case: str, samples: int, digest: int) -> None:
    """One walk, which also warms up: every sample once, the same bytes, or nearly the same pictures."""
    answers = {name: answer for name in systems.results if (answer := systems.tell(name, "check", case))}
    expected = {"samples": samples, "digest": digest}
    means = statistics.median(answer["mean"] for answer in answers.values()) if case.startswith("pictures") else 0
    for name, answer in answers.items():
        if "mean" in answer:
            right = answer["samples"] == samples and abs(answer["mean"] - means) < MEAN_TOLERANCE
        else:
            right = answer == expected
        if not right:
            systems.fail(name, case, f"wrong samples: {answer}")


def digest_of(tars: Iterable[Path]) -> int:
    """Sum of the CRCs of all members, read by Python's own tarfile: what `check` must find."""
    total = 0
    for tar in tars:
        with tarfile.open(tar) as archive:
            total += sum(zlib.crc32(archive.extractfile(member).read()) for member in archive)
    return total


def report(systems: Systems, rounds: int, tars: list[Path], console: Console) -> None:
    """Print the table and write the JSON."""
    table = Table(title=f"{pictures.SAMPLES:,} samples, median of {rounds} interleaved rounds; in brackets times {BASE}'s")
    table.add_column("")
    for case in CASES:
        table.add_column(f"{case}\nsamples/s", justify="right")
    table.add_column("first batch\nms", justify="right")
    figures = {}
    for name, results in systems.results.items():
        cells, figures[name] = [], {"versions": results.versions, "failed": results.failed}
        for case in CASES:
            figures[name][case] = _figure(results.rates.get(case, []), systems.results.get(BASE, Results()).rates.get(case, []))
            cells.append(_cell(figures[name][case], results.failed.get(case) or results.failed.get("")))
        first = statistics.median(results.first) if results.first else None
        figures[name]["first batch"] = {"seconds": first, "rounds": results.first}
        table.add_row(name, *cells, f"{1000 * first:.0f}" if first else "-")
    console.print(table)
    settings = {
        "samples": pictures.SAMPLES,
        "bytes": sum(tar.stat().st_size for tar in tars),
        "pictures": "made: 1/f fields, shapes and grain, JPEG quality 85 (peers/pictures.py)",
        "rounds": rounds,
        "batch": 64,
        "spdl": "with the FFmpeg that PyAV brings; its workers are threads",
    }
    console.print(str(record.write("data", settings, figures, ("mmpt", "torch", "torchvision", "numpy", "pillow"))))


def _figure(rates: list[float], base: list[float]) -> dict[str, Any]:
    """Ratios are made within a round, where the machine was the same, then their median is taken."""
    if not rates:
        return {"samples_per_second": None, "ratio": None, "rounds": []}
    ratios = [rate / other for rate, other in zip(rates, base, strict=False)]
    ratio = statistics.median(ratios) if ratios else None
    return {"samples_per_second": statistics.median(rates), "ratio": ratio, "rounds": rates}


def _cell(figure: dict[str, Any], failed: str | None) -> str:
    if failed or figure["samples_per_second"] is None:
        return "not installed" if failed and failed.startswith("not installed") else "failed"
    ratio = f" ({figure['ratio']:.2f})" if figure["ratio"] else ""
    return f"{figure['samples_per_second']:,.0f}{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--systems", default=",".join(["mmpt", *PEERS]), help="names, with ',' between them")
    arguments = parser.parse_args()
    console = Console()
    names = arguments.systems.split(",")
    if unknown := set(names) - {"mmpt", *PEERS}:
        parser.error(f"--systems {', '.join(sorted(unknown))}: there are mmpt, {', '.join(PEERS)}")
    with console.status("making the pictures (first time: half a minute)"):
        tars = pictures.write_shards(HOME / "data")
    systems = Systems(names, console)
    try:
        systems.start()
        measure(systems, arguments.rounds, pictures.SAMPLES, digest_of(tars))
    finally:
        systems.end()
    report(systems, arguments.rounds, tars, console)


if __name__ == "__main__":
    main()
