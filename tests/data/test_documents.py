from __future__ import annotations

import io
import json
import zlib
from typing import Any

import PIL.Image
import pytest

from mmpt.data.documents import parse, to_document
from mmpt.types import Document, Image, Sample, Text


def png(width: int = 3, height: int = 2) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def record(**changes: Any) -> dict[str, Any]:
    image = {"type": "image", "file": "000.png", "wh": [3, 2], "crc32": zlib.crc32(PNG)}
    return {"v": 1, "id": "a", "parts": [image | changes, {"type": "text", "text": "red"}], "meta": {"license": "CC0-1.0"}}


def read(document: Any, **files: bytes) -> Document:
    return to_document(
        Sample(key="a", shard="s.tar", fields={"json": json.dumps(document).encode(), "000.png": PNG, **files}), "src"
    )


def test_a_document_is_its_parts_in_order():
    assert read(record()) == Document(
        key="a",
        source="src",
        parts=(Image(data=PNG, width=3, height=2), Text(text="red", predict=True)),
        meta={"license": "CC0-1.0"},
    )


def test_predict_is_read():
    document = read({"v": 1, "parts": [{"type": "text", "text": "a", "predict": False}]})
    assert document.parts == (Text(text="a", predict=False),) and document.meta == {}


def test_parse_needs_no_payload():
    entries, meta = parse(json.dumps(record()).encode())
    assert entries[0].file == "000.png" and entries[1].text == "red" and meta == {"license": "CC0-1.0"}


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ([], "holds a list"),
        ({"v": 2, "parts": []}, "v = 2: this reads version 1"),
        ({"v": 1}, "document.parts = None: list expected"),
        ({"v": 1, "parts": []}, "parts is empty"),
        ({"v": 1, "parts": ["text"]}, r"parts\[0\] is a str"),
        ({"v": 1, "parts": [{"type": "audio"}]}, r"parts\[0\].type = 'audio': known are 'text' and 'image'"),
        ({"v": 1, "parts": [{"type": "text", "text": 3}]}, r"parts\[0\].text = 3: str expected"),
        ({"v": 1, "parts": [{"type": "text", "text": "a\ud800"}]}, r"parts\[0\].text: '.*' at character 1 is no character"),
        ({"v": 1, "parts": [{"type": "text", "text": "a", "predict": 1}]}, r"parts\[0\].predict = 1: bool expected"),
        ({"v": 1, "parts": [{"type": "text", "text": "a"}], "meta": []}, r"document.meta = \[\]: dict expected"),
        (record(wh=[3]), r"parts\[0\].wh = \[3\]: \[width, height\]"),
        (record(wh=[3, 0]), r"parts\[0\].wh = \[3, 0\]"),
        (record(wh=[3.0, 2]), r"parts\[0\].wh = \[3.0, 2\]"),
        (record(wh=[100_000, 100_000]), "more than the"),
        (record(wh=[2, 3]), r"parts\[0\].wh = \[2, 3\], but 000.png is 3 x 2"),
        (record(crc32=True), r"parts\[0\].crc32 = True: int expected"),
        (record(crc32=1), r"parts\[0\].crc32 = 1, but the bytes of 000.png have"),
        (record(file="001.png"), r"parts\[0\].file = '001.png': no such member"),
    ],
)
def test_faults_are_named(document: Any, fault: str):
    with pytest.raises(ValueError, match=fault):
        read(document)


def test_bytes_that_are_no_picture_are_named():
    data = b"not a picture"
    with pytest.raises(ValueError, match=r"parts\[0\] \(000.png\): no readable PNG"):
        read(record(crc32=zlib.crc32(data)), **{"000.png": data})


@pytest.mark.parametrize(
    ("fields", "fault"), [({}, "no JSON member"), ({"json": b"{"}, "is not JSON"), ({"json": b"\xff"}, "is not JSON")]
)
def test_a_sample_without_readable_json_is_refused(fields: dict[str, bytes], fault: str):
    with pytest.raises(ValueError, match=fault):
        to_document(Sample(key="a", shard="s.tar", fields=fields), "src")
