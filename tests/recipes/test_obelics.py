from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from building import faults, picture, read_split, spec_over, told

from mmpt.recipes.build import build_spec
from mmpt.types import UserError

URLS = ["https://a.example/x/image1.jpg?size=2", "https://b.example/image1.jpg"]
DATA = [picture(1, "JPEG"), picture(2)]
TEXTS = ["The Urus has", "a carbon kit."]


def built(folder: Path, table: pa.Table, **more: Any) -> list[tuple[str, dict, dict]]:
    (folder / "images").mkdir(exist_ok=True)
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=2)
    spec = spec_over(folder, "obelics", "train-00000-of-00001.parquet", shards={"media": "images"}, **more)
    return read_split(build_spec(spec, folder / "out"), "train")


def obelics(rows: list[tuple[list, list]]) -> pa.Table:
    """The four columns of OBELICS: two lists, two strings of JSON."""
    entries = [
        [{"document_url": "https://page", "alt_text": "x"} if image else None for image in images or []] for images, _ in rows
    ]
    general = {"url": "https://page", "warc_filename": "crawl.warc.gz", "warc_record_offset": 12, "languages": ["en"]}
    return pa.table(
        {
            "images": pa.array([images for images, _ in rows], pa.list_(pa.string())),
            "metadata": pa.array([json.dumps(entry) for entry in entries]),
            "general_metadata": pa.array([json.dumps(general)] * len(rows)),
            "texts": pa.array([texts for _, texts in rows], pa.list_(pa.string())),
        }
    )


INTERLEAVED = ([URLS[0], None, None, URLS[1]], [None, TEXTS[0], TEXTS[1], None])


def test_obelics_pictures_lie_under_the_hash_of_their_address(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for url, data, suffix in zip(URLS, DATA, (".jpg", ".png"), strict=True):
        (tmp_path / "images" / (hashlib.sha256(url.encode()).hexdigest() + suffix)).write_bytes(data)
    (tmp_path / "images" / "image1.jpg").write_bytes(picture(9))  # the last word of either address, and neither's picture
    (sample,) = built(tmp_path, obelics([INTERLEAVED]))
    assert told(sample) == [DATA[0], *TEXTS, DATA[1]]
    assert list(sample[2]) == ["000.jpg", "003.png"]
    assert sample[1]["meta"] == {"url": "https://page", "warc_filename": "crawl.warc.gz", "warc_record_offset": 12}


@pytest.mark.parametrize("parallel", [True, False], ids=["an entry a slot", "an entry a picture"])
def test_omnicorpus_names_pictures_in_its_metadata(tmp_path: Path, parallel: bool) -> None:
    (tmp_path / "images").mkdir()
    entries = []
    for number, data in enumerate(DATA):
        (tmp_path / "images" / f"sha{number}.jpg").write_bytes(data)
        entries.append(
            {"aesthetic_prob": 0.5, "bytes": len(data), "img_url_sha": f"sha{number}", "width": 11 + number, "height": 20}
        )
    table = pa.table(
        {
            "general_metadata": [{"domain": ["b", "example"], "fluency_prob": 0.9, "id": "7", "url": "https://page"}],
            "images": pa.array([INTERLEAVED[0]], pa.list_(pa.string())),
            "texts": pa.array([INTERLEAVED[1]], pa.list_(pa.string())),
            "metadata": [[entries[0], None, None, entries[1]] if parallel else entries],
        }
    )
    (sample,) = built(tmp_path, table)
    assert told(sample) == [DATA[0], *TEXTS, DATA[1]]
    assert sample[1]["meta"] == {"fluency_prob": 0.9, "id": "7", "url": "https://page"}


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_pictures_embedded_in_the_row(tmp_path: Path, kind: str) -> None:
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    whole = (
        [{"bytes": DATA[0], "path": "0.jpg"}, None, None, {"bytes": DATA[1], "path": None}]
        if kind == "struct"
        else [DATA[0], None, None, DATA[1]]
    )
    images = pa.array([whole] * 5, pa.list_(struct if kind == "struct" else pa.binary()))
    table = pa.table(
        {"images": images, "texts": pa.array([INTERLEAVED[1]] * 5, pa.list_(pa.string())), "license": ["CC0-1.0"] * 5}
    )
    samples = built(tmp_path, table)
    assert [told(sample) for sample in samples] == [[DATA[0], *TEXTS, DATA[1]]] * 5
    assert samples[0][1]["meta"] == {"license": "CC0-1.0"}


def test_a_struct_may_name_a_file_below_the_media_folder_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(DATA[1])
    (tmp_path / "b.png").write_bytes(DATA[1])
    names = ["a.png", "../b.png", str(tmp_path / "b.png")]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([[{"bytes": None, "path": name} for name in names]], pa.list_(struct))
    (sample,) = built(tmp_path, pa.table({"images": images, "texts": pa.array([[None] * 3], pa.list_(pa.string()))}))
    assert told(sample) == [DATA[1]]
    assert [fault["reason"] for fault in faults(tmp_path / "out")] == ["missing", "missing"]


def test_a_picture_that_was_not_to_be_had_is_left_out(tmp_path: Path) -> None:
    hostile = ([URLS[0], None, "../../etc/passwd"], [None, "text", None])
    samples = built(tmp_path, obelics([hostile, ([URLS[0]], [None]), INTERLEAVED]), on_bad={"max_fraction": 0.5})
    assert [told(sample) for sample in samples] == [["text"], TEXTS]
    assert [(fault["row"], fault["reason"], "left_out" in fault) for fault in faults(tmp_path / "out")] == [
        (0, "missing", True), (0, "missing", True), (1, "missing", False), (2, "missing", True), (2, "missing", True),
    ]  # fmt: skip


def test_slots_hold_one_thing(tmp_path: Path) -> None:
    rows = [(["u"], ["t"]), ([None], [None]), (["u", None], ["t"]), (None, ["t"]), ([], []), ([None], ["fine"])]
    samples = built(tmp_path, obelics(rows), on_bad={"max_fraction": 0.9})
    assert [told(sample) for sample in samples] == [["fine"]]
    found = faults(tmp_path / "out")
    assert [fault["reason"] for fault in found] == ["json", "json", "json", "json", "missing"]
    assert [fault["detail"] for fault in found[:2]] == ["slot 0 holds a picture and a text", "slot 0 holds nothing"]


def test_metadata_that_is_no_json_is_a_fault(tmp_path: Path) -> None:
    table = obelics([([None], ["a"]), ([None], ["b"]), ([None], ["c"])])
    table = table.set_column(1, "metadata", pa.array(["[", "{}", None])).set_column(
        2, "general_metadata", pa.array(["{}", "{}", None])
    )
    assert [told(sample) for sample in built(tmp_path, table, on_bad={"max_fraction": 0.7})] == [["c"]]
    assert [fault["reason"] for fault in faults(tmp_path / "out")] == ["json", "json"]


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'images'; there are"):
        built(tmp_path, pa.table({"texts": [["a"]]}))
