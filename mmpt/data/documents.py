"""One sample of a shard to one document: the version 1 JSON of the tars, checked before anything is decoded.

    Sample(fields) --parse--> entries of the JSON --to_document--> Document(parts)

The lengths of a plan need the entries alone, so `parse` reads no payload.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmpt.data.media import MAX_PIXELS, check_header
from mmpt.types import Document, Image, Part, Sample, Text

VERSION = 1
MAX_BYTES = 2**26
"""The most that one encoded picture may take."""


@dataclass(frozen=True, kw_only=True)
class TextEntry:
    text: str
    predict: bool


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    file: str  # suffix of the member that holds the picture
    width: int  # pixels
    height: int  # pixels
    crc32: int | None  # of the encoded bytes
    predict: bool


Entry = TextEntry | ImageEntry


def parse(data: bytes) -> tuple[tuple[Entry, ...], Mapping[str, Any]]:
    """The parts and the `meta` of a document's JSON member. Raises ValueError naming the fault."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise ValueError(f"the JSON member is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"the JSON member holds a {type(record).__name__}, not an object")
    if record.get("v") != VERSION:
        raise ValueError(f"v = {record.get('v')!r}: this reads version {VERSION}")
    parts = _field(record, "parts", list, "document")
    if not parts:
        raise ValueError("parts is empty")
    meta = _field(record, "meta", dict, "document", default={})
    return tuple(_entry(part, f"parts[{number}]") for number, part in enumerate(parts)), meta


def _entry(part: Any, where: str) -> Entry:
    if not isinstance(part, dict):
        raise ValueError(f"{where} is a {type(part).__name__}, not an object")
    kind = part.get("type")
    if kind == "text":
        text = _field(part, "text", str, where)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no text holds
            raise ValueError(f"{where}.text: {text[error.start]!r} at character {error.start} is no character of Unicode text") from error
        return TextEntry(text=text, predict=_field(part, "predict", bool, where, default=True))
    if kind == "image":
        width, height = _size(part, where)
        return ImageEntry(
            file=_field(part, "file", str, where),
            width=width,
            height=height,
            crc32=_field(part, "crc32", int, where) if "crc32" in part else None,
            predict=_field(part, "predict", bool, where, default=False),
        )
    raise ValueError(f"{where}.type = {kind!r}: known are 'text' and 'image'")


def _field(record: dict[str, Any], name: str, kind: type, where: str, default: Any = None) -> Any:
    value = record.get(name, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}.{name} = {value!r}: {kind.__name__} expected")
    return value


def _size(part: dict[str, Any], where: str) -> tuple[int, int]:
    size = part.get("wh")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{where}.wh = {size!r}: [width, height] in pixels expected")
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{where}.wh = {size!r}: more than the {MAX_PIXELS} pixels that are decoded")
    return size[0], size[1]


def to_document(sample: Sample, source: str) -> Document:
    """The document that a sample holds, its pictures still encoded.

    Raises ValueError naming the fault: malformed JSON, a missing member, bytes that differ from their CRC,
    a picture over the limits or of another size than the JSON says.
    """
    if "json" not in sample.fields:
        raise ValueError(f"no JSON member; there are {sorted(sample.fields)}")
    entries, meta = parse(sample.fields["json"])
    parts = tuple(_part(entry, sample.fields, f"parts[{number}]") for number, entry in enumerate(entries))
    return Document(key=sample.key, source=source, parts=parts, meta=meta)


def _part(entry: Entry, files: Mapping[str, bytes], where: str) -> Part:
    if isinstance(entry, TextEntry):
        return Text(text=entry.text, predict=entry.predict)
    if entry.file not in files:
        raise ValueError(f"{where}.file = {entry.file!r}: no such member; there are {sorted(files)}")
    data = files[entry.file]
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where}: {len(data)} bytes, more than the {MAX_BYTES} that a picture may take")
    if entry.crc32 is not None and entry.crc32 != zlib.crc32(data):
        raise ValueError(f"{where}.crc32 = {entry.crc32}, but the bytes of {entry.file} have {zlib.crc32(data)}")
    try:
        width, height, _ = check_header(data)
    except ValueError as error:
        raise ValueError(f"{where} ({entry.file}): {error}") from error
    if (width, height) != (entry.width, entry.height):
        raise ValueError(f"{where}.wh = [{entry.width}, {entry.height}], but {entry.file} is {width} x {height}")
    return Image(data=data, width=width, height=height, predict=entry.predict)
