"""Whether memory stays flat while the loader runs: resident memory, open files and the loader's own figures over time.

    python benchmarks/soak.py --minutes 10

A corpus of four modalities is made first; then batches are taken as fast as they come. Ends with code 1 if the median memory of
the training process or of a worker over the last quarter is more than 5 % above that over the second.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import PIL.Image
import soundfile
import torch
from record import write
from rich.console import Console
from rich.table import Table

from mmpt.config import RunConfig, parse
from mmpt.data.loader import Loader
from mmpt.data.shards import ShardWriter
from mmpt.data.tokens import Tokenizer

DOCUMENTS = 192
SAMPLES = 40  # lines of the table
GROWTH = 0.05


def make_corpus(folder: Path) -> RunConfig:
    """Pictures, sounds, clips and texts in shards, and a config that reads them."""
    chance = np.random.default_rng(0)
    with ShardWriter(folder, "soak", samples_per_shard=64) as writer:
        for number in range(DOCUMENTS):
            width, height = (int(side) for side in chance.integers(64, 512, 2))
            files = {"000.jpg": picture(chance, width, height), "001.flac": sound(chance), "002.mp4": clip(chance)}
            parts = [
                {"type": "image", "file": "000.jpg", "wh": [width, height]},
                {"type": "text", "text": f"document {number} " + "and so on " * int(chance.integers(1, 60))},
                {"type": "audio", "file": "001.flac", "sample_rate": 44100, "samples": 44100},
                {"type": "video", "file": "002.mp4", "wh": [96, 64], "fps": 12, "frames": 24, "clip": [0, 2]},
            ]
            writer.write(f"doc{number:04d}", {"v": 1, "parts": parts}, files)
    Tokenizer.train(["document and so on"], vocabulary=300).save(folder / "tokenizer.json")
    spec = 'version: 1\nname: soak\nformat: interleaved\nshards: {root: ".", pattern: "soak-{00000..00002}.tar"}\n'
    (folder / "soak.yaml").write_text(spec + 'split: {train: ":"}\nvideo: {fps: 4}\n')
    data = {"spec": str(folder / "soak.yaml"), "tokenizer": str(folder / "tokenizer.json"), "pack_tokens": 2048}
    data |= {"packs_per_batch": 2, "window": 64, "workers": 2, "prefetch": 2}
    data["augment"] = {"rotate": 10, "color": 0.2}
    model = {"vocabulary": 300, "image": {"size": 128, "patch": 16, "merge": 2, "resize": "native"}}
    return parse({"name": "soak", "model": model, "data": data, "train": {"steps": 1}}, where="soak")


def picture(chance: np.random.Generator, width: int, height: int) -> bytes:
    small = PIL.Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), PIL.Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sound(chance: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * chance.standard_normal(44100), 44100, format="FLAC")
    return buffer.getvalue()


def clip(chance: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(24):
            color = chance.integers(0, 256, 3, dtype=np.uint8)
            frame = np.broadcast_to(color, (64, 96, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def resident(process: int) -> float:
    """MiB, that of shared memory left out: what is not a batch on its way."""
    fields = dict(line.split(":") for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def children() -> list[int]:
    return [int(each) for each in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def middle(lines: list[dict[str, float]], name: str) -> float:
    return statistics.median(line[name] for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    torch.set_num_threads(1)
    lines: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(make_corpus(Path(folder)), 0, 1)
        began, documents = time.perf_counter(), 0
        for batches, batch in enumerate(loader, start=1):
            documents += batch.documents
            elapsed = time.perf_counter() - began
            if elapsed >= len(lines) * minutes * 60 / SAMPLES:
                memory = {f"worker {number}": resident(child) for number, child in enumerate(children())}
                files = len(os.listdir("/proc/self/fd"))
                figures = {"minutes": elapsed / 60, "batches": batches, "documents": documents, "open files": files}
                lines.append(figures | {"training process": resident(os.getpid())} | memory | loader.meter.read())
            if elapsed > minutes * 60:
                break
    return report(lines, minutes)


def report(lines: list[dict[str, float]], minutes: float) -> int:
    """Print the table, write the JSON, and judge."""
    shown = ("minutes", "documents", "open files", "training process", "worker 0", "worker 1", "loader/depth", "loader/fill")
    table = Table(*shown, title="Resident memory, MiB")
    for line in lines[:: max(1, len(lines) // 10)]:
        table.add_row(*(f"{line.get(name, 0):,.2f}" for name in shown))
    Console().print(table)
    processes = [name for name in lines[-1] if name == "training process" or name.startswith("worker")]
    quarter = len(lines) // 4
    early, late = lines[quarter : 2 * quarter], lines[-quarter:]
    growth = {name: middle(late, name) / middle(early, name) - 1 for name in processes}
    print("growth:", ", ".join(f"{name} {value:+.1%}" for name, value in growth.items()))
    print(
        write("soak", {"minutes": minutes, "documents": DOCUMENTS}, {"growth": growth, "lines": lines}, ("mmpt", "torch", "av"))
    )
    return int(max(growth.values()) > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
