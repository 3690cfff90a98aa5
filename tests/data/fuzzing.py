"""Runs corrupted shards through what a user runs, in processes that may die, and says what came of each.

Case --damage--> a shard beside a sound one --Loader, validate--> Result     two processes, a clock, a limit on memory
"""

from __future__ import annotations

import faulthandler
import gc
import io
import json
import math
import multiprocessing
import os
import re
import resource
import tarfile
import time
import traceback
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

import av
import corrupt
import corrupt_content
import corrupt_headers
import numpy as np
import PIL.Image
import soundfile
import torch
from corrupt import Corruption, Damage, Shard

from mmpt.config import RunConfig, parse
from mmpt.data.corpus import Corpus
from mmpt.data.loader import Loader
from mmpt.data.quarantine import index_faults
from mmpt.data.shards import ShardWriter
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.data.validate import validate
from mmpt.types import Fault, LoaderState, LoadReport, PackedBatch, UserError

KINDS: dict[str, Corruption] = {
    function.__name__: function for function in (*corrupt.KINDS, *corrupt_content.KINDS, *corrupt_headers.KINDS)
}
SOUND = ("refused", "masked", "harmless", "altered")
"""How a case may end: no run starts; the documents that it touched become padding; nothing of it is read; or the shard is valid
by its own checksums, and only says something else than before."""

BATCHES = 2  # read of a corpus of eight documents: each is seen
LIMIT_S = 20.0  # of one case, after which its process is killed
LIMIT_BYTES = 3 << 29  # of resident memory that a case may add; the largest picture allowed takes most of it
VALIDATED = 3  # every so many cases are validated as well

REFUSALS = {
    "damaged": r"cut short or damaged|not a whole tar",
    "truncated": r"cut short|it was cut after it was indexed",
    "link": r"is not a plain file",
    "name": r"KEY\.suffix is wanted",
    "order": r"lie apart",
    "duplicate-member": r"twice; write each once",
    "trailing": r"more follows after its end mark",
    "empty": r"holds no samples",
    "limit": r"bytes; 0 to [\d,]+ are allowed",
    "size": r"a medium of document .* takes",
    "max_fraction": r"documents are faulty, more than on_bad",
}
"""Reasons of refusals, by their message."""

SPEC = """\
version: 1
name: fuzzed
format: interleaved
shards: {root: ".", pattern: "fuzz-{00000..00001}.tar"}
split: {train: ":"}
audio: {max_seconds: 5}
video: {fps: 2, max_frames: 4}
"""
HURT, WHOLE = "fuzz-00000.tar", "fuzz-00001.tar"


@dataclass(frozen=True)
class Case:
    seed: int
    number: int

    @property
    def kind(self) -> str:
        return list(KINDS)[self.number % len(KINDS)]

    def damage(self, shard: Shard) -> Damage:
        return KINDS[self.kind](Random(f"{self.seed} {self.number}"), shard)


@dataclass(frozen=True, kw_only=True)
class Result:
    case: Case
    outcome: str  # one of SOUND, or what went wrong: error, unnoticed, hang, crash, memory
    source: str
    reasons: tuple[str, ...]
    detail: str = ""
    seconds: float = 0.0


def _picture(draw: Random, kind: str, size: tuple[int, int]) -> bytes:
    image = PIL.Image.new("RGB", size, tuple(draw.randbytes(3)))
    image.paste(tuple(draw.randbytes(3)), (3, 3, size[0] // 2, size[1] // 2))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def _sound(draw: Random, kind: str, rate: int, subtype: str | None = None) -> bytes:
    wave = np.sin(np.arange(int(0.3 * rate)) * draw.uniform(0.02, 0.2)).astype(np.float32) / 2
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=kind, subtype=subtype)
    return out.getvalue()


def _clip(draw: Random) -> bytes:
    """One second of eight frames, 48 x 32, with a sound track."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        pictures, track = container.add_stream("libx264", rate=8), container.add_stream("aac", rate=16000)
        pictures.width, pictures.height, pictures.pix_fmt = 48, 32, "yuv420p"
        track.layout = "mono"
        for number in range(8):
            frame = np.full((32, 48, 3), number * 20, dtype=np.uint8)
            frame[8:24, 4 * number : 4 * number + 8] = list(draw.randbytes(3))
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(pictures.encode())
        sound = av.AudioFrame.from_ndarray(np.sin(np.arange(16000, dtype=np.float32) / 9)[None], format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux([*track.encode(sound), *track.encode()])
    return out.getvalue()


def _part(file: str, data: bytes) -> dict[str, Any]:
    kind = file.rpartition(".")[2]
    part = {"file": file, "crc32": zlib.crc32(data)}
    if kind in ("jpg", "png", "webp"):
        return {"type": "image", **part, "wh": list(PIL.Image.open(io.BytesIO(data)).size)}
    if kind == "mp4":
        return {"type": "video", **part, "wh": [48, 32], "fps": 8, "frames": 8, "clip": [0, 1], "audio": True}
    info = soundfile.info(io.BytesIO(data))
    return {"type": "audio", **part, "sample_rate": info.samplerate, "samples": info.frames}


def write_corpus(folder: Path) -> None:
    """Two shards of documents of all four modalities, a spec, a tokenizer."""
    draw = Random(0)
    documents = [
        {"000.jpg": _picture(draw, "JPEG", (36, 24))},
        {"000.wav": _sound(draw, "WAV", 8000), "001.flac": _sound(draw, "FLAC", 16000)},
        {"000.mp4": _clip(draw)},
        {"000.png": _picture(draw, "PNG", (20, 31)), "001.webp": _picture(draw, "WEBP", (40, 40))},
        {"000.opus": _sound(draw, "OGG", 48000, "OPUS"), "001.jpg": _picture(draw, "JPEG", (24, 24))},
        {"000.png": _picture(draw, "PNG", (33, 33)), "001.wav": _sound(draw, "WAV", 16000)},
        {"000.mp4": _clip(draw), "001.jpg": _picture(draw, "JPEG", (64, 48))},
        {},
    ]
    with ShardWriter(folder, "fuzz", samples_per_shard=5) as writer:
        for number, files in enumerate(documents):
            parts = [_part(file, data) for file, data in files.items()]
            parts.append({"type": "text", "text": f"this is what document {number} shows", "time": [0.0, 1.0]})
            writer.write(f"doc{number}", {"v": 1, "id": f"doc{number}", "parts": parts, "meta": {"license": "CC0-1.0"}}, files)
    (folder / "spec.yaml").write_text(SPEC)
    Tokenizer.train(["this is what document 0 shows"], vocabulary=270).save(folder / "tokenizer.json")


def run_config(folder: Path) -> RunConfig:
    image = {"size": 32, "patch": 8, "merge": 2, "dim": 32, "layers": 1, "n_heads": 2, "ffn_dim": 64}
    transformer = {"dim": 32, "layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 64}
    model = {"vocabulary": 300, "embedding_dim": 16, "image": image, "transformer": transformer}
    model |= {"video": {"size": 32}, "audio": {"dim": 32, "layers": 1, "n_heads": 2, "ffn_dim": 64}}
    data = {
        "spec": str(folder / "spec.yaml"),
        "tokenizer": str(folder / "tokenizer.json"),
        "pack_tokens": 256,
        "packs_per_batch": 2,
        "window": 8,
        "workers": 0,
    }
    return parse({"name": "fuzz", "model": model, "data": data, "train": {"steps": 1}}, where="fuzz")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Of a batch, but for its state and report, which tell of the index."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, LoaderState | LoadReport):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _equal(one: list[PackedBatch], other: list[PackedBatch]) -> bool:
    pairs = list(zip(_tensors_of(one), _tensors_of(other), strict=False))
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in pairs)


def _tensors_of(batches: list[PackedBatch]) -> list[torch.Tensor]:
    return [tensor for batch in batches for tensor in _tensors(batch)]


def is_consistent(tar: bytes) -> bool:
    """Whether a shard is whole and every medium has the checksum that its JSON tells, by Python's own readers."""
    try:
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            files = {info.name: archive.extractfile(info).read() for info in archive}
        for name, data in files.items():
            key, _, suffix = name.partition(".")
            if suffix == "json":
                named = [part for part in json.loads(data)["parts"] if "file" in part]
                if any(part.get("crc32", math.nan) != zlib.crc32(files[f"{key}.{part['file']}"]) for part in named):
                    return False
    except (tarfile.TarError, KeyError, ValueError, AttributeError, TypeError):
        return False
    return True


class Bench:
    """A corpus of its own for one process, in which one shard is replaced again and again."""

    def __init__(self, folder: Path) -> None:
        write_corpus(folder)
        self.folder, self.config, self.spec = folder, run_config(folder), load_spec(folder / "spec.yaml")
        self.tar, self.sidecar = folder / HURT, folder / f"{HURT}.index.npz"
        self.shard = Shard(self.tar.read_bytes(), self.sidecar.read_bytes())
        self.sound_batches = list(islice(Loader(self.config, 0, 1), BATCHES))

    @cached_property
    def memory(self) -> int:
        return _peak()

    def run(self, case: Case) -> Result:
        """What became of a case. Anything that is raised is a defect of what is tested."""
        began, damage = time.monotonic(), case.damage(self.shard)
        result = self._judge(case, damage)
        if damage.when == "before" and case.number // len(KINDS) % VALIDATED == 0:
            self._validate(result)
        if _peak() > self.memory + LIMIT_BYTES:
            result = Result(case=case, outcome="memory", source="", reasons=(), detail=f"{_peak():,} bytes at its peak")
        return Result(**{**result.__dict__, "seconds": time.monotonic() - began})

    def _judge(self, case: Case, damage: Damage) -> Result:
        source = self.spec.name
        try:
            batches, faults = self._load(damage)
        except UserError as error:
            reason = next((word for word, pattern in REFUSALS.items() if re.search(pattern, str(error))), None)
            assert reason, f"a refusal that is not counted: {error}"
            assert HURT in str(error) or reason == "size", f"a refusal that does not say where: {error}"
            assert str(error).isprintable() and len(str(error)) < 2000, f"no line for a terminal: {error!r:.300}"
            return Result(case=case, outcome="refused", source=source, reasons=(reason,))
        assert all(fault.shard == HURT and fault.source == source for fault in faults), f"a fault elsewhere: {faults}"
        assert all(len(fault.detail) < 2000 for fault in faults), "a fault that fills a log"
        if faults:
            return Result(case=case, outcome="masked", source=source, reasons=tuple(sorted({f.reason for f in faults})))
        if _equal(batches, self.sound_batches) and not damage.noticed:
            return Result(case=case, outcome="harmless", source=source, reasons=("unused",))
        if damage.when == "before" and not damage.noticed and is_consistent(damage.tar):
            return Result(case=case, outcome="altered", source=source, reasons=("valid",))
        return Result(case=case, outcome="unnoticed", source=source, reasons=())

    def _load(self, damage: Damage) -> tuple[list[PackedBatch], list[Fault]]:
        """Batches over both shards, and all faults that were found."""
        for stale in self.folder.glob(f"{HURT}*"):
            stale.unlink()
        early = damage.when in ("before", "after")
        self.tar.write_bytes(damage.tar if early else self.shard.tar)
        if damage.when != "before":
            self.sidecar.write_bytes(damage.tar if damage.when == "sidecar" else self.shard.sidecar)
            os.utime(self.tar, (0, 0))  # older than its index
        loader = Loader(self.config, 0, 1)
        if damage.when == "open":
            with self.tar.open("r+b") as file:  # the same file, which the loader has open
                file.truncate(len(damage.tar))
                file.write(damage.tar)
        batches = list(islice(loader, BATCHES))
        faults = [fault for batch in batches for fault in batch.report.faults]
        return batches, faults if damage.when == "open" else faults + index_faults(Corpus.open(self.spec, "train"))

    def _validate(self, result: Result) -> None:
        report = validate(self.spec)
        assert {fault.shard for fault in report.faults} <= {HURT}, f"faults of the sound shard: {report.faults}"
        assert report.faults or result.outcome not in ("refused", "masked"), f"validate finds nothing, but {result}"


def _peak() -> int:
    """The most memory that this process ever had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(folder: Path, pipe: Connection) -> None:
    """A process's life: a case, its result, until the pipe breaks."""
    torch.set_num_threads(1)
    faulthandler.enable()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder)
    bench.memory  # noqa: B018 -- before the first case
    gc.freeze()  # else each JSON of many lists has the collector look through all of torch
    # A bomb that takes more than this machine should give fails to, instead of taking it.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * LIMIT_BYTES,) * 2)
    pipe.send(None)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(LIMIT_S - 1)
        try:
            result = bench.run(case)
        except BaseException:
            result = Result(case=case, outcome="error", source="", reasons=(), detail=traceback.format_exc()[-6000:])
        faulthandler.cancel_dump_traceback_later()
        pipe.send(result)


class _Process:
    """A process with a bench of its own, and what it is at."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(folder, there), daemon=True)
        self.process.start()
        there.close()
        assert self.pipe.poll(60) and self.pipe.recv() is None, "the sound corpus does not load"
        self.case: Case | None = None
        self.deadline = math.inf

    def give(self, case: Case) -> None:
        self.case, self.deadline = case, time.monotonic() + LIMIT_S
        self.pipe.send(case)

    def take(self) -> Result:
        """The result, or what kept it from coming."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return Result(case=self.case, outcome="crash", source="", reasons=(), detail=f"exit code {self.process.exitcode}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def fuzz(cases: Iterable[Case], folder: Path, processes: int = 2) -> Iterator[Result]:
    """The result of every case, in the order in which they end."""
    waiting, number = iter(cases), processes
    working = [_Process(folder / str(place)) for place in range(processes)]
    for process in working:
        process.give(next(waiting))
    try:
        while working:
            ready = wait([process.pipe for process in working], timeout=1)
            for process in list(working):
                if process.pipe in ready:
                    result = process.take()
                elif time.monotonic() > process.deadline:
                    result = Result(case=process.case, outcome="hang", source="", reasons=(), detail=f"over {LIMIT_S} s")
                else:
                    continue
                yield result
                working.remove(process)
                following = next(waiting, None)
                if result.outcome not in SOUND or following is None:  # what else it left behind is not for the next case
                    process.end()
                if following is not None:
                    number += 1
                    working.append(process if result.outcome in SOUND else _Process(folder / str(number)))
                    working[-1].give(following)
    finally:
        for process in working:
            process.end()
