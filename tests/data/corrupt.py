"""What can become of a shard between its writer and its reader: accidents and malice, made from a number.

    Case(seed, number) --KINDS[kind]--> Damage: the bytes that take the place of a sound shard's, and when they do

Every kind is a function of (draw, shard). The same seed and number make the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Any, Literal

BLOCK = 512
Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Damage:
    tar: bytes
    # "before" it is indexed; "after" it, with the time of change as it was; while a loader has it "open"; "sidecar": the index
    # itself has the bytes.
    when: Literal["before", "after", "open", "sidecar"] = "before"
    noticed: bool = False  # whether it must be refused or masked: no reading of it is right


@dataclass(frozen=True)
class Shard:
    """A sound shard: plain members, one behind the other."""

    tar: bytes
    sidecar: bytes

    @cached_property
    def members(self) -> Members:
        with tarfile.open(fileobj=io.BytesIO(self.tar)) as archive:
            return [(info.name, archive.extractfile(info).read()) for info in archive]

    @property
    def headers(self) -> list[int]:
        """Byte at which each member's header stands, and at last the end mark's."""
        places = [0]
        for _, data in self.members:
            places.append(places[-1] + BLOCK + -(-len(data) // BLOCK) * BLOCK)
        return places


Corruption = Callable[[Random, Shard], Damage]


def pack(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these members; a TarInfo is written as it is, whatever it claims."""
    out = []
    for name, data in members:
        info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
        if info is not name:
            info.size = len(data)
        out += [info.tobuf(format, errors="surrogateescape"), data, bytes(-len(data) % BLOCK)]
    return b"".join([*out, bytes(2 * BLOCK)])


def spoil(draw: Random, data: bytes, bits: int, start: int = 0, stop: int | None = None) -> bytes:
    spoiled = bytearray(data)
    for _ in range(bits):
        spoiled[draw.randrange(start, len(data) if stop is None else stop)] ^= 1 << draw.randrange(8)
    return bytes(spoiled)


def media_of(shard: Shard, endings: tuple[str, ...] = ("",)) -> list[int]:
    """Numbers of the members that are media, of some kinds."""
    names = [name for name, _ in shard.members]
    return [number for number, name in enumerate(names) if name.endswith(endings) and not name.endswith(".json")]


def edited(shard: Shard, key: str, change: Callable[[dict], Any]) -> Members:
    """The members, with the JSON of `key` changed: in place, or to what `change` returns."""
    members = []
    for name, data in shard.members:
        if name == f"{key}.json":
            record = json.loads(data)
            made = change(record)
            data = made if isinstance(made, bytes) else json.dumps(record if made is None else made[0]).encode()
        members.append((name, data))
    return members


def with_medium(shard: Shard, number: int, data: bytes, **fields: Any) -> Members:
    """The members with other bytes in place of a medium, which its JSON knows: CRC and `fields` are brought up to date."""
    key, _, suffix = shard.members[number][0].partition(".")

    def change(record: dict) -> None:
        for part in record["parts"]:
            if part.get("file") == suffix:
                part |= {"crc32": zlib.crc32(data), **fields}

    members = edited(shard, key, change)
    members[number] = (members[number][0], data)
    return members


def a_key(draw: Random, shard: Shard) -> str:
    return draw.choice([name for name, _ in shard.members if name.endswith(".json")]).partition(".")[0]


# Accidents to a whole tar.


def cut(draw: Random, shard: Shard) -> Damage:
    return Damage(shard.tar[: draw.randrange(shard.headers[-1] + 1)], noticed=True)


def cut_after_indexing(draw: Random, shard: Shard) -> Damage:
    return Damage(shard.tar[: draw.randrange(shard.headers[-1] + 1)], "after", noticed=True)


def cut_while_open(draw: Random, shard: Shard) -> Damage:
    return Damage(shard.tar[: draw.randrange(shard.headers[-1] + 1)], "open")


def flipped(draw: Random, shard: Shard) -> Damage:
    return Damage(spoil(draw, shard.tar, draw.randint(1, 8)))


def flipped_header(draw: Random, shard: Shard) -> Damage:
    start = draw.choice(shard.headers[:-1])
    return Damage(spoil(draw, shard.tar, draw.randint(1, 8), start, start + BLOCK))


def flipped_after_indexing(draw: Random, shard: Shard) -> Damage:
    return Damage(spoil(draw, shard.tar, draw.randint(1, 8)), "after")


def flipped_while_open(draw: Random, shard: Shard) -> Damage:
    return Damage(spoil(draw, shard.tar, draw.randint(1, 8)), "open")


def flipped_sidecar(draw: Random, shard: Shard) -> Damage:
    return Damage(spoil(draw, shard.sidecar, draw.randint(1, 8)), "sidecar")


def cut_sidecar(draw: Random, shard: Shard) -> Damage:
    return Damage(shard.sidecar[: draw.randrange(len(shard.sidecar))], "sidecar")


def hole(draw: Random, shard: Shard) -> Damage:
    """Zeros, as a file system leaves them after a crash. The last block of data stays: with all of the last document gone, what
    is left is a whole tar that has one document fewer, and nothing in it tells."""
    end = shard.headers[-1] - BLOCK
    start = draw.randrange(0, end, BLOCK)
    length = min(BLOCK * draw.randint(1, 16), end - start)
    return Damage(shard.tar[:start] + bytes(length) + shard.tar[start + length :], noticed=True)


def no_tar(draw: Random, shard: Shard) -> Damage:
    made = [b"", b"\n", bytes(10240), gzip.compress(shard.tar), b"<html>404</html>", draw.randbytes(10240), shard.sidecar]
    return Damage(draw.choice(made), noticed=True)


def joined(draw: Random, shard: Shard) -> Damage:
    return Damage(shard.tar + draw.choice([shard.tar, b"x", draw.randbytes(700), b"\0" * 512 + b"x"]), noticed=True)


# Accidents to members.


def members_apart(draw: Random, shard: Shard) -> Damage:
    members = list(shard.members)
    draw.shuffle(members)
    keys = [name.partition(".")[0] for name, _ in members]
    runs = sum(a != b for a, b in pairwise(keys)) + 1
    return Damage(pack(members), noticed=runs > len(set(keys)))


def twice(draw: Random, shard: Shard) -> Damage:
    members = list(shard.members)
    members.insert(draw.randrange(len(members) + 1), draw.choice(members))
    return Damage(pack(members), noticed=True)


def member_lost(draw: Random, shard: Shard) -> Damage:
    gone = draw.choice(media_of(shard))
    return Damage(pack(member for number, member in enumerate(shard.members) if number != gone), noticed=True)


def contents_swapped(draw: Random, shard: Shard) -> Damage:
    one, other = draw.sample(range(len(shard.members)), 2)
    members = list(shard.members)
    members[one], members[other] = (members[one][0], members[other][1]), (members[other][0], members[one][1])
    return Damage(pack(members), noticed=True)


def extensions_swapped(draw: Random, shard: Shard) -> Damage:
    """A file is called what it is not, in the JSON as well: decoders go by the bytes."""
    number = draw.choice(media_of(shard))
    name, data = shard.members[number]
    key, _, suffix = name.partition(".")
    other = suffix.partition(".")[0] + draw.choice([".jpg", ".png", ".wav", ".mp4", ".bin", ".tar"])
    members = with_medium(shard, number, data, file=other)
    members[number] = (f"{key}.{other}", data)
    return Damage(pack(members))


def modalities_swapped(draw: Random, shard: Shard) -> Damage:
    """A medium of another kind in place of one, its checksum right."""
    number, other = draw.sample(media_of(shard), 2)
    return Damage(pack(with_medium(shard, number, shard.members[other][1])))


def emptied(draw: Random, shard: Shard) -> Damage:
    number = draw.randrange(len(shard.members))
    members = list(shard.members)
    members[number] = (members[number][0], b"")
    return Damage(pack(members), noticed=True)


def medium_cut(draw: Random, shard: Shard) -> Damage:
    """Before its checksum was taken."""
    number = draw.choice(media_of(shard))
    data = shard.members[number][1]
    return Damage(pack(with_medium(shard, number, data[: draw.randrange(len(data))])))


def medium_flipped(draw: Random, shard: Shard) -> Damage:
    """Before its checksum was taken."""
    number = draw.choice(media_of(shard))
    return Damage(pack(with_medium(shard, number, spoil(draw, shard.members[number][1], draw.randint(1, 40)))))


def medium_head_flipped(draw: Random, shard: Shard) -> Damage:
    number = draw.choice(media_of(shard))
    data = shard.members[number][1]
    return Damage(pack(with_medium(shard, number, spoil(draw, data, draw.randint(1, 8), 0, min(len(data), 64)))))


KINDS = (
    cut,
    cut_after_indexing,
    cut_while_open,
    flipped,
    flipped_header,
    flipped_after_indexing,
    flipped_while_open,
    flipped_sidecar,
    cut_sidecar,
    hole,
    no_tar,
    joined,
    members_apart,
    twice,
    member_lost,
    contents_swapped,
    extensions_swapped,
    modalities_swapped,
    emptied,
    medium_cut,
    medium_flipped,
    medium_head_flipped,
)
