from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from building import COMPRESS, faults, picture, read_split, spec_over, told

from mmpt.recipes.build import build_spec
from mmpt.types import UserError

PICTURES = {f"{number}.png": picture(number) for number in range(5)}
TITLES = ["a red kite", 'it says "stop"', "two\nlines, and a comma", "tab\there", "日本"]
HEADER = ["filepath", "title"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, data in PICTURES.items():
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path


def table(rows: list[list[str]], delimiter: str) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    return buffer.getvalue().encode()


def built(folder: Path, data: bytes, name: str = "a.csv", **more: Any) -> list[tuple[str, dict, dict]]:
    (folder / name).write_bytes(data)
    spec = build_spec(spec_over(folder, "csv", name, shards={"media": "images"}, **more), folder / "out")
    return read_split(spec, "train")


PAIRS = [[name, title] for name, title in zip(PICTURES, TITLES, strict=True)]


@pytest.mark.parametrize("delimiter", ["\t", ","])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_pairs_in_order(folder: Path, delimiter: str, name: str) -> None:
    data = COMPRESS[".gz" if name.endswith(".gz") else ""](table([HEADER, *PAIRS], delimiter))
    samples = built(folder, data, name)
    assert [told(sample) for sample in samples] == [[PICTURES[name], title] for name, title in PAIRS]


def test_other_columns_and_names(folder: Path) -> None:
    rows = [["license", "caption", "path"], *([f"l{name}", title, name] for name, title in PAIRS)]
    samples = built(folder, b"\xef\xbb\xbf" + table(rows, ","), map={"image": "filepath;path", "text": "caption"})
    assert [told(sample) for sample in samples] == [[PICTURES[name], title] for name, title in PAIRS]
    assert [document["meta"] for _, document, _ in samples] == [{"license": f"l{name}"} for name in PICTURES]


def test_templates_are_drawn_by_their_probabilities_and_always_the_same(folder: Path) -> None:
    templates = [{"order": ["image", "text"], "p": 0.25}, {"order": ["text", "image"], "p": 0.75}]
    data = table([HEADER, *(["0.png", f"row {number}"] for number in range(400))], "\t")
    first = [document["parts"][0]["type"] for _, document, _ in built(folder, data, templates=templates)]
    assert 60 <= first.count("image") <= 140  # 100 expected, with a standard deviation of 8.7
    assert 20 < first[:200].count("image") < 80
    spec = build_spec(spec_over(folder, "csv", "a.csv", shards={"media": "images"}, templates=templates), folder / "again")
    assert [document["parts"][0]["type"] for _, document, _ in read_split(spec, "train")] == first


def test_bad_rows_are_counted(folder: Path) -> None:
    (folder / "secret.png").write_bytes(PICTURES["0.png"])
    rows = [
        ["0.png", "good"],
        ["gone.png", "x"],
        ["../secret.png", "x"],
        [str(folder / "secret.png"), "x"],
        ["0.png"],
        ["0.png", "x", "y"],
        ["", "x"],
    ]
    data = table([HEADER, *rows], "\t") + b"\n0.png\t\xff\n0.png\t" + b"x" * 140_000 + b"\n1.png\tlast\n"
    samples = built(folder, data, on_bad={"max_fraction": 0.9})
    assert [told(sample) for sample in samples] == [[PICTURES["0.png"], "good"], [PICTURES["1.png"], "last"]]
    assert [(fault["row"], fault["reason"]) for fault in faults(folder / "out")] == [
        (1, "missing"), (2, "missing"), (3, "missing"), (4, "json"), (5, "json"), (6, "missing"), (8, "text"), (9, "limit"),
    ]  # fmt: skip


def test_a_quote_that_never_closes_does_not_swallow_the_file_into_memory(folder: Path) -> None:
    data = table([HEADER, ["0.png", "good"]], "\t") + b'1.png\t"open\n' + (b"2.png\t" + b"x" * 1000 + b"\n") * 200
    samples = built(folder, data, on_bad={"max_fraction": 0.5})
    assert told(samples[0]) == [PICTURES["0.png"], "good"]
    assert [(fault["row"], fault["reason"]) for fault in faults(folder / "out")] == [(1, "limit")]
    assert {tuple(told(sample)) for sample in samples[1:]} == {(PICTURES["2.png"], "x" * 1000)}  # read on from where csv gave up


@pytest.mark.parametrize("data", [b"", b"0.png,a red kite\n", b"filepath;title\n", b"\xff\n"])
def test_a_header_without_the_columns(folder: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.csv: "):
        built(folder, data)
