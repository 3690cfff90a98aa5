"""Texts to documents of one part.

    x.jsonl[.gz|.zst|.zip]   one object a line, also as .ndjson, or .json as C4 and Dolma have it; the text under map.text
    x.parquet                one row a document; the text in column map.text
    x.txt[.gz|.zst|.zip]     the whole file is one document

`map.text` may name several fields with ';' between them; the first that a row has counts. The small values beside it (url, lang,
license) go into the document's meta.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import pyarrow as pa

from mmpt.data.faults import BadMedia
from mmpt.data.spec import DataSpec
from mmpt.recipes.draft import Draft
from mmpt.recipes.parquet import read_parquet, scalar_columns
from mmpt.recipes.streams import MAX_ROW_BYTES, Rows, kind_of, open_text, read_json_lines
from mmpt.types import UserError

JSON_LINES = (".jsonl", ".ndjson", ".json")


class TextReader:
    """Reads format `text`."""

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec
        self.fields = spec.field("text")

    def rows(self, file: BinaryIO, start: int) -> Rows:
        kind = kind_of(file)
        if kind == ".parquet":
            return read_parquet(file, self._columns, start)
        if kind in JSON_LINES:
            return read_json_lines(file, start)
        if kind == ".txt":
            return self._whole(file, start)
        raise UserError(f"{file.name}: texts are read from .jsonl, .txt (also .gz, .zst, .zip) and .parquet")

    def _columns(self, schema: pa.Schema) -> list[str]:
        scalar = list(scalar_columns(schema))
        if not set(self.fields) & set(scalar):
            raise UserError(
                f"spec {self.spec.path}: map.text = {';'.join(self.fields)!r}: no such column; there are {schema.names}"
            )
        return scalar

    def _whole(self, file: BinaryIO, start: int) -> Rows:
        if start:
            return
        with open_text(file) as stream:
            data = stream.read(MAX_ROW_BYTES + 1)
        if len(data) > MAX_ROW_BYTES:
            yield 0, BadMedia("limit", f"a text of more than {MAX_ROW_BYTES:,} bytes; write it as .jsonl, a document a line")
            return
        try:
            yield 0, {self.fields[0]: data.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            yield 0, BadMedia("text", f"not UTF-8: {error}")

    def draft(self, key: str, row: dict[str, Any]) -> Draft:
        name = next((name for name in self.fields if row.get(name) is not None), None)
        if name is None:
            raise BadMedia("missing", f"no {' or '.join(self.fields)} in it; there are {sorted(row)[:20]}")
        if row[name] == "":
            raise BadMedia("text", f"{name} is empty")
        draft = Draft()
        draft.add_text(row[name])
        draft.add_meta(row, without=self.fields)
        return draft
