from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmpt.data.faults import BadMedia
from mmpt.recipes import parquet
from mmpt.recipes.parquet import read_parquet, scalar_columns, unfolded_bytes
from mmpt.types import UserError

ROWS = [
    {
        "text": f"row {n}" if n % 7 else None,
        "tags": ["a", None, "b" * n][: n % 4],
        "pair": {"bytes": b"\x00%d" % n, "n": n},
        "score": n / 3,
    }
    for n in range(100)
]
# The first row says eight megabytes a hundred times, 1,999 others once: 17 GB for a reader that writes them out.
BOMB = """
import sys
from mmpt.data.faults import BadMedia
from mmpt.recipes.parquet import read_parquet
with open(sys.argv[1], "rb") as file:
    rows = read_parquet(file, lambda schema: schema.names)
    found = [row.reason if isinstance(row, BadMedia) else len(row["texts"][0]) for _, row in rows]
assert found == ["limit", *[8 << 20] * 499], found[:4]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # rusage would count the parent's memory
print(int(peak.split()[1]) >> 10)
"""


def everything(path: Path, start: int = 0) -> list[tuple[int, Any]]:
    with path.open("rb") as file:
        return list(read_parquet(file, lambda schema: schema.names, start))


@pytest.mark.parametrize("start", [0, 1, 29, 30, 31, 99, 100])
@pytest.mark.parametrize("batch", [1, 4, 512])
def test_rows_are_those_of_pyarrow(tmp_path: Path, start: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_BATCH_ROWS", batch)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=30)
    assert everything(tmp_path / "a.parquet", start) == list(enumerate(ROWS))[start:]


@pytest.mark.parametrize("large", [False, True])
def test_types_that_writers_use(tmp_path: Path, large: bool) -> None:
    string, make = (pa.large_string(), pa.large_list) if large else (pa.string(), pa.list_)
    table = pa.table({"text": pa.array(["a", None], string), "texts": pa.array([["a", None], None], make(string))})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=large)
    assert everything(tmp_path / "a.parquet") == [(0, {"text": "a", "texts": ["a", None]}), (1, {"text": None, "texts": None})]


def test_scalar_columns_are_those_of_one_small_value() -> None:
    schema = pa.schema(
        {"a": pa.string(), "b": pa.list_(pa.string()), "c": pa.int8(), "d": pa.binary(), "e": pa.bool_(), "f": pa.float32()}
    )
    assert list(scalar_columns(schema)) == ["a", "c", "e", "f"]


def test_a_row_over_the_limit_is_told_and_the_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_ROW_BYTES", 1000)
    values = ["a", "b" * 2000, "c", "d" * 900]
    pq.write_table(pa.table({"text": values, "texts": [["x" * 10] * n for n in (1, 1, 200, 1)]}), tmp_path / "a.parquet")
    found = [row.reason if isinstance(row, BadMedia) else row["text"][0] for _, row in everything(tmp_path / "a.parquet")]
    assert found == ["a", "limit", "limit", "d"]


def test_a_value_said_again_and_again_is_not_written_out(tmp_path: Path) -> None:
    array = pa.DictionaryArray.from_arrays(pa.array([0] * 599, pa.int32()), pa.array(["x" * (8 << 20)]))
    assert unfolded_bytes(array) == 599 * ((8 << 20) + 4)
    offsets = pa.array([0, *range(100, 600)], pa.int32())
    table = pa.table({"texts": pa.ListArray.from_arrays(offsets, array)})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", dictionary_pagesize_limit=1 << 28, store_schema=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < 10_000
    command = [sys.executable, "-c", BOMB, str(tmp_path / "bomb.parquet")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1000, "MiB"


def test_a_damaged_file_ends_the_build(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    for broken in (b"", b"PAR1", data[:-20], data[: len(data) // 2], b"\x00" * 400 + data[400:]):
        (tmp_path / "a.parquet").write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.parquet: not a parquet file"):
            everything(tmp_path / "a.parquet")


def test_text_that_is_not_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())})
    raw = pa.table({"text": table["text"].chunk(0).view(pa.string())})
    pq.write_table(raw, tmp_path / "a.parquet")
    found = [row.reason if isinstance(row, BadMedia) else row["text"] for _, row in everything(tmp_path / "a.parquet")]
    assert found == ["good", "text", "fine"]
