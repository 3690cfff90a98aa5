"""The members of a tar that a stranger made: plain files with names that readers agree on, or an error that names them."""

from __future__ import annotations

import io
import reprlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmpt.data.names import KEY, SUFFIX, matches
from mmpt.types import UserError

BLOCK = 512  # bytes of a tar record
MAX_MEMBER_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
BROKEN = (tarfile.TarError, EOFError, ValueError, RecursionError, OverflowError)
"""What tarfile raises of damaged bytes: ValueError for numbers that make no sense, RecursionError for headers about headers."""


@dataclass(frozen=True)
class Member:
    """A plain file of a tar: its name is KEY.suffix."""

    key: str
    suffix: str
    offset: int  # bytes from the start of the tar to its data
    size: int  # bytes


class SmallReads(io.FileIO):
    """A tar's file for tarfile, which reads the extension of a header in one go, whatever length that claims."""

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def read_members(tar: Path) -> Iterator[Member]:
    """The members in their order; no payload is read.

    Raises UserError naming the member, or the byte, for a tar that is damaged, cut, or holds anything but plain files.
    """
    try:
        with SmallReads(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            # Not `for info in archive`, which keeps every header it has seen.
            while (info := archive.next()) is not None:
                archive.members.clear()
                yield _member(tar, info)
            end = archive.offset
    except BROKEN as error:
        raise UserError(f"shard {tar}: not a whole tar ({error})") from error
    _check_end(tar, end)


def _member(tar: Path, info: tarfile.TarInfo) -> Member:
    name = reprlib.repr(info.name)
    if not info.isfile() or info.issparse():
        raise UserError(f"shard {tar}: {name} is not a plain file; links, folders, devices and sparse files are refused")
    key, dot, suffix = info.name.partition(".")
    if not dot or not matches(KEY, key) or not matches(SUFFIX, suffix):
        raise UserError(
            f"shard {tar}: member {name}; KEY.suffix is wanted, as in doc17.json and doc17.000.png: "
            f"letters, digits, '_' and '-', no folders, no dot in the key, and 200 characters of each at most"
        )
    if not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise UserError(f"shard {tar}: member {name} has {info.size:,} bytes; 0 to {MAX_MEMBER_BYTES:,} are allowed")
    return Member(key, suffix, info.offset_data, info.size)


def _check_end(tar: Path, offset: int) -> None:
    """Only zeros may follow the last member, a block at least: tarfile silently takes a damaged or cut header for the end."""
    with tar.open("rb") as file:
        file.seek(offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise UserError(
                f"shard {tar}: cut short or damaged at byte {offset:,}: a member or the end mark is wanted; copy it again"
            )
        while rest := file.read(1 << 20):
            if rest.strip(b"\0"):
                raise UserError(
                    f"shard {tar}: more follows after its end mark at byte {offset:,}; give tars that were joined as a shard each"
                )
