from __future__ import annotations

import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from building import COMPRESS, lines, zipped, zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.faults import BadMedia
from mmpt.recipes import streams
from mmpt.recipes.streams import kind_of, read_json_lines, read_json_list, read_lines
from mmpt.types import UserError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=3)


class Named(io.BytesIO):
    """Bytes with a file's name."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def rows(reader: Any, data: bytes, name: str, start: int = 0) -> list:
    return [(number, row.reason if isinstance(row, BadMedia) else row) for number, row in reader(Named(data, name), start)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_gives_the_same_rows(suffix: str) -> None:
    expected = [{"n": number, "text": "x" * number} for number in range(50)]
    data = COMPRESS[suffix](lines(expected))
    assert rows(read_json_lines, data, f"a.jsonl{suffix}") == list(enumerate(expected))
    assert rows(read_json_lines, data, f"a.jsonl{suffix}", start=48) == [(48, expected[48]), (49, expected[49])]
    assert kind_of(Named(b"", f"some.where/a.b.jsonl{suffix}")) == ".jsonl"


def test_several_frames_and_members_are_one_file() -> None:
    half = lines([{"a": 1}]), lines([{"a": 2}])
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstd)):
        assert rows(read_json_lines, b"".join(map(pack, half)), f"a.jsonl{suffix}") == [(0, {"a": 1}), (1, {"a": 2})]


def test_bad_lines_are_counted_and_the_others_read() -> None:
    data = b"\n".join(
        [
            b'\xef\xbb\xbf{"a": 1}',
            b"",
            b"[1]",
            b'{"a": ',
            b'{"a": "\xff"}',
            b"[" * 100_000,
            b'{"a": %s}' % (b"1" * 5000),
            b'{"a": 2}',
        ]
    )
    assert rows(read_json_lines, data, "a.jsonl") == [
        (0, {"a": 1}),
        (2, "json"),
        (3, "json"),
        (4, "text"),
        (5, "json"),
        (6, "json"),
        (7, {"a": 2}),
    ]


def test_a_row_over_the_limit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(streams, "CHUNK", 7)
    for excess in (-1, 0, 1, 2, 50, 99, 100, 101, 500):
        long = b'"' + b"x" * (97 + excess) + b'"'
        found = rows(read_json_lines, b"{}\n" + long + b"\n{}\n" + long, "a.jsonl")
        fault = "json" if len(long) < 100 else "limit"  # a string is no object
        assert found == [(0, {}), (1, fault), (2, {}), (3, "json" if len(long) <= 100 else "limit")]


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"")), max_size=8), start=st.integers(0, 9))
def test_lines_are_those_of_the_whole(parts: list[bytes], start: int) -> None:
    data = b"\n".join(parts)
    expected = io.BytesIO(data).readlines()
    assert list(read_lines(io.BytesIO(data), start)) == list(enumerate(expected))[start:]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_stays_small_in_memory(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 1 << 20)
    data = COMPRESS[suffix](b"{}\n" + b" " * (1 << 26) + b"\n{}\n")
    assert len(data) < 1 << 17
    tracemalloc.start()
    assert rows(read_json_lines, data, f"a.jsonl{suffix}") == [(0, {}), (1, "limit"), (2, {})]
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".zip"])
def test_a_file_cut_off_or_damaged_ends_the_build(suffix: str) -> None:
    data = COMPRESS[suffix](lines([{"n": n, "noise": random.Random(n).random()} for n in range(20_000)]))
    for broken in (data[: len(data) // 2], data[:-9], data[:10] + bytes(100) + data[110:], b"none of these"):
        with pytest.raises(UserError, match="cut off or damaged"):
            rows(read_json_lines, broken, f"a.jsonl{suffix}")


def test_zips_of_several_files_are_refused() -> None:
    with pytest.raises(UserError, match="holds 2 files"):
        rows(read_json_lines, zipped({"a": b"", "b": b""}), "a.jsonl.zip")


@settings(max_examples=150, deadline=None)
@given(
    elements=st.lists(objects, max_size=6),
    indent=st.sampled_from([None, 1, 7]),
    chunk=st.integers(1, 40),
    ascii=st.booleans(),
    start=st.integers(0, 4),
)
def test_a_list_is_read_as_json_reads_it(elements: list, indent: int | None, chunk: int, ascii: bool, start: int) -> None:
    data = json.dumps(elements, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", chunk)
        assert rows(read_json_list, data, "a.json", start) == list(enumerate(elements))[start:]


def test_elements_that_are_no_objects_are_counted() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for chunk in range(1, 12):
            patch.setattr(streams, "CHUNK", chunk)
            found = rows(read_json_list, b' [123456, {"a":1}, "x", null , -1.5e3]\n ', "a.json")
            assert found == [(0, "json"), (1, {"a": 1}), (2, "json"), (3, "json"), (4, "json")]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"a": 1}\n{"a": 2}',
        b"[{}",
        b"[{},",
        b"[{} {}]",
        b"[{},]",
        b"[,{}]",
        b"[{}]]",
        b"[{}] x",
        b'[{"a": "\xff"}]',
        b'[{"a": tru}]',
        b"[" * 100_000,
    ],
)
def test_a_broken_list_ends_the_build(data: bytes) -> None:
    with pytest.raises(ValueError):
        json.loads(data) if data != b"{}" and not data.startswith(b"[[") else json.loads(b"")
    with pytest.raises(UserError, match="not a JSON list at element"):
        rows(read_json_list, data, "a.json")


def test_an_element_over_the_limit_ends_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 1 << 16)
    data = gzip.compress(b'[{}, {"a": "' + b"x" * (1 << 25) + b'"}]')
    tracemalloc.start()
    with pytest.raises(UserError, match="element 1"):
        rows(read_json_list, data, "a.json.gz")
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def test_a_long_list_takes_no_more_memory_than_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 10_000}] * 3000))
    with path.open("rb") as file:
        tracemalloc.start()
        assert sum(1 for _ in read_json_list(file)) == 3000
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()
