from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from building import COMPRESS, faults, lines, picture, read_split, spec_over, told

from mmpt.recipes.build import build_spec
from mmpt.types import UserError

BUS, CAT = picture(1, "JPEG"), picture(2)


def row(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"id": "000000033471", **more, "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


ROWS = [
    row(
        ("human", "<image>\nWhat are the colors of the bus?"),
        ("gpt", "White and red."),
        ("human", "And behind it?\nLook closely."),
        ("gpt", "A cat."),
        image="coco/bus.jpg",
    ),
    row(("human", "What is this?\n<image>"), ("gpt", "A bus."), image="coco/bus.jpg"),
    row(
        ("system", "Be brief."),
        ("human", "<image>\n<image>\nWhich is the cat?"),
        ("gpt", "The second."),
        images=["coco/bus.jpg", "cat.png"],
    ),
    row(("human", "First <image> then <image>?"), ("gpt", "Yes."), image=["cat.png", "coco/bus.jpg"]),
    row(("human", "No placeholder."), ("gpt", "Still seen."), image="cat.png"),
    row(("human", "\nOnly text.\n"), ("gpt", "Right.")),
]
EXPECTED = [
    [BUS, "What are the colors of the bus?", "White and red.", "And behind it?\nLook closely.", "A cat."],
    ["What is this?", BUS, "A bus."],
    ["Be brief.", BUS, CAT, "Which is the cat?", "The second."],
    ["First ", CAT, " then ", BUS, "?", "Yes."],
    [CAT, "No placeholder.", "Still seen."],
    ["\nOnly text.\n", "Right."],
]
ANSWERS = {"White and red.", "A cat.", "A bus.", "The second.", "Yes.", "Still seen.", "Right."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "coco").mkdir(parents=True)
    (tmp_path / "images" / "coco" / "bus.jpg").write_bytes(BUS)
    (tmp_path / "images" / "cat.png").write_bytes(CAT)
    return tmp_path


def built(folder: Path, name: str, data: bytes, **more: Any) -> list[tuple[str, dict, dict]]:
    (folder / name).write_bytes(data)
    spec = build_spec(spec_over(folder, "llava", name, shards={"media": "images"}, **more), folder / "out")
    return read_split(spec, "train")


@pytest.mark.parametrize("name", ["llava_instruct_150k.json", "a.json.gz", "a.jsonl", "a.jsonl.zst"])
def test_conversations_in_order(folder: Path, name: str) -> None:
    data = lines(ROWS) if ".jsonl" in name else json.dumps(ROWS, indent=2).encode()
    samples = built(folder, name, COMPRESS[Path(name).suffix if "gz" in name or "zst" in name else ""](data))
    assert [told(sample) for sample in samples] == EXPECTED
    texts = [part for _, document, _ in samples for part in document["parts"] if part["type"] == "text"]
    assert {part["text"] for part in texts if part["predict"]} == ANSWERS
    assert samples[0][1]["meta"] == {"id": "000000033471"}


def test_rows_that_do_not_fit_their_pictures(folder: Path) -> None:
    (folder / "secret.png").write_bytes(CAT)
    bad = [
        row(("human", "<image> and <image>"), ("gpt", "x"), image="cat.png"),
        row(("human", "<image>"), ("gpt", "x"), images=["cat.png", "cat.png"]),
        row(("human", "<image>"), ("gpt", "x")),
        row(("human", "<image>"), ("gpt", "x"), image="gone.png"),
        row(("human", "<image>"), ("gpt", "x"), image="../secret.png"),
        row(("human", "<image>"), ("gpt", "x"), image=str(folder / "secret.png")),
        row(("human", "<image>"), ("gpt", "x"), image={"path": "cat.png"}),
        row(("robot", "x")),
        row(),
        {"id": "1", "conversations": ["x"]},
        {"id": "1", "conversations": [{"from": "human", "value": None}]},
        {"id": "1", "conversations": [{"from": ["human"], "value": "x"}]},
        {"id": "1"},
    ]
    samples = built(folder, "a.json", json.dumps([*bad, ROWS[0]]).encode(), on_bad={"max_fraction": 0.95})
    assert [told(sample) for sample in samples] == EXPECTED[:1]
    assert [fault["reason"] for fault in faults(folder / "out")] == [*["json"] * 3, *["missing"] * 4, *["json"] * 6]


def test_a_file_that_is_no_list(folder: Path) -> None:
    with pytest.raises(UserError, match=r"one object a line is named \.jsonl"):
        built(folder, "a.json", lines(ROWS))
    with pytest.raises(UserError, match=r"read from \.json and \.jsonl"):
        build_spec(spec_over(folder, "llava", "images/cat.png"), folder / "other")
