"""Tars whose headers are hostile: names that leave the folder, links, extensions that claim too much; see `corrupt`."""

from __future__ import annotations

import tarfile
from random import Random

from corrupt import BLOCK, Damage, Shard, pack

OUTSIDE = ("/etc/passwd", "/etc/a.json", "../a.json", "a/../../b.json", "./a.json", "folder/a.json", "a.json/../../b", "//a.json")
ODD = (
    *("", ".", "..", "a", ".json", "a.", "a..json", "a b.json", "a\n.json", "a.js\non", "\x1b[31m.json", "a\t.json", "é.json"),
    *(
        "a.é",
        "\u202ea.json",
        "\udcff.json",
        "a\\b.json",
        "C:a.json",
        "pipe:cat.json",
        "-rf.json ",
        "*.json",
        "~.json",
        "%2e%2e.a",
    ),
    *("\N{SNOWMAN}.json", "a:b.json", "a.json;b", "a'.json", 'a".json', "a.{}", "a.%s", "$(id).json", "a.json\\", "a.\x7f"),
)
LONG = ("k" * 99 + ".json", "k" * 5000 + ".json", "k." + "a" * 5000, "k." + "a." * 3000 + "json", "k" * 2_000_000 + ".json")
TYPES = (
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
    *(tarfile.GNUTYPE_SPARSE, b"V", b"M", b"N", b"Z"),
)


def inserted(draw: Random, shard: Shard, raw: bytes) -> bytes:
    """The tar with raw blocks before one of its samples, or at its end."""
    starts = [place for place, (name, _) in zip(shard.headers[:-1], shard.members, strict=True) if name.endswith(".json")]
    place = draw.choice([*starts, shard.headers[-1]])
    return shard.tar[:place] + raw + bytes(-len(raw) % BLOCK) + shard.tar[place:]


def member(name: str, data: bytes = b"{}", format: int = tarfile.PAX_FORMAT, **fields: object) -> bytes:
    """The blocks of one member; fields of its header replace what is true."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(format, errors="surrogateescape") + data + bytes(-len(data) % BLOCK)


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    return bytes(header)


def hostile_name(draw: Random, shard: Shard) -> Damage:
    format = draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    return Damage(inserted(draw, shard, member(draw.choice(OUTSIDE + ODD), format=format)), noticed=True)


def long_name(draw: Random, shard: Shard) -> Damage:
    """Legal but for its length; its JSON is no document."""
    format = draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    return Damage(inserted(draw, shard, member(draw.choice(LONG), format=format)), noticed=True)


def name_taken(draw: Random, shard: Shard) -> Damage:
    """A further member of a sample that is there, or a sample of its key."""
    key = draw.choice(shard.members)[0].partition(".")[0]
    return Damage(inserted(draw, shard, member(f"{key}.{draw.choice(['json', 'extra', 'JSON', 'x.json'])}")))


def no_plain_file(draw: Random, shard: Shard) -> Damage:
    raw = member(
        draw.choice(["evil.json", "evil", "../evil"]),
        b"",
        draw.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]),
        type=draw.choice(TYPES),
        linkname=draw.choice(["/etc/passwd", "../../secret", shard.members[0][0], ""]),
    )
    return Damage(inserted(draw, shard, raw), noticed=True)


def member_replaced_by_link(draw: Random, shard: Shard) -> Damage:
    place = draw.choice(shard.headers[:-1])
    header = bytearray(shard.tar[place : place + BLOCK])
    header[156:157] = draw.choice([b"1", b"2"])
    header[157:169] = b"/etc/passwd\0"
    return Damage(shard.tar[:place] + with_checksum(header) + shard.tar[place + BLOCK :], noticed=True)


def size_claimed(draw: Random, shard: Shard) -> Damage:
    """A header whose size is not that of its data: octal or in base 256, negative or beyond the file."""
    place = draw.choice(shard.headers[:-1])
    header = bytearray(shard.tar[place : place + BLOCK])
    true = int(header[124:135], 8)
    header[124:136] = draw.choice(
        [
            b"%011o\0" % draw.choice([true + 512, true + 5120, max(true - 1, 0), 8**11 - 1, 2**30]),
            b"\xff" * 10 + draw.choice([b"\xfe\x00", b"\xff\xff", b"\x00\x00"]),  # negative
            b"\x80" + (2 ** draw.choice([31, 40, 62, 63, 64, 80]) + draw.choice([0, -1])).to_bytes(11, "big"),
            draw.choice([b"-1\0", b"99999999999\0", b"\0" * 12, b" " * 12, b"0x10\0", b"1e5\0"]).ljust(12, b"\0"),
        ]
    )
    return Damage(shard.tar[:place] + with_checksum(header) + shard.tar[place + BLOCK :])


def extension(draw: Random, shard: Shard) -> Damage:
    """A pax header before the first member of a sample: what it says counts for that member."""
    said = draw.choice(
        [
            {"size": draw.choice(["-512", "-1", "0", "1", "512", "99999999999999999999999", "9223372036854775807", "x", "1e9"])},
            {"path": draw.choice(OUTSIDE + ODD[3:])},
            {"GNU.sparse.map": draw.choice(["0,1", "0,9999999999999", "-5,5", "x", "1,2,3", "0,1," * 50_000 + "0,1"])},
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999999"},
            {"GNU.sparse.size": "1099511627776"},
            {"hdrcharset": "BINARY", "path": "a.json"},
            {"mtime": draw.choice(["nan", "inf", "-1e400", "x"]), "uid": "9" * 5000},
            {"comment": "x" * draw.choice([10, 3_000_000])},
            {"linkpath": "/etc/passwd"},
        ]
    )
    records = b"".join(_record(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in said.items())
    if draw.random() < 0.2:
        records = draw.choice([b"99999999 a=b\n", b"0 a=b\n", b"x", b"5 a=b", b"-3 a=b\n", b"9" * 5000 + b" a=b\n"])
    raw = member("pax", records, tarfile.USTAR_FORMAT, type=draw.choice([b"x", b"x", b"x", b"g"]))
    if draw.random() < 0.2:  # one that claims to be longer than the file
        raw = member("pax", records, tarfile.GNU_FORMAT, type=b"x", size=draw.choice([2**30, 2**40, len(records) + 5000, -512]))
    return Damage(inserted(draw, shard, raw))


def _record(name: bytes, value: bytes) -> bytes:
    """A pax record, which begins with its own length."""
    rest = b" " + name + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def chain(draw: Random, shard: Shard) -> Damage:
    """Headers about headers about headers."""
    link = member("././@LongLink", b"x" * 10, tarfile.GNU_FORMAT, type=draw.choice([b"L", b"K", b"x", b"g"]))
    return Damage(inserted(draw, shard, link * draw.choice([2, 400, 5000])))


def dialect(draw: Random, shard: Shard) -> Damage:
    """The same members as other programs write them: nothing is wrong."""
    return Damage(
        pack(shard.members, draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) + bytes(draw.choice([0, 512, 20480]))
    )


KINDS = (
    hostile_name,
    long_name,
    name_taken,
    no_plain_file,
    member_replaced_by_link,
    size_claimed,
    extension,
    chain,
    dialect,
)
