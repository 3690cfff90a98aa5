"""Rows of a text file of any size, one in memory at a time.

    x.jsonl[.gz|.zst|.zip] --open_text--> bytes --read_lines--> lines --read_json_lines--> records
    x.json [.gz|.zst|.zip] --open_text--> bytes --read_json_list--> records

Bytes are counted as they unfold: a row takes at most MAX_ROW_BYTES, however small the file that it lies in. A bad row is given
as a BadMedia in its place; a file that is broken for good ends the build, as the rest of it cannot be read.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, BinaryIO

import pyarrow as pa

from mmpt.data.faults import BadMedia
from mmpt.types import UserError

MAX_ROW_BYTES = 1 << 26
CHUNK = 1 << 20  # bytes read at once
IN_NUMBERS = "0123456789.eE+-"
COMPRESSED = (".gz", ".zst", ".zip")
BROKEN = (OSError, zlib.error, EOFError, zipfile.BadZipFile)
"""What the decompressors raise for bytes that are not whole."""

Rows = Iterator[tuple[int, Any | BadMedia]]
"""Records of a file with their numbers, counted from 0; a BadMedia stands in the place of a row that cannot be read."""


def kind_of(file: BinaryIO) -> str:
    """The suffix that says how a file's rows are written, without that of its compression: ".jsonl" of "a.jsonl.gz"."""
    name = PurePath(file.name)
    return (PurePath(name.stem) if name.suffix in COMPRESSED else name).suffix


@contextmanager
def open_text(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as they are read. Raises UserError for a file that is cut off or damaged."""
    suffix = PurePath(file.name).suffix
    try:
        if suffix == ".gz":
            yield gzip.GzipFile(fileobj=file)
        elif suffix == ".zst":
            # Arrow's reader says when a file is cut off; that of the package zstandard ends there as if that were all.
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), CHUNK)
        elif suffix == ".zip":
            yield from _only_member(file)
        else:
            yield file
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
            raise
        raise UserError(f"{file.name}: cut off or damaged ({error or 'it ends early'}); fetch it again") from error


def _only_member(file: BinaryIO) -> Iterator[BinaryIO]:
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise UserError(f"{file.name}: holds {len(members)} files; a zip of one is read")
        if members[0].flag_bits & 1 or members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{file.name}: encrypted or oddly compressed; unpack it, or write it as .gz or .zst")
        with archive.open(members[0]) as member:
            yield member


def read_lines(text: BinaryIO, start: int = 0) -> Iterator[tuple[int, bytes | BadMedia]]:
    """Lines from number `start` on, with their ends; a longer one than MAX_ROW_BYTES is passed over in pieces."""
    number = 0
    while line := text.readline(MAX_ROW_BYTES + 1):
        too_long = len(line) > MAX_ROW_BYTES
        while too_long and not line.endswith(b"\n") and (line := text.readline(CHUNK)):
            pass
        if number >= start:
            yield number, BadMedia("limit", f"a row of more than {MAX_ROW_BYTES:,} bytes") if too_long else line
        number += 1


def read_json_lines(file: BinaryIO, start: int = 0) -> Rows:
    """JSON objects, one a line, from line `start` on; blank lines are passed over."""
    with open_text(file) as text:
        for number, line in read_lines(text, start):
            if isinstance(line, BadMedia):
                yield number, line
            elif line := line.strip():
                yield number, _parse(line.removeprefix(codecs.BOM_UTF8))


def _parse(line: bytes) -> dict[str, Any] | BadMedia:
    try:
        return object_of(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return BadMedia("text", f"not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return BadMedia("json", f"not JSON: {error}")


def object_of(record: Any) -> dict[str, Any] | BadMedia:
    """The record, if it is a JSON object."""
    return record if isinstance(record, dict) else BadMedia("json", f"a {type(record).__name__}, not an object")


def read_json_list(file: BinaryIO, start: int = 0) -> Rows:
    """The objects of one JSON list, from number `start` on, decoded one by one.

    Raises UserError where the list itself is broken: what follows cannot be told apart.
    """
    with open_text(file) as text:
        elements = _ListReader(text)
        number = 0
        try:
            while (element := elements.next()) is not _END:
                if number >= start:
                    yield number, object_of(element)
                number += 1
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file.name}: not a JSON list at element {number} ({error}); nothing after it can be read"
            ) from error


_END = object()


class _ListReader:
    """Decodes the elements of a JSON list from a window of its text, which grows only as far as one element needs."""

    def __init__(self, text: BinaryIO) -> None:
        self._text = text
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode = json.JSONDecoder().raw_decode
        self._window, self._at = "", 0
        self._opened = self._ended = False

    def next(self) -> Any:
        """The next element, or _END. Raises ValueError or RecursionError for text that is no JSON list."""
        separator = self._peek()
        if not self._opened:
            if separator != "[":
                raise ValueError("it does not begin with '['; a file with one object a line is named .jsonl")
            self._opened, self._at = True, self._at + 1
            if self._peek() != "]":
                return self._element()
            separator = "]"
        if separator == "]":
            self._at += 1
            if self._peek():
                raise ValueError("text after the list")
            return _END
        if separator != ",":
            raise ValueError("',' or ']' expected")
        self._at += 1
        return self._element()

    def _peek(self) -> str:
        """The next character that is no blank, "" at the end; the reader stands on it."""
        while True:
            rest = self._window[self._at : self._at + CHUNK].lstrip(" \t\r\n")
            if rest:
                self._at += len(self._window[self._at : self._at + CHUNK]) - len(rest)
                return rest[0]
            self._at = min(self._at + CHUNK, len(self._window))
            if self._at == len(self._window) and not self._grow(CHUNK):
                return ""

    def _element(self) -> Any:
        self._peek()
        wanted = CHUNK
        while True:
            fault: Exception = ValueError("it ends within an element")
            try:
                element, end = self._decode(self._window, self._at)
                # A number may go on beyond the window, as -1 does in -1.5: what follows it shows that it is whole.
                if end < len(self._window) and not (type(element) in (int, float) and self._window[end] in IN_NUMBERS):
                    self._at = end
                    return element
            except ValueError as error:
                fault = error
            if len(self._window) - self._at > MAX_ROW_BYTES:
                raise ValueError(f"an element of more than {MAX_ROW_BYTES:,} characters, or one that is no JSON")
            if not self._grow(wanted):
                raise fault
            wanted *= 2  # what is decoded again and again doubles each time: linear in all

    def _grow(self, wanted: int) -> bool:
        """Drop what was decoded and read `wanted` bytes more; False at the end of the file."""
        if self._ended:
            return False
        data = self._text.read(wanted)
        self._ended = len(data) == 0
        self._window, self._at = self._window[self._at :] + self._utf8.decode(data, final=self._ended), 0
        return not self._ended
