"""Rows of a parquet file of any size, a batch of a row group in memory at a time.

    x.parquet --row groups--> batches, strings as dictionaries --> rows of plain Python values

A parquet of a kilobyte can say "eight megabytes" a million times over, by a dictionary or by levels that repeat. So strings stay
dictionaries until their row is known to be small enough: a batch never takes more than its pages do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmpt.data.faults import BadMedia
from mmpt.recipes.streams import MAX_ROW_BYTES, Rows
from mmpt.types import UserError

MAX_BATCH_ROWS = 512
MAX_VALUES = 1 << 26  # of one column of a row group, nulls and list elements counted


def read_parquet(file: BinaryIO, choose: Callable[[pa.Schema], list[str]], start: int = 0) -> Rows:
    """Rows from number `start` on as dicts of the columns that `choose` names.

    Row groups before `start` are not read. Raises UserError for a file that is no parquet, or is damaged.
    """
    try:
        whole = pq.ParquetFile(file)
        columns = choose(whole.schema_arrow)
        table = pq.ParquetFile(file, metadata=whole.metadata, read_dictionary=_byte_columns(whole.metadata, columns))
        first = 0
        for group in range(whole.num_row_groups):
            rows = whole.metadata.row_group(group).num_rows
            if first + rows > start:
                yield from _read_group(table, group, columns, first, start)
            first += rows
    # KeyError, ValueError: arrow's own types derive from them, and columns that the pages do not hold raise them
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file.name}: not a parquet file, or a damaged one ({reason}); fetch it again") from error


def _byte_columns(metadata: pq.FileMetaData, columns: list[str]) -> list[str]:
    """Paths of the leaves below `columns` that hold strings or bytes."""
    leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    return [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path.split(".")[0] in columns]


def _read_group(table: pq.ParquetFile, group: int, columns: list[str], first: int, start: int) -> Rows:
    """Rows of a row group whose number, counted from `first`, is `start` or more."""
    if not columns:
        return
    size = _batch_rows(table.metadata.row_group(group), columns)
    for batch in table.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False):
        if first + batch.num_rows > start:
            small = sum(map(unfolded_bytes, batch.columns)) <= MAX_ROW_BYTES
            for row in range(max(start - first, 0), batch.num_rows):
                yield first + row, _row(batch.slice(row, 1), small)
        first += batch.num_rows


def _batch_rows(group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """How many rows, of the group's average size, take as much as the largest row may."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    if (most := max((chunk.num_values for chunk in chunks), default=0)) > MAX_VALUES:
        raise UserError(f"parquet: a row group of {most:,} values; {MAX_VALUES:,} are read at most, write smaller row groups")
    average = sum(chunk.total_uncompressed_size for chunk in chunks) // max(group.num_rows, 1)
    return max(1, min(MAX_BATCH_ROWS, MAX_ROW_BYTES // max(average, 1)))


def unfolded_bytes(array: pa.Array) -> int:
    """Bytes that an array takes with every value written out."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary)
        return array.indices.nbytes + (pc.sum(pc.take(lengths.cast(pa.int64()), array.indices)).as_py() or 0)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return 8 * len(array) + unfolded_bytes(array.flatten())
    if pa.types.is_struct(array.type):
        return len(array) + sum(map(unfolded_bytes, array.flatten()))
    return array.nbytes


def _row(row: pa.RecordBatch, small: bool) -> dict[str, Any] | BadMedia:
    if not small and (size := sum(map(unfolded_bytes, row.columns))) > MAX_ROW_BYTES:
        return BadMedia("limit", f"a row of {size:,} bytes, more than the {MAX_ROW_BYTES:,} that are read")
    try:
        return {name: column[0].as_py() for name, column in zip(row.schema.names, row.columns, strict=True)}
    except UnicodeDecodeError as error:
        return BadMedia("text", f"not UTF-8: {error}")


def scalar_columns(schema: pa.Schema) -> Iterator[str]:
    """Names of the columns that hold one string, number or truth value a row."""
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        plain = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)
        if plain or pa.types.is_integer(kind) or pa.types.is_floating(kind):
            yield field.name
