"""A document being put together from one row of a source: its parts in order, its pictures checked and named.

    a row --Reader.draft--> Draft --Draft.document(key)--> the JSON of a canonical shard, and its files

Rows come from strangers: a picture that a row names is read below the media folder or not at all.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mmpt.data.documents import MAX_JSON_BYTES, MAX_PARTS
from mmpt.data.faults import BadMedia
from mmpt.data.media.images import MAX_BYTES, probe_image
from mmpt.data.spec import DataSpec
from mmpt.recipes.streams import Rows
from mmpt.types import UserError

MAX_DOCUMENT_BYTES = 1 << 30  # of its texts and pictures
MAX_META = 64  # entries
MAX_META_CHARACTERS = 4096  # of one string
MAX_ESCAPE = 6  # bytes that JSON takes for one character, at most
SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class Draft:
    """Parts, files by suffix, and what had to be left out."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.meta: dict[str, Any] = {}
        self.left_out: list[BadMedia] = []
        self.bytes = 0  # of texts and pictures

    def add_text(self, text: Any, predict: bool = True) -> None:
        """Append a text. Raises BadMedia for what is no string of Unicode characters."""
        if not isinstance(text, str):
            raise BadMedia("text", f"a {type(text).__name__}, where a text is wanted")
        try:
            self.bytes += len(text.encode())
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no text holds
            raise BadMedia("text", f"{text[error.start]!a} at character {error.start} is no character") from error
        self._append({"type": "text", "text": text, "predict": predict})

    def add_image(self, data: bytes) -> None:
        """Append a picture, its bytes as they are. Raises BadMedia for bytes that are no picture, or over a limit."""
        if self.bytes + len(data) > MAX_DOCUMENT_BYTES:
            raise BadMedia("limit", f"the row and its pictures take more than {MAX_DOCUMENT_BYTES:,} bytes")
        header = probe_image(data)
        name = f"{len(self.parts):03d}.{SUFFIX[header.kind]}"
        self._append({"type": "image", "file": name, "wh": [header.width, header.height], "crc32": zlib.crc32(data)})
        self.files[name] = data
        self.bytes += len(data)

    def add_meta(self, record: dict[str, Any], without: tuple[str, ...] = ()) -> None:
        """Keep the small values of a record: strings, numbers and truth values."""
        kept = {name: value for name, value in record.items() if name not in without and _is_small(name) and _is_small(value)}
        self.meta.update(list(kept.items())[: MAX_META - len(self.meta)])

    def _append(self, part: dict[str, Any]) -> None:
        if len(self.parts) == MAX_PARTS:
            raise BadMedia("limit", f"more than {MAX_PARTS:,} parts")
        self.parts.append(part)

    def document(self, key: str) -> dict[str, Any]:
        """The document's JSON. Raises BadMedia where nothing is left of it, or too much."""
        if not self.parts:
            raise BadMedia("missing", "no part of it can be used" if self.left_out else "a row without content")
        document = {"v": 1, "id": key, "parts": self.parts, "meta": self.meta}
        characters = sum(len(part.get("text", "")) for part in self.parts)
        # Written out to be measured only where escapes could take it over the limit.
        if characters * MAX_ESCAPE > MAX_JSON_BYTES // 2 and len(json.dumps(document).encode()) > MAX_JSON_BYTES:
            raise BadMedia("limit", f"a text that takes more than {MAX_JSON_BYTES:,} bytes as JSON")
        return document


def _is_small(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_META_CHARACTERS and not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 63)


class MediaFolder:
    """The folder whose files rows may name. Raises UserError where it is not there, or not below the spec's root."""

    def __init__(self, spec: DataSpec) -> None:
        root = Path(spec.root).resolve()
        self.folder = (root / spec.shards.media).resolve()
        if not self.folder.is_dir() or not self.folder.is_relative_to(root):
            raise UserError(
                f"spec {spec.path}: shards.media = {spec.shards.media!r}: no folder below {root}; put the files there"
            )

    def read(self, name: Any) -> bytes:
        """The bytes of a picture. Raises BadMedia, with nothing read, for a name that leads out of the folder."""
        path = self._below(name)
        try:
            with open(path, "rb", opener=_open_unlinked) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise BadMedia("missing", f"{_shown(name)}: no plain file")
                if status.st_size > MAX_BYTES:
                    raise BadMedia(
                        "limit", f"{_shown(name)}: {status.st_size:,} bytes, more than the {MAX_BYTES:,} that are read"
                    )
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise BadMedia("missing", f"{_shown(name)}: {error.strerror}") from error

    def _below(self, name: Any) -> Path:
        if not isinstance(name, str) or not name:
            raise BadMedia("missing", f"{_shown(name)}: the name of a file is wanted")
        if os.path.isabs(name) or ".." in name.split("/"):
            raise BadMedia("missing", f"{_shown(name)}: leads out of the media folder; it was not read")
        try:
            path = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long; a zero or half a surrogate in it; links in a ring
            raise BadMedia("missing", f"{_shown(name)}: no name of a file") from error
        if not path.is_relative_to(self.folder):
            raise BadMedia("missing", f"{_shown(name)}: a link out of the media folder; it was not read")
        return path


def _open_unlinked(path: str, flags: int) -> int:
    # O_NONBLOCK: a pipe by that name would never open. O_NOFOLLOW: a link put there since it was resolved.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _shown(name: Any) -> str:
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:120]}..."


class Reader(Protocol):
    """How one format is read; made once for a build, from its spec."""

    def __init__(self, spec: DataSpec) -> None: ...

    def rows(self, file: BinaryIO, start: int) -> Rows:
        """Rows of one input file from number `start` on."""

    def draft(self, key: str, row: Any) -> Draft:
        """The document of a row, whose key is given. Raises BadMedia for a row that makes none."""
