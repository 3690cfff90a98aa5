"""MMC4 to interleaved documents: a web page's sentences, each picture beside the sentence that it was matched to.

    docs_no_face_shard_N_v2.jsonl[.zip|.gz|.zst], a page a line:
        {"text_list": [...], "image_info": [{"image_name", "matched_text_index", "matched_sim", ...}, ...],
         "similarity_matrix": [[...], ...], "url", "could_have_url_duplicate"}

The pictures were published as addresses: `image_name` is looked up in the media folder, where MMC4's own download script puts
it, unless the row has the bytes, as `image_base64`. Several pictures at a sentence stand in their order. A picture that was not
to be had, as many of the web's are, is left out and counted; its page stays.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import defaultdict
from typing import Any, BinaryIO

from mmpt.data.faults import BadMedia
from mmpt.data.spec import DataSpec
from mmpt.recipes.draft import Draft, MediaFolder
from mmpt.recipes.streams import Rows, read_json_lines

NOT_META = ("text_list", "image_info", "similarity_matrix")


class Mmc4Reader:
    """Reads format `mmc4`."""

    def __init__(self, spec: DataSpec) -> None:
        self.before = spec.placement == "before"
        self.media = MediaFolder(spec)

    def rows(self, file: BinaryIO, start: int) -> Rows:
        return read_json_lines(file, start)

    def draft(self, key: str, row: dict[str, Any]) -> Draft:
        texts = _list(row, "text_list")
        pictures = defaultdict(list)
        for number, info in enumerate(_list(row, "image_info")):
            pictures[_matched(info, number, len(texts))].append(info)
        draft, similarities = Draft(), []
        for index, text in enumerate(texts):
            if not self.before:
                draft.add_text(text)
            similarities += [_similarity(info) for info in pictures[index] if self._add(draft, info)]
            if self.before:
                draft.add_text(text)
        draft.add_meta(row, without=NOT_META)
        if similarities:
            draft.meta["scores"] = {"matched_sim": similarities}  # of the pictures that are there, in their order
        return draft

    def _add(self, draft: Draft, info: dict[str, Any]) -> bool:
        """Whether the picture was to be had."""
        try:
            encoded = info.get("image_base64")
            draft.add_image(self.media.read(info.get("image_name")) if encoded is None else _decode(encoded))
        except BadMedia as fault:
            draft.left_out.append(fault)
            return False
        return True


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise BadMedia("json", f"{name} is a {type(value).__name__}; a list is wanted")
    return value


def _matched(info: Any, number: int, texts: int) -> int:
    index = info.get("matched_text_index") if isinstance(info, dict) else None
    if type(index) is not int or not 0 <= index < texts:
        raise BadMedia("json", f"image_info[{number}].matched_text_index = {ascii(index)[:40]}: there are {texts} texts")
    return index


def _similarity(info: dict[str, Any]) -> float | None:
    value = info.get("matched_sim")
    return value if isinstance(value, float) and math.isfinite(value) else None


def _decode(encoded: Any) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)  # no larger than its row, which is bounded
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadMedia("decode", f"image_base64 is not base64: {error}") from error
