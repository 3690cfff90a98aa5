"""What the first bytes of a picture say: kind, size, orientation, and what a decoder has to know. Nothing is decoded.

Read here rather than by PIL, which takes as long to open a small JPEG as another decoder takes to read it whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from mmpt.data.faults import BadMedia
from mmpt.types import Buffer

MAX_SCANS = 256  # of a JPEG, each of which may cost a pass over all pixels for as little as a few bytes

_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_DCT_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})  # sequential and progressive, Huffman and arithmetic coded
_LUMA_SAMPLING = frozenset({0x11, 0x21, 0x12, 0x22, 0x41, 0x14})  # of which the chroma beside it is sampled 0x11
_BARE_MARKERS = frozenset(range(0xD0, 0xD9))  # no length follows them
_PNG_GRAY, _PNG_RGB, _PNG_PALETTE, _PNG_RGBA = 0, 2, 3, 6


@dataclass(frozen=True, kw_only=True)
class Header:
    kind: str  # "JPEG", "PNG" or "WEBP"
    width: int  # pixels, as stored
    height: int  # pixels, as stored
    orientation: int = 1  # EXIF's, 1..8: how the stored picture is to be turned
    alpha: bool = False  # whether some of it may be transparent
    plain: bool = True  # whether simplejpeg reads the JPEG, torchvision the PNG right: see `_plain_jpeg`, `_read_png`


def read_header(data: Buffer) -> Header:
    """The header of a JPEG, PNG or WebP. Raises BadMedia("decode") for what is none of them."""
    view = memoryview(data)
    start = bytes(view[:16])
    try:
        if start.startswith(b"\xff\xd8\xff"):
            return _read_jpeg(view)
        if start.startswith(b"\x89PNG\r\n\x1a\n"):
            return _read_png(view)
        if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            return _read_webp(view)
    except (struct.error, IndexError, StopIteration) as error:
        raise BadMedia("decode", "the picture ends within its header") from error
    raise BadMedia("decode", f"no JPEG, PNG or WebP: it starts with {start[:8]!r}")


def _read_jpeg(view: memoryview) -> Header:
    kind, frame, orientation = 0, None, 1
    for marker, segment in _jpeg_segments(view):
        if marker in _FRAME_MARKERS and frame is None:
            kind, frame = marker, segment
        elif marker == 0xE1 and bytes(segment[:6]) == b"Exif\0\0":
            orientation = exif_orientation(segment[6:])
    if frame is None:
        raise BadMedia("decode", "the JPEG has no frame header")
    height, width = struct.unpack_from(">HH", frame, 1)
    complete = kind in (0xC0, 0xC1) and segment[0] == frame[5]  # all colors are in the first scan: no other is read
    if not complete and bytes(view).count(b"\xff\xda") > MAX_SCANS:
        raise BadMedia("limit", f"a JPEG of over {MAX_SCANS} scans")
    return Header(kind="JPEG", width=width, height=height, orientation=orientation, plain=_plain_jpeg(kind, frame))


def _jpeg_segments(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Marker and body of every segment, the last of them the head of the first scan."""
    marker, position = 0xD8, 2
    while marker != 0xDA:
        marker = view[position + 1]
        # Markers below C0 are reserved. FF 00 is none to libjpeg: it would look on behind it, and might find a larger frame.
        if view[position] != 0xFF or marker < 0xC0:
            raise BadMedia("decode", f"the JPEG has no marker at byte {position}")
        if marker == 0xFF or marker in _BARE_MARKERS:
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", view, position + 2)
        if marker == 0xD9 or length < 2:
            raise BadMedia("decode", f"the JPEG ends at byte {position}, before a picture")
        yield marker, view[position + 4 : position + 2 + length]
        position += 2 + length


def _plain_jpeg(kind: int, frame: memoryview) -> bool:
    """simplejpeg reads gray and three colors of the usual samplings; not CMYK, nor lossless JPEG."""
    samplings = [frame[7 + 3 * number] for number in range(frame[5])]
    usual = len(samplings) == 1 or (samplings[0] in _LUMA_SAMPLING and samplings[1:] == [0x11, 0x11])
    return usual and kind in _DCT_FRAMES


def _read_png(view: memoryview) -> Header:
    """torchvision reads truecolor and palettes of 8 bits as PIL does; it ignores tRNS of other colors, and shows black and
    white pictures of one bit as black and nearly black."""
    if bytes(view[12:16]) != b"IHDR":
        raise BadMedia("decode", "the PNG does not start with its header")
    width, height, depth, color = struct.unpack_from(">IIBB", view, 16)
    has_trns, orientation = False, 1
    for name, chunk in _png_chunks(view, 33):
        has_trns |= name == b"tRNS"
        if name == b"eXIf":
            orientation = exif_orientation(chunk)
    alpha = has_trns or color & 4 != 0
    plain = depth <= 8 and (color in (_PNG_RGBA, _PNG_PALETTE) or (color == _PNG_RGB and not has_trns))
    return Header(kind="PNG", width=width, height=height, orientation=orientation, alpha=alpha, plain=plain)


def _png_chunks(view: memoryview, position: int) -> Iterator[tuple[bytes, memoryview]]:
    while position + 8 <= len(view):
        (length,) = struct.unpack_from(">I", view, position)
        yield bytes(view[position + 4 : position + 8]), view[position + 8 : position + 8 + length]
        position += length + 12


def _read_webp(view: memoryview) -> Header:
    chunks = riff_chunks(view)
    name, _, chunk = next(chunks)
    if name == b"VP8 ":
        width, height = struct.unpack_from("<HH", chunk, 6)
        return Header(kind="WEBP", width=width & 0x3FFF, height=height & 0x3FFF)
    if name == b"VP8L":
        (bits,) = struct.unpack_from("<I", chunk, 1)
        return Header(kind="WEBP", width=(bits & 0x3FFF) + 1, height=(bits >> 14 & 0x3FFF) + 1, alpha=bool(bits >> 28 & 1))
    if name != b"VP8X":
        raise BadMedia("decode", f"the WebP starts with {name!r}, not with a picture")
    flags, width, height = chunk[0], 1 + _uint24(chunk, 4), 1 + _uint24(chunk, 7)
    exif = next((body for name, _, body in chunks if name == b"EXIF"), None) if flags & 0x08 else None
    orientation = exif_orientation(exif[6:] if bytes(exif[:6]) == b"Exif\0\0" else exif) if exif is not None else 1
    animated = flags & 0x02 != 0
    return Header(kind="WEBP", width=width, height=height, orientation=orientation, alpha=flags & 0x10 != 0, plain=not animated)


def riff_chunks(view: memoryview) -> Iterator[tuple[bytes, int, memoryview]]:
    """Name, claimed length and body of every chunk of a RIFF file; where the file is cut, the last body is shorter."""
    position = 12
    while position + 8 <= len(view):
        (length,) = struct.unpack_from("<I", view, position + 4)
        yield bytes(view[position : position + 4]), length, view[position + 8 : position + 8 + length]
        position += 8 + length + length % 2


def webp_frames(data: Buffer) -> list[int]:
    """Milliseconds for which each frame of an animated WebP is shown; empty for a still one."""
    return [_uint24(body, 12) for name, _, body in riff_chunks(memoryview(data)) if name == b"ANMF" and len(body) >= 16]


def _uint24(view: memoryview, position: int) -> int:
    low, high = struct.unpack_from("<HB", view, position)
    return low | high << 16


def exif_orientation(exif: memoryview) -> int:
    """EXIF orientation, 1..8, of a TIFF header and its first directory; 1 where there is none or it is broken."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(exif[:2]))
    if order is None:
        return 1
    try:
        (position,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, position)
        for entry in range(position + 2, position + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
