"""LLaVA's conversations to interleaved documents.

    x.json (one list) or x.jsonl, also .gz, .zst, .zip:
        {"id": ..., "image": "coco/train2017/000000033471.jpg" or a list of such, or "images": [...],
         "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bus."}, ...]}

Pictures come from the media folder and stand where their `<image>` does; without any placeholder they come first. The line
break between a placeholder and its text belongs to the notation and is dropped. What gpt says is learned, what the human and
the system say is read only. A row whose placeholders and pictures differ in number, or whose picture is not there, is a fault:
the answer would be about nothing.
"""

from __future__ import annotations

from typing import Any, BinaryIO

from mmpt.data.faults import BadMedia
from mmpt.data.spec import DataSpec
from mmpt.recipes.draft import Draft, MediaFolder
from mmpt.recipes.streams import Rows, kind_of, read_json_lines, read_json_list
from mmpt.types import UserError

PLACEHOLDER = "<image>"
PREDICTED = {"human": False, "user": False, "system": False, "gpt": True, "assistant": True}


class LlavaReader:
    """Reads format `llava`."""

    def __init__(self, spec: DataSpec) -> None:
        self.media = MediaFolder(spec)

    def rows(self, file: BinaryIO, start: int) -> Rows:
        kind = kind_of(file)
        if kind not in (".json", ".jsonl"):
            raise UserError(f"{file.name}: conversations are read from .json and .jsonl, also .gz, .zst, .zip")
        return read_json_list(file, start) if kind == ".json" else read_json_lines(file, start)

    def draft(self, key: str, row: dict[str, Any]) -> Draft:
        names, turns = _names(row), _turns(row)
        placeholders = sum(text.count(PLACEHOLDER) for text, _ in turns)
        if placeholders not in (0, len(names)):
            raise BadMedia("json", f"{placeholders} placeholders for {len(names)} pictures")
        draft, pictures = Draft(), iter(names)
        if not placeholders:
            for name in names:
                draft.add_image(self.media.read(name))
        for text, predict in turns:
            for number, piece in enumerate(text.split(PLACEHOLDER)):
                if number:
                    draft.add_image(self.media.read(next(pictures)))
                if piece := piece.strip("\n") if PLACEHOLDER in text else piece:
                    draft.add_text(piece, predict)
        draft.add_meta(row, without=("image", "images"))
        return draft


def _names(row: dict[str, Any]) -> list[Any]:
    value = next((row[field] for field in ("image", "images") if row.get(field) is not None), [])
    return value if isinstance(value, list) else [value]


def _turns(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """The text of every turn, and whether it is learned."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadMedia("json", "conversations is no list of turns")
    found = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadMedia("json", f"conversations[{number}] has no value that is a text")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in PREDICTED:
            raise BadMedia("json", f"conversations[{number}].from = {ascii(speaker)[:40]}: known are {', '.join(PREDICTED)}")
        found.append((turn["value"], PREDICTED[speaker]))
    return found
