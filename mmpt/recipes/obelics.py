"""OBELICS and OmniCorpus to interleaved documents: parallel lists, of which each slot holds a picture or a text.

    x.parquet    images            [url, null, ...]   or [{bytes, path}, null, ...]   or [bytes, null, ...]
                 texts             [null, text, ...]
                 metadata          a JSON list (OBELICS) or a list of structs (OmniCorpus), one for each slot or each picture
                 general_metadata  a JSON object (OBELICS) or a struct (OmniCorpus)

Where the bytes of a picture are, first found first taken:
    1. in the row itself: bytes, or a struct with bytes, as Hugging Face datasets embed pictures;
    2. in the media folder, at a struct's `path`;
    3. in the media folder, named by the hash of the address, with one of the suffixes .jpg .jpeg .png .webp: the metadata's
       `img_url_sha` (OmniCorpus), else the SHA-256 of the address in hexadecimal. Not by the last word of the address: a
       thousand sites have an "image1.jpg", and the wrong one of them would be taken without a word.

A picture that was not to be had is left out and counted; its document stays. A slot with both, or with neither, is a fault of
the row. The document's address and scores, from general_metadata, go into its meta.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, BinaryIO

import pyarrow as pa

from mmpt.data.faults import BadMedia
from mmpt.data.spec import DataSpec
from mmpt.recipes.draft import Draft, MediaFolder
from mmpt.recipes.parquet import read_parquet, scalar_columns
from mmpt.recipes.streams import Rows
from mmpt.types import UserError

LISTS = ("images", "texts")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ObelicsReader:
    """Reads format `obelics`."""

    def __init__(self, spec: DataSpec) -> None:
        self.media = MediaFolder(spec)

    def rows(self, file: BinaryIO, start: int) -> Rows:
        def choose(schema: pa.Schema) -> list[str]:
            if missing := sorted(set(LISTS) - set(schema.names)):
                raise UserError(f"{file.name}: no column {missing[0]!r}; there are {schema.names}")
            wanted = {*LISTS, "metadata", "general_metadata", *scalar_columns(schema)}
            return [name for name in schema.names if name in wanted]

        return read_parquet(file, choose, start)

    def draft(self, key: str, row: dict[str, Any]) -> Draft:
        images, texts = row["images"], row["texts"]
        if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
            raise BadMedia("json", "images and texts are not two lists of one length")
        draft = Draft()
        hashes = _hashes(_unpacked(row, "metadata", list), images)
        for slot, (image, text) in enumerate(zip(images, texts, strict=True)):
            if (image is None) == (text is None):
                raise BadMedia("json", f"slot {slot} holds {'nothing' if image is None else 'a picture and a text'}")
            if text is not None:
                draft.add_text(text)
            else:
                self._add(draft, image, hashes[slot])
        draft.add_meta(row, without=(*LISTS, "metadata", "general_metadata"))
        draft.add_meta(_unpacked(row, "general_metadata", dict))
        return draft

    def _add(self, draft: Draft, image: Any, name: str | None) -> None:
        try:
            draft.add_image(self._bytes(image, name))
        except BadMedia as fault:
            draft.left_out.append(fault)

    def _bytes(self, image: Any, name: str | None) -> bytes:
        if isinstance(image, dict):
            image = self.media.read(image.get("path")) if image.get("bytes") is None else image["bytes"]
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise BadMedia("json", f"a {type(image).__name__}, where a picture or its address is wanted")
        name = name or hashlib.sha256(image.encode()).hexdigest()
        for suffix in SUFFIXES:
            try:
                return self.media.read(name + suffix)
            except BadMedia as fault:
                if fault.reason != "missing":
                    raise
        raise BadMedia("missing", f"{name[:80]}{'|'.join(SUFFIXES)}: no such file, for {ascii(image)[:120]}")


def _unpacked(row: dict[str, Any], name: str, kind: type) -> Any:
    """A column that is a value, or JSON of one; empty where there is none."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadMedia("json", f"{name} is not JSON: {error}") from error
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise BadMedia("json", f"{name} is a {type(value).__name__}; a {kind.__name__} is wanted")
    return value


def _hashes(metadata: list[Any], images: list[Any]) -> list[str | None]:
    """The `img_url_sha` of each slot's picture; metadata has an entry for each slot, or one for each picture."""
    if len(metadata) != len(images):
        entries = iter(metadata)
        metadata = [None if image is None else next(entries, None) for image in images]
    found = [entry.get("img_url_sha") if isinstance(entry, dict) else None for entry in metadata]
    return [name if isinstance(name, str) else None for name in found]
