"""Where every member of every sample lies, so that reading is one pread at a known offset.

NAME.tar --ShardIndex.build--> arrays --save--> NAME.tar.index.npz
spec, split --Corpus.open--> corpus[i] -> Sample
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tarfile
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int

from mmpt.data.spec import DataSpec
from mmpt.types import Sample, UserError

KEY = re.compile(r"[A-Za-z0-9_-]+")
SUFFIX = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
MAX_MEMBER_BYTES = 1 << 30
MAX_OPEN = 128  # shards; systems allow 256 to 1,024 files to a process
BLOCK = 512  # bytes of a tar record
FORMAT = 1


def index_path(tar: Path) -> Path:
    return tar.with_name(tar.name + ".index.npz")


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The members of one tar, as arrays. Members of a sample are neighbours, its JSON among them."""

    keys: np.ndarray  # (samples,) bytes
    first_member: Int[np.ndarray, " samples_plus_1"]  # sample i owns members first_member[i] : first_member[i + 1]
    suffixes: np.ndarray  # (members,) bytes
    offsets: Int[np.ndarray, " members"]  # bytes from the start of the tar to the member's data
    sizes: Int[np.ndarray, " members"]  # bytes
    tar_size: Int[np.ndarray, ""]  # of the tar that was indexed
    version: Int[np.ndarray, ""]

    @classmethod
    def build(cls, tar: Path) -> ShardIndex:
        """Scan a tar's headers; no payload is read. Raises UserError naming the member for anything unsafe or out of order."""
        keys, first, suffixes, offsets, sizes = [], [], [], [], []
        try:
            with tarfile.open(tar, mode="r:") as archive:
                # Not `for member in archive`, which keeps every header it has seen.
                while (member := archive.next()) is not None:
                    archive.members.clear()
                    key, suffix = _split_name(tar, member)
                    if not keys or keys[-1] != key:
                        keys.append(key)
                        first.append(len(suffixes))
                    suffixes.append(suffix)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                _check_end(tar, archive.offset)
        # ValueError: a header with numbers that make no sense; RecursionError: a long chain of headers about headers
        except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
            raise UserError(f"shard {tar}: not a whole tar ({error})") from error
        index = cls(
            keys=np.array(keys, dtype=bytes),
            first_member=np.array([*first, len(suffixes)], dtype=np.int64),
            suffixes=np.array(suffixes, dtype=bytes),
            offsets=np.array(offsets, dtype=np.int64),
            sizes=np.array(sizes, dtype=np.int64),
            tar_size=np.array(tar.stat().st_size),
            version=np.array(FORMAT),
        )
        if fault := index._fault():
            raise UserError(f"shard {tar}: {fault}")
        return index

    def _fault(self) -> str | None:
        """What is wrong with the samples, as one clause; None for nothing."""
        if not len(self.keys):
            return "holds no samples"
        values, counts = np.unique(self.keys, return_counts=True)
        if (counts > 1).any():
            return f"members of {values[counts > 1][0].decode()} lie apart; write a sample's members one after the other"
        names, name_of = np.unique(self.suffixes, return_inverse=True)
        sample_of = np.repeat(np.arange(len(self.keys)), np.diff(self.first_member))
        values, counts = np.unique(sample_of * len(names) + name_of, return_counts=True)
        if (counts > 1).any():
            sample, name = divmod(int(values[counts > 1][0]), len(names))
            return f"sample {self.keys[sample].decode()} has its member {names[name].decode()} twice; write each once"
        has_json = np.logical_or.reduceat(self.suffixes == b"json", self.first_member[:-1])
        if not has_json.all():
            key = self.keys[~has_json][0].decode()
            return f"sample {key} has no .json member; format interleaved needs the document's JSON"
        return None

    def save(self, path: Path) -> None:
        aside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with aside.open("wb") as file:
                np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> ShardIndex | None:
        """The saved index, or None where there is none that this version reads. Nothing in it can run code."""
        try:
            with zipfile.ZipFile(path) as archive:  # np.load would take other formats too
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    return None  # not ours, and it could unfold to any size
            with np.load(path, allow_pickle=False) as arrays:
                index = cls(**{field.name: arrays[field.name] for field in fields(cls)})
            return index if index._is_sound() else None
        except Exception:  # numpy promises no list of errors for bytes that anyone may have written; a new index mends them all
            return None

    def _is_sound(self) -> bool:
        """Arrays that fit one another and the file: a sidecar comes from strangers too."""
        names, numbers = (self.keys, self.suffixes), (self.first_member, self.offsets, self.sizes)
        if any(array.dtype.kind != "S" or array.ndim != 1 for array in names):
            return False
        if any(array.dtype != np.int64 or array.ndim != 1 for array in numbers):
            return False
        if any(array.dtype != np.int64 or array.ndim != 0 for array in (self.tar_size, self.version)):
            return False
        members = len(self.suffixes)
        return bool(
            self.version == FORMAT
            and len(self.first_member) == len(self.keys) + 1
            and len(self.offsets) == len(self.sizes) == members
            and self.first_member[0] == 0
            and self.first_member[-1] == members
            and (np.diff(self.first_member) > 0).all()
            and (self.sizes >= 0).all()
            and (self.sizes <= MAX_MEMBER_BYTES).all()
            and (self.offsets >= BLOCK).all()
            and (self.offsets <= self.tar_size - self.sizes).all()
            and all(KEY.fullmatch(key.decode()) for key in self.keys)
            and all(SUFFIX.fullmatch(name.decode()) for name in np.unique(self.suffixes))
            and self._fault() is None
        )

    def _fits(self, tar: Path) -> bool:
        """Whether the tar has the indexed size, and the first, middle and last member where the index puts them."""
        with tar.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.tar_size:
                return False
            for member in {0, len(self.offsets) // 2, len(self.offsets) - 1}:
                file.seek(int(self.offsets[member]) - BLOCK)
                try:
                    header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
                except tarfile.TarError:
                    return False
                sample = int(np.searchsorted(self.first_member, member, side="right")) - 1
                name = f"{self.keys[sample].decode()}.{self.suffixes[member].decode()}"
                if header.size != self.sizes[member] or header.name != name[: len(header.name)]:  # the header cuts long names
                    return False
        return True

    @classmethod
    def of(cls, tar: Path) -> ShardIndex:
        """The sidecar's index if it fits the tar, else a new one, written beside the tar where that is possible."""
        sidecar = index_path(tar)
        # The size alone would not do: tars come in steps of 10,240 bytes, and a rewritten one often has its old size.
        if sidecar.is_file() and sidecar.stat().st_mtime_ns >= tar.stat().st_mtime_ns:
            found = cls.load(sidecar)
            if found is not None and found._fits(tar):
                return found
        index = cls.build(tar)
        with contextlib.suppress(OSError):  # a read-only or full disk: the index works from memory, and is made again next time
            index.save(sidecar)
        return index

    def __len__(self) -> int:
        return len(self.keys)


def _split_name(tar: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and suffix of a member, split at the first dot of its file name, as webdataset does."""
    name = member.name
    if not member.isfile() or member.issparse():
        raise UserError(f"shard {tar}: {name!r} is not a plain file; links, folders, devices and sparse files are refused")
    key, dot, suffix = name.partition(".")
    if not dot or not KEY.fullmatch(key) or not SUFFIX.fullmatch(suffix):
        raise UserError(
            f"shard {tar}: member {name!r}; KEY.suffix is wanted, as in doc17.json and doc17.000.png: "
            f"letters, digits, '_' and '-', no folders, and no dot in the key"
        )
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise UserError(f"shard {tar}: member {name!r} has {member.size:,} bytes; 0 to {MAX_MEMBER_BYTES:,} are allowed")
    return key, suffix


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


class Corpus:
    """All samples of one split, by number. May be pickled and forked: reads open the shards they need, `MAX_OPEN` at most."""

    def __init__(self, name: str, tars: list[Path]) -> None:
        self._files: dict[int, BinaryIO] = {}  # in the order of opening
        self.name, self.tars = name, tars
        self.shards = [ShardIndex.of(tar) for tar in tars]
        self.starts = np.cumsum([0, *map(len, self.shards)])

    @classmethod
    def open(cls, spec: DataSpec, split: str) -> Corpus:
        """Index the shards of a split. Raises UserError where one is missing, damaged or unsafe."""
        return cls(spec.name, spec.shard_paths(split))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """Of shard names and indices: what decides which sample has which number, and how large it is."""
        digest = hashlib.blake2b(digest_size=8)
        for tar, index in zip(self.tars, self.shards, strict=True):
            digest.update(tar.name.encode())
            for field in fields(index):
                digest.update(getattr(index, field.name).tobytes())
        return digest.hexdigest()

    def read(self, number: int) -> Sample:
        """Sample `number` with all its members."""
        shard, members = self._members(number)
        index = self.shards[shard]
        return Sample(
            key=index.keys[number - self.starts[shard]].decode(),
            shard=self.tars[shard].name,
            fields={index.suffixes[m].decode(): self._pread(shard, m) for m in members},
        )

    def read_json(self, number: int) -> bytes:
        """The JSON member of sample `number` alone."""
        shard, members = self._members(number)
        return next(self._pread(shard, m) for m in members if self.shards[shard].suffixes[m] == b"json")

    def _members(self, number: int) -> tuple[int, range]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        first = self.shards[shard].first_member
        local = number - int(self.starts[shard])
        return shard, range(int(first[local]), int(first[local + 1]))

    def _pread(self, shard: int, member: int) -> bytes:
        index = self.shards[shard]
        size = int(index.sizes[member])
        data = os.pread(self._file(shard).fileno(), size, int(index.offsets[member]))
        if len(data) != size:
            raise UserError(
                f"shard {self.tars[shard]}: {len(data)} of {size} bytes read: it was cut after it was indexed; copy it again"
            )
        return data

    def _file(self, shard: int) -> BinaryIO:
        """An open shard. A forked process may go on with its parent's: pread shares no position."""
        if shard not in self._files:
            if len(self._files) == MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = self.tars[shard].open("rb", buffering=0)
        return self._files[shard]

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}
