from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from building import COMPRESS, faults, lines, read_split, spec_over, told

from mmpt.recipes import streams
from mmpt.recipes.build import build_spec
from mmpt.types import UserError

ROWS = [
    {
        "text": "Straße, 東京\n\nsecond paragraph\r\n",
        "url": "https://a/1",
        "lang": "de",
        "license": "CC0-1.0",
        "score": 0.5,
        "ok": True,
    },
    {
        "text": " leading and trailing blanks ",
        "url": "https://a/2",
        "lang": None,
        "license": "CC0-1.0",
        "score": 1.5,
        "ok": False,
    },
    {"text": "🙂" * 500, "url": "x" * 5000, "lang": "emoji", "license": "", "score": float("inf"), "ok": True},
]
META = [
    {"url": "https://a/1", "lang": "de", "license": "CC0-1.0", "score": 0.5, "ok": True},
    {"url": "https://a/2", "license": "CC0-1.0", "score": 1.5, "ok": False},
    {"lang": "emoji", "license": "", "ok": True},  # neither an address of 5,000 characters nor infinity
]


def built(tmp_path: Path, pattern: str, **more: Any) -> list[tuple[str, dict, dict]]:
    spec = build_spec(spec_over(tmp_path, "text", pattern, **more), tmp_path / "out")
    return read_split(spec, "train")


@pytest.mark.parametrize("name", [*(f"a.jsonl{suffix}" for suffix in COMPRESS), "c4-train.00000-of-01024.json.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix if name != "a.jsonl" else ""](lines(ROWS)))
    samples = built(tmp_path, name)
    assert [told(sample) for sample in samples] == [[row["text"]] for row in ROWS]
    assert [document["parts"][0]["predict"] for _, document, _ in samples] == [True] * 3
    assert [document["meta"] for _, document, _ in samples] == META


@pytest.mark.parametrize("rows_per_group", [1, 2, 3])
def test_parquet(tmp_path: Path, rows_per_group: int) -> None:
    rows = [{**row, "embedding": [0.1, 0.2]} for row in ROWS]  # a column that is not for a document's meta
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=rows_per_group)
    samples = built(tmp_path, "a.parquet")
    assert [told(sample) for sample in samples] == [[row["text"]] for row in ROWS]
    assert [document["meta"] for _, document, _ in samples] == META


def test_every_plain_file_is_a_document(tmp_path: Path) -> None:
    texts = ["first\n\nstill first\n", "\ufeffsecond, after a byte order mark", "third"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    assert [told(sample) for sample in built(tmp_path, "{0..2}.txt")] == [[texts[0]], [texts[1][1:]], [texts[2]]]


def test_the_first_field_that_a_row_has_counts(tmp_path: Path) -> None:
    rows = [{"content": "a", "text": "not this"}, {"content": None, "text": "b"}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    samples = built(tmp_path, "a.jsonl", map={"text": "content;text"})
    assert [told(sample) for sample in samples] == [["a"], ["b"], ["c"]]
    assert not any(document["meta"] for _, document, _ in samples)


def test_bad_rows_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 1000)
    rows: list[Any] = [
        {"text": "good"},
        {"text": ["no", "text"]},
        {"body": "x"},
        {"text": ""},
        {"text": "half \ud83d"},
        ["text"],
        {"text": "fine"},
    ]
    (tmp_path / "a.jsonl").write_bytes(
        lines(rows) + b'{"text": \n{"text": "' + b"x" * 1000 + b'"}\n{"text": "\xe9"}\n{"text": "last"}'
    )
    samples = built(tmp_path, "a.jsonl", on_bad={"max_fraction": 0.8})
    assert [told(sample) for sample in samples] == [["good"], ["fine"], ["last"]]
    assert [(fault["row"], fault["reason"]) for fault in faults(tmp_path / "out")] == [
        (1, "text"), (2, "missing"), (3, "text"), (4, "text"), (5, "json"), (7, "json"), (8, "limit"), (9, "text"),
    ]  # fmt: skip


def test_plain_files_that_are_no_text_or_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpt.recipes.text.MAX_ROW_BYTES", 100)
    for number, data in enumerate((b"good", b"\xff\xfe", b"x" * 101, b"y" * 100)):
        (tmp_path / f"{number}.txt").write_bytes(data)
    samples = built(tmp_path, "{0..3}.txt", on_bad={"max_fraction": 1.0})
    assert [told(sample) for sample in samples] == [["good"], ["y" * 100]]
    assert [(fault["file"], fault["reason"]) for fault in faults(tmp_path / "out")] == [("1.txt", "text"), ("2.txt", "limit")]


def test_a_column_that_is_not_there_and_a_file_of_another_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"map\.text = 'text': no such column; there are \['content'\]"):
        built(tmp_path, "a.parquet")
    (tmp_path / "a.doc").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.doc: texts are read from"):
        build_spec(spec_over(tmp_path, "text", "a.doc"), tmp_path / "other")
