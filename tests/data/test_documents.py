from __future__ import annotations

import io
import json
import zlib
from typing import Any

import PIL.Image
import pytest

from mmpt.data.documents import Entry, Interleaved, Pairs, check_entries
from mmpt.data.faults import BadMedia
from mmpt.data.spec import DataSpec
from mmpt.types import AUDIO, IMAGE, TEXT, VIDEO


def png(width: int = 3, height: int = 2) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
FILES = {"000.png": PNG, "001.wav": b"wav", "002.mp4": b"mp4"}
VIDEO_PART = {"type": "video", "file": "002.mp4", "wh": [64, 36], "fps": 30, "frames": 60, "clip": [1, 3.5]}


def record(**changes: Any) -> dict[str, Any]:
    image = {"type": "image", "file": "000.png", "wh": [3, 2], "crc32": zlib.crc32(PNG)}
    return {"v": 1, "id": "a", "parts": [image | changes, {"type": "text", "text": "red"}], "meta": {"license": "CC0-1.0"}}


def files(document: Any, **more: bytes) -> dict[str, bytes]:
    return {"json": json.dumps(document).encode(), **FILES, **more}


def entries(document: Any, **more: bytes) -> list[Entry]:
    given = files(document, **more)
    found = Interleaved().entries(given)
    check_entries(found, given)
    return found


def test_four_modalities_in_order():
    sound = {"type": "audio", "file": "001.wav", "sample_rate": 8000, "samples": 16000}
    parts = [{"type": "text", "text": "a", "predict": False}, *record()["parts"], sound, VIDEO_PART | {"audio": True}]
    assert entries({"v": 1, "parts": parts}) == [
        Entry(kind=TEXT, text="a", predict=False),
        Entry(kind=IMAGE, file="000.png", width=3, height=2, crc32=zlib.crc32(PNG)),
        Entry(kind=TEXT, text="red", predict=True),
        Entry(kind=AUDIO, file="001.wav", rate=8000, samples=16000, stop=2.0),
        Entry(kind=VIDEO, file="002.mp4", width=64, height=36, start=1.0, stop=3.5),
        Entry(kind=AUDIO, file="002.mp4", rate=16000, samples=40000, start=1.0, stop=3.5),
    ]


def test_a_clip_without_its_sound_is_one_part():
    assert [entry.kind for entry in entries({"v": 1, "parts": [VIDEO_PART]})] == [VIDEO]


def test_texts_and_meta_are_those_of_the_json():
    given = files(record())
    assert Interleaved().content(given) == (["red"], {"license": "CC0-1.0"})


FAULTS = [
    ([], "json", "holds a list"),
    ({"v": 2, "parts": []}, "json", "v = 2: this reads version 1"),
    ({"v": 1}, "json", "document.parts = None: list expected"),
    ({"v": 1, "parts": []}, "json", "parts has 0 entries"),
    ({"v": 1, "parts": ["text"]}, "json", r"parts\[0\] is a str"),
    ({"v": 1, "parts": [{"type": "smell"}]}, "json", r"parts\[0\].type = 'smell': known are 'text', 'image'"),
    ({"v": 1, "parts": [{"type": "text", "text": 3}]}, "json", r"parts\[0\].text = 3: str expected"),
    ({"v": 1, "parts": [{"type": "text", "text": "a\ud800"}]}, "text", r"parts\[0\].text: '.*' at character 1 is no character"),
    ({"v": 1, "parts": [{"type": "text", "text": "a", "predict": 1}]}, "json", r"parts\[0\].predict = 1: bool expected"),
    (record(wh=[3]), "json", r"parts\[0\].wh = \[3\]: \[width, height\]"),
    (record(wh=[3, 0]), "json", r"parts\[0\].wh = \[3, 0\]"),
    (record(wh=[3.0, 2]), "json", r"parts\[0\].wh = \[3.0, 2\]"),
    (record(wh=[100_000, 100_000]), "limit", "more than the"),
    (record(wh=[2, 3]), "size", r"wh = \[2, 3\], but it is 3 x 2"),
    (record(crc32=True), "json", r"parts\[0\].crc32 = True: int expected"),
    (record(crc32=1), "crc", r"parts\[0\] \(000.png\).crc32 = 1, but its bytes have"),
    (record(file="001.png"), "missing", r"parts\[0\].file = '001.png': no such member"),
    ({"v": 1, "parts": [VIDEO_PART | {"clip": [3, 1]}]}, "limit", "0 <= start < stop"),
    ({"v": 1, "parts": [VIDEO_PART | {"clip": [0, float("nan")]}]}, "limit", "0 <= start < stop"),
    ({"v": 1, "parts": [VIDEO_PART | {"clip": "all"}]}, "json", r"\[start, stop\] in seconds expected"),
    ({"v": 1, "parts": [{"type": "audio", "file": "001.wav", "sample_rate": 0, "samples": 1}]}, "json", "sample_rate = 0"),
    ({"v": 1, "parts": [{"type": "audio", "file": "001.wav", "sample_rate": 1, "samples": 2**30}]}, "limit", "longer than"),
]


@pytest.mark.parametrize(("document", "reason", "detail"), FAULTS)
def test_faults_have_a_reason_and_are_named(document: Any, reason: str, detail: str):
    with pytest.raises(BadMedia, match=detail) as caught:
        entries(document)
    assert caught.value.reason == reason


def test_bytes_that_are_no_picture_are_named():
    data = b"not a picture"
    with pytest.raises(BadMedia) as caught:
        entries(record(crc32=zlib.crc32(data)), **{"000.png": data})
    assert caught.value.reason == "decode"


@pytest.mark.parametrize(
    ("given", "reason"),
    [({}, "missing"), ({"json": b"{"}, "json"), ({"json": b"\xff"}, "json"), ({"json": b"[" * 100_000}, "json")],
)  # fmt: skip
def test_a_sample_without_readable_json_is_refused(given: dict[str, bytes], reason: str):
    with pytest.raises(BadMedia) as caught:
        Interleaved().entries(given)
    assert caught.value.reason == reason


def pairs(**changed: str) -> Pairs:
    tree = {
        "version": 1,
        "name": "laion",
        "format": "pairs",
        "shards": {"root": ".", "pattern": "a.tar"},
        "split": {"train": ":"},
    }
    return Pairs(DataSpec.model_validate(tree | {"map": changed}))


META = {
    "url": "u",
    "caption": "ein Café",
    "key": "000000017",
    "status": "success",
    "error_message": None,
    "width": 3,
    "height": 2,
    "original_width": 3,
    "original_height": 2,
    "exif": "{}",
    "sha256": "0",
}
IMG2DATASET = {"jpg": PNG, "txt": "ein Café\n".encode(), "json": json.dumps(META).encode()}


def test_img2dataset_samples_are_a_picture_and_its_text():
    assert pairs().entries(IMG2DATASET) == [
        Entry(kind=IMAGE, file="jpg", width=3, height=2),
        Entry(kind=TEXT, file="txt", text="ein Café", predict=True),
    ]
    assert pairs().content(IMG2DATASET) == (["ein Café"], META)
    assert pairs().content({"jpg": PNG, "txt": b"a"}) == (["a"], {})


def test_the_map_says_which_members_are_meant():
    given = {"thumb.png": PNG, "caption": b"a"}
    assert [entry.file for entry in pairs(image="full.png;thumb.png", text="caption").entries(given)] == ["thumb.png", "caption"]


@pytest.mark.parametrize(
    ("given", "reason"), [({"jpg": PNG}, "missing"), ({"txt": b"a"}, "missing"), ({"jpg": PNG, "txt": b"\xff"}, "text")]
)
def test_a_pair_that_is_none_has_a_reason(given: dict[str, bytes], reason: str):
    with pytest.raises(BadMedia) as caught:
        pairs().entries(given)
    assert caught.value.reason == reason
