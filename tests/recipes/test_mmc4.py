from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from building import COMPRESS, faults, lines, picture, read_split, spec_over, told

from mmpt.recipes.build import build_spec
from mmpt.types import UserError

PICTURES = {"b9040a0dbb22.jpg": picture(1, "JPEG"), "aa.png": picture(2), "sub/cc.webp": picture(3, "WEBP")}


def info(name: str, text: int, similarity: Any = 0.25) -> dict[str, Any]:
    """An entry of image_info as MMC4 publishes it."""
    return {
        "face_detections": None,
        "image_name": name,
        "matched_sim": similarity,
        "matched_text_index": text,
        "raw_url": f"https://example.org/{name}",
    }


def page(texts: list[str], images: list[Any]) -> dict[str, Any]:
    return {
        "image_info": images,
        "similarity_matrix": [[0.1] * len(texts)] * len(images),
        "text_list": texts,
        "url": "https://example.org/page",
        "could_have_url_duplicate": 0,
    }


PAGE = page(["one.", "two.", "three."], [info("aa.png", 2, 0.5), info("b9040a0dbb22.jpg", 0, 0.75), info("sub/cc.webp", 2, 0.25)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in PICTURES.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def built(folder: Path, rows: list[Any], suffix: str = "", **more: Any) -> list[tuple[str, dict, dict]]:
    name = f"docs_no_face_shard_0_v2.jsonl{suffix}"
    (folder / name).write_bytes(COMPRESS[suffix](lines(rows)))
    spec = build_spec(spec_over(folder, "mmc4", name, shards={"media": "images"}, **more), folder / "out")
    return read_split(spec, "train")


@pytest.mark.parametrize("suffix", ["", ".zip"])  # .zip: as published
def test_pictures_stand_before_their_sentences(folder: Path, suffix: str) -> None:
    (sample,) = built(folder, [PAGE], suffix)
    jpeg, png, webp = PICTURES.values()
    assert told(sample) == [jpeg, "one.", "two.", png, webp, "three."]
    assert list(sample[2]) == ["000.jpg", "003.png", "004.webp"]
    assert sample[1]["meta"] == {
        "url": "https://example.org/page",
        "could_have_url_duplicate": 0,
        "scores": {"matched_sim": [0.75, 0.5, 0.25]},
    }


def test_or_after_them(folder: Path) -> None:
    (sample,) = built(folder, [PAGE], placement="after")
    jpeg, png, webp = PICTURES.values()
    assert told(sample) == ["one.", jpeg, "two.", "three.", png, webp]


def test_pictures_in_the_row_itself(folder: Path) -> None:
    data = picture(9)
    row = page(["one."], [{**info("nowhere.png", 0), "image_base64": base64.b64encode(data).decode()}])
    assert [told(sample) for sample in built(folder, [row])] == [[data, "one."]]


def test_a_picture_that_cannot_be_had_is_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "text.png").write_bytes(b"<html>404</html>")
    (folder / "outside.png").write_bytes(PICTURES["aa.png"])
    (folder / "images" / "link.png").symlink_to(folder / "outside.png")
    (folder / "images" / "inside.png").symlink_to("aa.png")
    os.mkfifo(folder / "images" / "pipe.png")
    (folder / "images" / "folder.png").mkdir()
    hostile = [
        "gone.png",
        "text.png",
        "../outside.png",
        str(folder / "outside.png"),
        "link.png",
        "pipe.png",
        "folder.png",
        "x\0y",
        "n" * 5000,
        "\ud800",
        "",
    ]
    good = [info("inside.png", 0, float("nan"))]
    (sample,) = built(
        folder, [page(["one."], [info(name, 0) for name in hostile] + good + [{**info("", 0), "image_base64": "%"}])]
    )
    assert told(sample) == [PICTURES["aa.png"], "one."]
    assert sample[1]["meta"]["scores"] == {"matched_sim": [None]}
    found = faults(folder / "out")
    assert [fault["reason"] for fault in found] == ["missing", "decode", *["missing"] * 9, "decode"]
    assert all(fault["left_out"] == "picture" and fault["row"] == 0 for fault in found)
    for fault, name in zip(found, hostile, strict=False):
        if name not in ("text.png", ""):
            assert ascii(name)[1:40] in fault["detail"]


def test_rows_that_are_no_pages(folder: Path) -> None:
    bad: list[Any] = [
        {"image_info": []},
        {"text_list": ["a"], "image_info": None},
        page(["a"], [info("aa.png", 1)]),
        page(["a"], [info("aa.png", -1)]),
        page(["a"], [{**info("aa.png", 0), "matched_text_index": True}]),
        page(["a"], ["aa.png"]),
        page([], []),
        page([{"text": "a"}], []),  # type: ignore[list-item]
    ]
    samples = built(folder, [*bad, page(["fine"], [])], on_bad={"max_fraction": 0.9})
    assert [told(sample) for sample in samples] == [["fine"]]
    assert [fault["reason"] for fault in faults(folder / "out")] == [*["json"] * 6, "missing", "text"]


def test_one_large_picture_named_again_and_again_does_not_fill_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(PICTURES["aa.png"])
    monkeypatch.setattr("mmpt.recipes.draft.MAX_DOCUMENT_BYTES", 10 * size + 4)
    (sample,) = built(folder, [page(["text"], [info("aa.png", 0)] * 50)])
    assert len(sample[2]) == 10
    assert [fault["reason"] for fault in faults(folder / "out")] == ["limit"] * 40


@pytest.mark.parametrize("media", ["nowhere", "link"])
def test_a_media_folder_that_is_not_below_root_is_refused(
    folder: Path, media: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (folder / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    (folder / "a.jsonl").write_bytes(lines([PAGE]))
    with pytest.raises(UserError, match=rf"shards\.media = '{media}': no folder below"):
        build_spec(spec_over(folder, "mmc4", "a.jsonl", shards={"media": media}), folder / "out")
