"""Opening a file of sound or video without trusting it.

    bytes --container_kind--> "WAV" ... "WEBP" --open_container--> a PyAV container, closed at the end

FFmpeg reads from memory alone, by the demuxer that the magic bytes name: nothing is probed, no other file or address is opened.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
from av.container import InputContainer

from mmpt.data.faults import BadMedia
from mmpt.types import Buffer

MAX_SECONDS = 4 * 3600
"""A longer sound or video is refused from its header."""

MAX_ENTRIES = 2**23
"""Entries in the tables of an MP4 file. FFmpeg takes tens of bytes for each, of which a few bytes of file may claim 2**32."""

_DEMUXERS = {"MP4": "mov", "MATROSKA": "matroska", "OGG": "ogg"}
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_COUNTS = {b"stsz": 12, b"stz2": 12, b"trun": 8}  # where, from the box's name, the number of its samples stands
_RUNS = (b"stts", b"ctts")  # boxes of pairs (samples, value)


def container_kind(data: Buffer) -> str:
    """Which of WAV, FLAC, MP3, OGG, MP4, MATROSKA, WEBP it is, by its first bytes; "" for none of them."""
    start = bytes(data[:12])
    if start[:4] == b"RIFF":
        return {b"WAVE": "WAV", b"WEBP": "WEBP"}.get(start[8:], "")
    if start[4:8] in _MP4_BOXES:
        return "MP4"
    if start[:3] == b"ID3" or (start[:1] == b"\xff" and len(start) > 1 and start[1] & 0xE6 == 0xE2):
        return "MP3"  # an ID3 tag, or the sync word and layer III
    magic = {b"fLaC": "FLAC", b"OggS": "OGG", b"\x1a\x45\xdf\xa3": "MATROSKA"}
    return magic.get(start[:4], "")


@contextmanager
def decoding(kind: str) -> Iterator[None]:
    """Whatever a decoder raises within becomes BadMedia("decode")."""
    try:
        yield
    except BadMedia:
        raise
    except (av.FFmpegError, ValueError, RuntimeError, OSError, ArithmeticError, LookupError, EOFError) as error:
        raise BadMedia("decode", f"the {kind} cannot be decoded: {error}") from error


@contextmanager
def open_container(data: Buffer, kind: str, max_pixels: int) -> Iterator[InputContainer]:
    """A container of `kind` "MP4", "MATROSKA" or "OGG", for decoding on one thread.

    Raises BadMedia: "decode" for what FFmpeg cannot read, within the block too; "limit" for a length over the limits.
    """
    if kind == "MP4":
        _check_tables(memoryview(data))
    options = {"protocol_whitelist": "", "threads": "1", "max_pixels": str(max_pixels)}
    with (
        decoding(kind),
        av.open(io.BytesIO(data), format=_DEMUXERS[kind], options=options, metadata_errors="replace") as container,
    ):
        for stream in (*container.streams.video, *container.streams.audio):
            if stream.codec_context is not None:  # FFmpeg knows its codec
                stream.codec_context.thread_count = 1
                stream.codec_context.options = {"max_pixels": str(max_pixels)}
        if container.duration and container.duration / av.time_base > MAX_SECONDS:
            raise BadMedia("limit", f"{container.duration // av.time_base} seconds, more than the {MAX_SECONDS} that are read")
        yield container


def origin(container: InputContainer) -> float:
    """Seconds on the container's clock at which its time starts."""
    return max(container.start_time or 0, 0) / av.time_base


def _check_tables(view: memoryview) -> None:
    """Refuses an MP4 whose tables claim more entries than are read: FFmpeg writes them out before it decodes anything."""
    entries = 0
    for box in _top_boxes(view):
        if b"cmov" in box:
            raise BadMedia("decode", "an MP4 with a compressed header")
        for name, offset in _COUNTS.items():
            entries += sum(int.from_bytes(box[at + offset : at + offset + 4], "big") for at in _places(box, name))
        for name in _RUNS:
            entries += sum(_run_lengths(box, at + 8) for at in _places(box, name))
    if entries > MAX_ENTRIES:
        raise BadMedia("limit", f"an MP4 whose tables claim {entries} entries, more than the {MAX_ENTRIES} that are read")


def _run_lengths(box: bytes, at: int) -> int:
    pairs = min(int.from_bytes(box[at : at + 4], "big"), max(0, len(box) - at - 4) // 8)
    return int(np.frombuffer(box, ">u4", 2 * pairs, at + 4)[::2].sum(dtype=np.int64)) if pairs else 0


def _top_boxes(view: memoryview) -> Iterator[bytes]:
    """All boxes of the outermost level but those of media data, in which FFmpeg looks for none."""
    position = 0
    while position + 8 <= len(view):
        size, name = int.from_bytes(view[position : position + 4], "big"), bytes(view[position + 4 : position + 8])
        if size == 1:
            size = int.from_bytes(view[position + 8 : position + 16], "big")
        end = len(view) if size < 8 else position + size
        if name != b"mdat":
            yield bytes(view[position:end])
        position = end


def _places(box: bytes, name: bytes) -> Iterator[int]:
    at = box.find(name)
    while at >= 0:
        yield at
        at = box.find(name, at + 4)
