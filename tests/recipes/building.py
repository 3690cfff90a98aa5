"""What the tests of builds share: a spec over files that a test wrote, and the shards read back by tarfile and json alone."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import yaml

from mmpt.data.spec import DataSpec, load_spec
from mmpt.recipes.build import FAULTS

Sample = tuple[str, dict[str, Any], dict[str, bytes]]  # key, document, files by suffix


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".zip": lambda data: zipped({"rows.jsonl": data}),
}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def picture(number: int, kind: str = "PNG") -> bytes:
    """A picture like no other of them: 10 + number pixels wide, 20 high."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (10 + number, 20), (number * 37 % 256, 90, 30)).save(buffer, kind)
    return buffer.getvalue()


def spec_over(folder: Path, format: str, pattern: str, **more: Any) -> DataSpec:
    """A spec in `folder` whose files lie beside it; all of them are train, if nothing else is said."""
    shards = {"root": ".", "pattern": pattern, **more.pop("shards", {})}
    tree = {"version": 1, "name": "source", "format": format, "shards": shards, "split": {"train": ":"}, **more}
    (folder / "source.yaml").write_text(yaml.safe_dump(tree))
    return load_spec(folder / "source.yaml")


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read_shard(shard: Path) -> list[Sample]:
    samples: list[Sample] = []
    with tarfile.open(shard) as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            data = archive.extractfile(member).read()
            if suffix == "json":
                samples.append((key, json.loads(data), {}))
            else:
                assert samples[-1][0] == key
                samples[-1][2][suffix] = data
    return samples


def read_split(spec: Path, split: str) -> list[Sample]:
    """The samples that a built spec gives a split, in order."""
    built = load_spec(spec)
    return [sample for name in built.shard_names(split) for sample in read_shard(spec.parent / name)]


def told(sample: Sample) -> list[str | bytes]:
    """A document as its texts and the bytes of its pictures, in order; what the JSON says of a picture must be so."""
    _, document, files = sample
    content: list[str | bytes] = []
    for part in document["parts"]:
        if part["type"] == "text":
            content.append(part["text"])
            continue
        data = files[part["file"]]
        with PIL.Image.open(io.BytesIO(data)) as image:
            assert part["wh"] == list(image.size)
        content.append(data)
    assert len(files) == sum(isinstance(piece, bytes) for piece in content)
    return content


def faults(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / FAULTS).read_bytes().splitlines()]


def folder_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}
