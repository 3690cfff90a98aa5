"""Members that claim or unfold to too much, and JSON that is no document, or tells of another; see `corrupt`."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import PIL.Image
from corrupt import Damage, Shard, a_key, edited, media_of, pack, with_medium

# Bombs: little to store, much to unfold.


def png(width: int, height: int, rows: int) -> bytes:
    """A PNG that says so large, with so many rows of it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(bytes(rows * (3 * width + 1)), 9)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@cache
def many_frames(count: int) -> bytes:
    """An animated WebP, two pictures again and again."""
    out = io.BytesIO()
    first, second = (PIL.Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    first.save(out, "WEBP", save_all=True, append_images=[second], duration=10, lossless=True)
    data = out.getvalue()
    start = data.index(b"ANMF")
    frames = data[start:] * (count // 2)
    return b"RIFF" + struct.pack("<I", 4 + start - 12 + len(frames)) + data[8:start] + frames


@cache
def large_png() -> bytes:
    return png(4000, 4000, 4000)


def wav(claimed: int, data: bytes, rate: int = 16000, channels: int = 1) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2 % 2**32, channels * 2 % 2**16, 16)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", claimed) + data
    return b"RIFF" + struct.pack("<I", (4 + len(chunks)) % 2**32) + chunks


def picture_bomb(draw: Random, shard: Shard) -> Damage:
    number = draw.choice(media_of(shard, ("jpg", "png", "webp")))
    told, data = draw.choice(
        [
            ([50_000, 50_000], png(50_000, 50_000, 1)),
            ([32, 32], png(50_000, 50_000, 1)),
            ([2**31 - 1, 1], png(2**31 - 1, 1, 0)),
            ([5000, 6000], png(5000, 6000, 1)),  # within the limits, but not there
            ([16, 16], many_frames(100)[:20] + b"\x02\0\0\0" + b"\xfe\xff\xff" * 2 + many_frames(100)[30:]),
        ]
    )
    return Damage(pack(with_medium(shard, number, data, wh=told)), noticed=True)


def picture_large(draw: Random, shard: Shard) -> Damage:
    """Large, long, or of many frames, but within the limits: it is decoded, within time and memory."""
    number = draw.choice(media_of(shard, ("jpg", "png", "webp")))
    told, data = draw.choice([([4000, 4000], large_png()), ([16, 16], many_frames(4000)), ([20_000, 1], png(20_000, 1, 1))])
    return Damage(pack(with_medium(shard, number, data, wh=told)))


def sound_bomb(draw: Random, shard: Shard) -> Damage:
    number = draw.choice(media_of(shard, ("wav", "flac", "opus")))
    flac = next(data for name, data in shard.members if name.endswith("flac"))
    endless = flac[:21] + bytes([flac[21] | 0x0F]) + b"\xff" * 4 + flac[26:]  # 2**36 samples, says STREAMINFO
    data = draw.choice(
        [
            wav(2**32 - 4, bytes(3200)),
            wav(2**31, bytes(3200), rate=draw.choice([1, 999, 2**31, 0])),
            wav(3200, bytes(3200), channels=draw.choice([0, 9, 65535])),
            endless,
        ]
    )
    told = {"sample_rate": 16000, "samples": draw.choice([1600, 16000 * 60, 16000 * 3600 * 3])}
    return Damage(pack(with_medium(shard, number, data, **told)))


def video_bomb(draw: Random, shard: Shard) -> Damage:
    number = draw.choice(media_of(shard, ("mp4",)))
    data = bytearray(shard.members[number][1])
    box, offset, value = draw.choice(
        [
            (b"stts", 12, struct.pack(">II", 2**32 - 1, 1)),  # samples, ticks of each
            (b"stsz", 12, struct.pack(">I", 2**32 - 1)),
            (b"stco", 8, struct.pack(">I", 2**32 - 1)),
            (b"avc1", 28, struct.pack(">HH", 65535, 65535)),
            (b"mvhd", 16, struct.pack(">II", 1, 2**32 - 1)),
            (b"tkhd", 40, struct.pack(">iiii", 0, 0x10000, -0x10000, 0)),  # turned by 90 degrees
        ]
    )
    at = data.index(box) + offset
    data[at : at + len(value)] = value
    return Damage(pack(with_medium(shard, number, bytes(data))))


def frames_bomb(draw: Random, shard: Shard) -> Damage:
    number = draw.choice(media_of(shard, ("mp4",)))
    frames, stop = draw.choice([100, 4000]), draw.choice([0.5, 20.0, 3000.0])  # of 10 ms each
    told = {"wh": [16, 16], "clip": [0, stop], "audio": False}
    return Damage(pack(with_medium(shard, number, many_frames(frames), **told)), noticed=100 * stop > frames)


def json_bomb(draw: Random, shard: Shard) -> Damage:
    deep = draw.choice([900, 990, 1000, 100_000, 1_000_000])
    opened, closed = draw.choice([("[", "]"), ('{"a":', "}")])
    nested = opened * deep + "1" + closed * deep
    made = draw.choice(
        [
            nested,
            f'{{"v":1,"parts":{nested}}}',
            f'{{"v":1,"parts":[{{"type":"text","text":{nested}}}]}}',
            f'{{"v":1,"parts":[{{"type":{nested}}}]}}',
            '{"v":1,"parts":[' + "[]," * 200_000 + "[]]}",
            '{"v":1,"parts":[' + '{"type":"text","text":"a"},' * 100_000 + '{"type":"text","text":"a"}]}',
            '{"v":' + "9" * draw.choice([4000, 1_000_000]) + "}",
            '{"v":1,"parts":"' + "x" * 3_000_000 + '"}',
        ]
    )
    return Damage(pack(edited(shard, a_key(draw, shard), lambda record: made.encode())), noticed=True)


# A JSON that is not a document, or tells of another.

PLAIN = {"type": "text", "text": "fine"}
RECORDS: tuple[Callable[[dict], Any], ...] = (
    *(lambda record, value=value: value for value in ([], None, "text", 17, True, {}, {"v": 1})),
    *(lambda record, value=value: {**record, "v": value} for value in (0, 2, "1", None, [1], math.inf, 10**400)),
    *(
        lambda record, value=value: {**record, "parts": value}
        for value in ({}, [], None, "x", 3, [[]], [None], [1], [{}], [{"type": "smell"}], [{"type": ["text"]}], [{"type": None}])
    ),
    *(
        lambda record, value=value: {**record, "parts": [PLAIN, {"type": "text", "text": value}]}
        for value in (None, 3, ["a"], {"a": 1}, "\ud800", "x\udfff", math.nan)
    ),
    *(
        lambda record, value=value: {**record, "parts": [{**PLAIN, "predict": value}]}
        for value in ("yes", 1, None, math.nan, [True])
    ),
    *(lambda record, value=value: {**record, "meta": value} for value in ([], None, 3, "x" * 3_000_000, math.nan)),
)


def record_wrong(draw: Random, shard: Shard) -> Damage:
    change = draw.choice(RECORDS)
    return Damage(pack(edited(shard, a_key(draw, shard), lambda record: (change(record),))), noticed=True)


def json_garbled(draw: Random, shard: Shard) -> Damage:
    def garble(record: dict) -> bytes:
        text = json.dumps(record)
        made = [text[: draw.randrange(len(text))], text + "}", "", " ", text.replace(":", "=", 1), "\0" * 100, "'" + text]
        return draw.choice([*(each.encode() for each in made), text.encode("utf-16"), b"\xff\xfe\xfd", b"\x80" + text.encode()])

    return Damage(pack(edited(shard, a_key(draw, shard), garble)))


VALUES = (
    *(None, -1, 0, 1, 1.5, True, 2**31 - 1, 2**31, 2**63, 10**400, math.inf, -math.inf, math.nan, "", "12", "\ud800", [], {}),
    *("../../etc/passwd", "/etc/passwd", "json", "x" * 100_000, [1], [1, 2, 3], [0, 0], [-1, 5], [10**9, 10**9], [5, 1]),
    *([0, math.nan], [0, math.inf], [0, 10**400], [1e-300, 1e-299], ["0", "1"], [0, 1e9], [32, 10**400], [[], []], [True, True]),
)
FIELDS = ("type", "file", "wh", "fps", "frames", "clip", "audio", "crc32", "sample_rate", "samples", "predict", "text", "time")


def field_wrong(draw: Random, shard: Shard) -> Damage:
    def change(record: dict) -> None:
        part = draw.choice(record["parts"])
        name = draw.choice([name for name in FIELDS if name in part])
        if draw.random() < 0.1:
            del part[name]
        else:
            part[name] = draw.choice(VALUES)

    return Damage(pack(edited(shard, a_key(draw, shard), change)))


def _lie(draw: Random, part: dict) -> None:
    """More than there is, in every field that says how much there is."""
    if part["type"] == "image":
        part["wh"] = draw.choice([[side + 1 for side in part["wh"]], [5000, 5000], [1, 1]])
    elif part["type"] == "audio":
        part["samples"] *= draw.choice([2, 3, 100])
    else:
        part |= draw.choice([{"wh": [2 * side for side in part["wh"]]}, {"clip": [0, 60]}, {"clip": [50, 60]}])


def size_lied(draw: Random, shard: Shard) -> Damage:
    number = draw.choice(media_of(shard))
    key, _, suffix = shard.members[number][0].partition(".")

    def change(record: dict) -> None:
        _lie(draw, next(part for part in record["parts"] if part.get("file") == suffix))

    return Damage(pack(edited(shard, key, change)), noticed=True)


KINDS = (
    picture_bomb,
    picture_large,
    sound_bomb,
    video_bomb,
    frames_bomb,
    json_bomb,
    record_wrong,
    json_garbled,
    field_wrong,
    size_lied,
)
