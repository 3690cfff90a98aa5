"""What the members of one sample say of the document that they are. Nothing is decoded here.

    members by suffix --Layout.entries, check_entries--> what each part is, once, for the index
                      --Layout.content--> the texts, each time that the document is read

A layout is how a format lies in its tars: `interleaved` has a JSON that names the other members, `pairs` (img2dataset,
CC12M, LAION) has a picture, a text and a JSON side by side.
"""

from __future__ import annotations

import json
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmpt.data.faults import BadMedia
from mmpt.data.media.images import MAX_PIXELS, probe_image
from mmpt.data.spec import DataSpec
from mmpt.types import AUDIO, IMAGE, TEXT, VIDEO, Buffer

VERSION = 1
MAX_JSON_BYTES = 2**24  # as Python objects some twenty times that
MAX_MEDIA_BYTES = {IMAGE: 2**26, AUDIO: 2**28, VIDEO: 2**30}
MAX_PARTS = 100_000
MAX_SECONDS = 4 * 3600.0
TRACK_RATE = 16_000
"""Hz at which the sound track of a video is counted: the rate that it is brought to."""

Files = Mapping[str, Buffer]
"""Members of a sample, by suffix."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a document says of one part; the fields that its kind lacks are 0."""

    kind: int  # TEXT, IMAGE, AUDIO or VIDEO
    text: str = ""
    predict: bool = False
    file: str = ""  # suffix of the member that holds it; "" for a text in the JSON
    width: int = 0  # pixels, as shown
    height: int = 0
    rate: int = 0  # Hz
    samples: int = 0  # of a sound, at `rate`
    start: float = 0.0  # seconds into the file
    stop: float = 0.0
    crc32: int | None = None  # of the member


class Layout(Protocol):
    """How a format lies in its tars."""

    signature: str  # what the entries of a sample depend on, beside its members

    def entries(self, files: Files) -> list[Entry]:
        """The parts that a sample's members tell of. Raises BadMedia."""
        ...

    def content(self, files: Files) -> tuple[list[str], Mapping[str, Any]]:
        """The texts of the entries, in order, and what else is known of the document, of members that `entries` has read before.

        Raises BadMedia.
        """
        ...


def layout_of(spec: DataSpec) -> Layout:
    assert spec.format in ("interleaved", "pairs"), spec.format
    return Interleaved() if spec.format == "interleaved" else Pairs(spec)


class Interleaved:
    """The canonical JSON: an ordered list of parts, each text in place, each medium in a member of its own."""

    signature = "interleaved"

    def entries(self, files: Files) -> list[Entry]:
        parts = _field(self._record(files), "parts", list, "document")
        if not 0 < len(parts) <= MAX_PARTS:
            raise BadMedia("json", f"parts has {len(parts)} entries; 1 to {MAX_PARTS:,} are read")
        return [entry for number, part in enumerate(parts) for entry in _entries(part, f"parts[{number}]", files)]

    def content(self, files: Files) -> tuple[list[str], Mapping[str, Any]]:
        record = self._record(files)
        texts = [part["text"] for part in record["parts"] if part["type"] == "text"]
        return texts, _field(record, "meta", dict, "document", default={})

    def _record(self, files: Files) -> dict[str, Any]:
        if "json" not in files:
            raise BadMedia("missing", f"no JSON member; there are {sorted(files)}")
        record = _load_json(files["json"])
        if record.get("v") != VERSION:
            raise BadMedia("json", f"v = {reprlib.repr(record.get('v'))}: this reads version {VERSION}")
        return record


class Pairs:
    """A picture and its text, each in the first member that the map names; the JSON is no more than meta."""

    def __init__(self, spec: DataSpec) -> None:
        self.fields = {name: spec.field(name) for name in ("image", "text", "meta")}
        self.signature = f"pairs {sorted(self.fields.items())}"

    def entries(self, files: Files) -> list[Entry]:
        image, text = self._find(files, "image"), self._find(files, "text")
        info = probe_image(files[image])
        words = _decode_text(files[text], text)
        return [
            Entry(kind=IMAGE, file=image, width=info.width, height=info.height),
            Entry(kind=TEXT, file=text, text=words, predict=True),
        ]

    def content(self, files: Files) -> tuple[list[str], Mapping[str, Any]]:
        name = self._find(files, "text")
        meta = next((name for name in self.fields["meta"] if name in files), None)
        return [_decode_text(files[name], name)], _load_json(files[meta]) if meta else {}

    def _find(self, files: Files, field: str) -> str:
        for name in self.fields[field]:
            if name in files:
                return name
        raise BadMedia("missing", f"no member {' or '.join(self.fields[field])} for {field}; there are {sorted(files)}")


def _load_json(data: Buffer) -> dict[str, Any]:
    if len(data) > MAX_JSON_BYTES:
        raise BadMedia("limit", f"the JSON member has {len(data):,} bytes, more than the {MAX_JSON_BYTES:,} that are read")
    try:
        record = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise BadMedia("json", f"the JSON member is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadMedia("json", f"the JSON member holds a {type(record).__name__}, not an object")
    return record


def _decode_text(data: Buffer, name: str) -> str:
    if len(data) > MAX_JSON_BYTES:
        raise BadMedia("limit", f"{name}: {len(data):,} bytes, more than the {MAX_JSON_BYTES:,} that are read")
    try:
        return str(data, "utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadMedia("text", f"{name} is not UTF-8: {error}") from error


def _entries(part: Any, where: str, files: Files) -> Iterator[Entry]:
    """One entry; two for a video whose sound track is wanted."""
    if not isinstance(part, dict):
        raise BadMedia("json", f"{where} is a {type(part).__name__}, not an object")
    kind = part.get("type")
    if kind == "text":
        yield _text_entry(part, where)
        return
    if kind not in ("image", "audio", "video"):
        raise BadMedia("json", f"{where}.type = {reprlib.repr(kind)}: known are 'text', 'image', 'audio' and 'video'")
    file = _field(part, "file", str, where)
    if file not in files:
        raise BadMedia("missing", f"{where}.file = {file!r}: no such member; there are {sorted(files)}")
    crc32 = _field(part, "crc32", int, where) if "crc32" in part else None
    if kind == "image":
        width, height = _size(part, where)
        yield Entry(kind=IMAGE, file=file, crc32=crc32, width=width, height=height)
    elif kind == "audio":
        rate, samples = (_positive(part, name, where) for name in ("sample_rate", "samples"))
        if samples / rate > MAX_SECONDS:
            raise BadMedia("limit", f"{where}.samples = {samples}: longer than {MAX_SECONDS:.0f} seconds")
        yield Entry(kind=AUDIO, file=file, crc32=crc32, rate=rate, samples=samples, stop=samples / rate)
    else:
        yield from _video_entries(part, where, file, crc32)


def _text_entry(part: dict[str, Any], where: str) -> Entry:
    text = _field(part, "text", str, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no text holds
        found = f"{text[error.start]!r} at character {error.start}"
        raise BadMedia("text", f"{where}.text: {found} is no character of Unicode text") from error
    return Entry(kind=TEXT, text=text, predict=_field(part, "predict", bool, where, default=True))


def _video_entries(part: dict[str, Any], where: str, file: str, crc32: int | None) -> Iterator[Entry]:
    width, height = _size(part, where)
    clip = part.get("clip")
    if not isinstance(clip, list) or len(clip) != 2 or not all(type(t) in (int, float) for t in clip):
        raise BadMedia("json", f"{where}.clip = {reprlib.repr(clip)}: [start, stop] in seconds expected")
    if not 0 <= clip[0] < clip[1] <= MAX_SECONDS:  # NaN fails as well, and what is too large for a float
        raise BadMedia("limit", f"{where}.clip = {reprlib.repr(clip)}: 0 <= start < stop <= {MAX_SECONDS:.0f} expected")
    start, stop = map(float, clip)
    yield Entry(kind=VIDEO, file=file, crc32=crc32, width=width, height=height, start=start, stop=stop)
    if _field(part, "audio", bool, where, default=False):
        samples = max(1, round((stop - start) * TRACK_RATE))
        yield Entry(kind=AUDIO, file=file, crc32=crc32, rate=TRACK_RATE, samples=samples, start=start, stop=stop)


def _field(record: dict[str, Any], name: str, kind: type, where: str, default: Any = None) -> Any:
    value = record.get(name, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadMedia("json", f"{where}.{name} = {reprlib.repr(value)}: {kind.__name__} expected")
    return value


def _positive(part: dict[str, Any], name: str, where: str) -> int:
    value = _field(part, name, int, where)
    if not 0 < value < 2**31:
        raise BadMedia("json", f"{where}.{name} = {value!r}: a positive number expected")
    return value


def _size(part: dict[str, Any], where: str) -> tuple[int, int]:
    size = part.get("wh")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise BadMedia("json", f"{where}.wh = {reprlib.repr(size)}: [width, height] in pixels expected")
    if size[0] * size[1] > MAX_PIXELS:
        raise BadMedia("limit", f"{where}.wh = {reprlib.repr(size)}: more than the {MAX_PIXELS} pixels that are decoded")
    return size[0], size[1]


def check_entries(entries: Sequence[Entry], files: Files) -> None:
    """What can be known of the members without decoding them: sizes, CRC, headers of pictures. Raises BadMedia."""
    for number, entry in enumerate(entries):
        if entry.kind != TEXT:
            check_entry(number, entry, files)


def check_entry(number: int, entry: Entry, files: Files) -> None:
    """The same of one medium, part `number` of its document."""
    data, where = files[entry.file], f"parts[{number}] ({entry.file})"
    if len(data) > MAX_MEDIA_BYTES[entry.kind]:
        raise BadMedia("limit", f"{where}: {len(data):,} bytes, more than the {MAX_MEDIA_BYTES[entry.kind]:,} that are read")
    if entry.crc32 is not None and entry.crc32 != zlib.crc32(data):
        raise BadMedia("crc", f"{where}.crc32 = {entry.crc32}, but its bytes have {zlib.crc32(data)}")
    if entry.kind == IMAGE:
        info = probe_image(data)
        if (info.width, info.height) != (entry.width, entry.height):
            raise BadMedia("size", f"{where}.wh = [{entry.width}, {entry.height}], but it is {info.width} x {info.height}")
