"""A table of pictures and captions to documents of a pair, as open_clip reads one.

    x.csv, x.tsv, also .gz, .zst, .zip: a header, then one pair a row
        filepath <tab> title

`map.image` and `map.text` name other columns. Tab or comma: whichever of them splits the header into those columns, as
open_clip's .csv files have tabs. Pictures come from the media folder; a row whose picture is not there is a fault. Which of the
spec's templates orders a pair is drawn from the hash of its key: the same on every machine and every time.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from mmpt.data.faults import BadMedia
from mmpt.data.spec import DataSpec, Template
from mmpt.recipes.draft import Draft, MediaFolder
from mmpt.recipes.streams import Rows, open_text, read_lines
from mmpt.types import UserError

DELIMITERS = ("\t", ",")
DEFAULT = (Template(order=("image", "text")),)


class CsvReader:
    """Reads format `csv`."""

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec
        self.templates = spec.templates or DEFAULT
        self.media = MediaFolder(spec)

    def rows(self, file: BinaryIO, start: int) -> Rows:
        with open_text(file) as text:
            lines = _Lines(text)
            header, delimiter = self._header(lines, file.name)
            table = csv.reader(lines, delimiter=delimiter)
            number = 0
            while True:
                row = _next_row(table, len(header))
                if row is None:
                    return
                if number >= start and row != []:
                    yield number, row if isinstance(row, BadMedia) else dict(zip(header, row, strict=True))
                number += 1

    def _header(self, lines: Iterator[str], name: str) -> tuple[list[str], str]:
        """The columns, and what parts them."""
        try:
            line = next(lines, "").removeprefix("\ufeff")
        except BadMedia as fault:
            raise UserError(f"{name}: its first line names no columns: {fault}") from fault
        for delimiter in DELIMITERS:
            columns = next(csv.reader([line], delimiter=delimiter), [])
            if all(set(self.spec.field(field)) & set(columns) for field in ("image", "text")):
                return columns, delimiter
        wanted = " and ".join(";".join(self.spec.field(field)) for field in ("image", "text"))
        raise UserError(
            f"{name}: columns {wanted} are wanted, its first line is {ascii(line.strip())[:200]}; set map.image, map.text"
        )

    def draft(self, key: str, row: dict[str, str]) -> Draft:
        image, text = (next(name for name in self.spec.field(field) if name in row) for field in ("image", "text"))
        draft = Draft()
        for kind in self._order(key):
            if kind == "image":
                draft.add_image(self.media.read(row[image]))
            else:
                draft.add_text(row[text])
        draft.add_meta(row, without=(image, text))
        return draft

    def _order(self, key: str) -> tuple[str, ...]:
        """The template that the key's hash draws, by their probabilities."""
        drawn = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
        drawn *= sum(template.p for template in self.templates)
        for template in self.templates:
            if (drawn := drawn - template.p) < 0:
                return template.order
        return self.templates[-1].order


def _next_row(table: Any, columns: int) -> list[str] | BadMedia | None:
    """The next row, [] for a blank line, None at the end."""
    try:
        row = next(table, None)
    except BadMedia as fault:
        return fault
    except csv.Error as error:  # a field over csv's own limit of 128 KiB, as an open quote makes one
        return BadMedia("limit" if "limit" in str(error) else "json", f"not a row of a table: {error}")
    if not row or len(row) == columns:
        return row
    return BadMedia("json", f"{len(row)} fields, where the header has {columns}")


class _Lines:
    """Lines as text. An iterator that outlives the fault of one line, as a generator does not."""

    def __init__(self, text: BinaryIO) -> None:
        self._lines = read_lines(text)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        if isinstance(line, BadMedia):
            raise line
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise BadMedia("text", f"not UTF-8: {error}") from error
