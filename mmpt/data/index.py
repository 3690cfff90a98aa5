"""Where every member of every sample lies and what the parts of every document are, so that neither planning nor
reading looks for anything: plans need the arrays alone, and reading is one pread at a known offset.

    NAME.tar --ShardIndex.build--> arrays --save--> NAME.tar.index.npz
"""

from __future__ import annotations

import os
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Int

from mmpt.data.documents import MAX_PARTS, Entry, Layout, check_entries
from mmpt.data.faults import REASONS, BadMedia
from mmpt.data.names import KEY, SUFFIX, all_match
from mmpt.data.tars import BLOCK, MAX_MEMBER_BYTES, read_members
from mmpt.types import AUDIO, TEXT, VIDEO, UserError

FORMAT = 2
MAX_SAMPLE_BYTES = 1 << 31  # which are in memory at once

PART = np.dtype(
    [
        ("kind", "u1"),  # TEXT, IMAGE, AUDIO or VIDEO
        ("predict", "?"),
        ("member", "<i4"),  # number within the sample; -1 for a text in the JSON
        ("width", "<i4"),  # pixels, as shown
        ("height", "<i4"),
        ("rate", "<i4"),  # Hz
        ("samples", "<i8"),  # of a sound, at `rate`
        ("start", "<f8"),  # seconds into the file
        ("stop", "<f8"),
    ]
)
"""One part of a document; the fields that its kind lacks are 0."""


def index_name(tar: str) -> str:
    return tar + ".index.npz"


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The samples of one tar, as arrays. Members of a sample are neighbours."""

    keys: np.ndarray  # (samples,) bytes
    first_member: Int[np.ndarray, " samples_plus_1"]  # sample i owns members first_member[i] : first_member[i + 1]
    suffixes: np.ndarray  # (members,) bytes
    offsets: Int[np.ndarray, " members"]  # bytes from the start of the tar to the member's data
    sizes: Int[np.ndarray, " members"]  # bytes
    crcs: Int[np.ndarray, " members"]  # CRC-32 of the data
    first_part: Int[np.ndarray, " samples_plus_1"]  # document i owns parts first_part[i] : first_part[i + 1]; none if faulty
    parts: np.ndarray  # (parts,) PART
    reasons: np.ndarray  # (samples,) bytes: why a document is faulty, a key of REASONS; empty for a sound one
    details: np.ndarray  # (samples,) bytes: the same in words
    layout: np.ndarray  # () bytes: signature of the layout that the parts were read by
    tar_size: Int[np.ndarray, ""]  # of the tar that was indexed
    version: Int[np.ndarray, ""]

    @classmethod
    def build(cls, tar: Path, layout: Layout) -> ShardIndex:
        """Read a tar from end to end. A faulty document is noted and has no parts.

        Raises UserError naming the member where the tar itself is damaged, or holds anything unsafe or out of order.
        """
        table = _Table()
        with tar.open("rb", buffering=0) as file:
            for member in read_members(tar):
                if member.key != table.key:
                    table.finish(layout)
                    table.key = member.key
                if (table.size + member.size) > MAX_SAMPLE_BYTES or len(table.files) > MAX_PARTS:
                    raise UserError(
                        f"shard {tar}: sample {member.key} has over {MAX_SAMPLE_BYTES:,} bytes or {MAX_PARTS:,} members; split it"
                    )
                data = os.pread(file.fileno(), member.size, member.offset)
                if len(data) != member.size:
                    raise UserError(f"shard {tar}: cut short within member {member.key}.{member.suffix}; copy it again")
                table.add(member.suffix, member.offset, data)
            table.finish(layout)
        index = table.index(layout, tar.stat().st_size)
        if fault := index._fault():
            raise UserError(f"shard {tar}: {fault}")
        return index

    def _fault(self) -> str | None:
        """What is wrong with the order of samples, as one clause; None for nothing."""
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
        return None

    def save(self, path: Path) -> None:
        write_arrays(path, **{field.name: getattr(self, field.name) for field in fields(self)})

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
        names = (self.keys, self.suffixes, self.reasons, self.details)
        numbers = (self.first_member, self.offsets, self.sizes, self.crcs, self.first_part)
        scalars = (self.tar_size, self.version)
        return bool(
            all(array.dtype.kind == "S" and array.ndim == 1 for array in names)
            and all(array.dtype == np.int64 and array.ndim == 1 for array in numbers)
            and all(array.dtype == np.int64 and array.ndim == 0 for array in scalars)
            and self.layout.dtype.kind == "S"
            and self.layout.ndim == 0
            and self.parts.dtype == PART
            and self.parts.ndim == 1
            and self.version == FORMAT
            and len(self.reasons) == len(self.details) == len(self.keys)
            and len(self.offsets) == len(self.sizes) == len(self.crcs) == len(self.suffixes)
            and _are_edges(self.first_member, len(self.keys), len(self.suffixes), least=1)
            and _are_edges(self.first_part, len(self.keys), len(self.parts), least=0)
            and ((self.sizes >= 0) & (self.sizes <= MAX_MEMBER_BYTES)).all()
            and ((self.offsets >= BLOCK) & (self.offsets <= self.tar_size - self.sizes)).all()
            and (self.offsets[1:] >= self.offsets[:-1] + self.sizes[:-1] + BLOCK).all()
            and self._samples_are_small()
            and all_match(KEY, self.keys)
            and all_match(SUFFIX, np.unique(self.suffixes))
            and set(np.unique(self.reasons).tolist()) <= {b"", *(reason.encode() for reason in REASONS)}
            and self._parts_are_sound()
            and self._fault() is None
        )

    def _samples_are_small(self) -> bool:
        first, last = self.first_member[:-1], self.first_member[1:] - 1
        return bool((self.offsets[last] + self.sizes[last] - self.offsets[first] <= 2 * MAX_SAMPLE_BYTES).all())

    def _parts_are_sound(self) -> bool:
        parts = self.parts
        members = np.repeat(np.diff(self.first_member), np.diff(self.first_part))
        media = parts["kind"] != TEXT
        timed = (parts["kind"] == AUDIO) | (parts["kind"] == VIDEO)
        numbers = ("width", "height", "rate", "samples", "start", "stop")
        return bool(
            (parts["kind"] <= VIDEO).all()
            and ((parts["member"] >= np.where(media, 0, -1)) & (parts["member"] < members)).all()
            and all((parts[name] >= 0).all() for name in numbers)
            and all((parts[name][parts["kind"] == AUDIO] > 0).all() for name in ("rate", "samples"))
            and all((parts[name][media & (parts["kind"] != AUDIO)] > 0).all() for name in ("width", "height"))
            and (parts["stop"] > parts["start"])[timed].all()
            and np.isfinite(parts["stop"]).all()
        )

    def fits(self, tar: Path) -> bool:
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

    @property
    def fingerprint(self) -> str:
        """Of all arrays: what decides which sample has which number, and what its parts are."""
        digest = blake2b(digest_size=8)
        for item in fields(self):
            digest.update(getattr(self, item.name).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.keys)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an npz so that it is there whole or as it was, whoever else writes it."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with aside.open("wb") as file:
            np.savez(file, **arrays)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _are_edges(edges: np.ndarray, spans: int, total: int, least: int) -> bool:
    """Whether `edges` cut range(total) into `spans` neighbours of at least `least`."""
    return bool(len(edges) == spans + 1 and edges[0] == 0 and edges[-1] == total and (np.diff(edges) >= least).all())


@dataclass
class _Table:
    """An index in the making: finished samples, and the members of the one in hand."""

    key: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    first_member: list[int] = field(default_factory=lambda: [0])
    members: list[tuple[str, int, int, int]] = field(default_factory=list)  # suffix, offset, size, CRC
    first_part: list[int] = field(default_factory=lambda: [0])
    parts: list[tuple] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def add(self, suffix: str, offset: int, data: bytes) -> None:
        self.members.append((suffix, offset, len(data), zlib.crc32(data)))
        self.files[suffix] = data

    @property
    def size(self) -> int:
        """Bytes of the sample in hand."""
        return sum(map(len, self.files.values()))

    def finish(self, layout: Layout) -> None:
        """The members of a sample are all there."""
        if self.key is None:
            return
        try:
            entries = layout.entries(self.files)
            check_entries(entries, self.files)
            layout.content(self.files)  # what cannot be read later is faulty now
            self.parts += _rows(entries, self.files)
            self.faults.append(("", ""))
        except BadMedia as error:
            self.faults.append((error.reason, str(error)))
        self.keys.append(self.key)
        self.first_member.append(len(self.members))
        self.first_part.append(len(self.parts))
        self.files = {}

    def index(self, layout: Layout, tar_size: int) -> ShardIndex:
        suffixes, offsets, sizes, crcs = zip(*self.members, strict=True) if self.members else ((), (), (), ())
        reasons, details = zip(*self.faults, strict=True) if self.faults else ((), ())
        return ShardIndex(
            keys=np.array(self.keys, dtype=bytes),
            first_member=np.array(self.first_member, dtype=np.int64),
            suffixes=np.array(suffixes, dtype=bytes),
            offsets=np.array(offsets, dtype=np.int64),
            sizes=np.array(sizes, dtype=np.int64),
            crcs=np.array(crcs, dtype=np.int64),
            first_part=np.array(self.first_part, dtype=np.int64),
            parts=np.array(self.parts, dtype=PART),
            reasons=np.array(reasons, dtype=bytes),
            details=np.array([detail.encode(errors="replace") for detail in details], dtype=bytes),
            layout=np.array(layout.signature.encode()),
            tar_size=np.array(tar_size),
            version=np.array(FORMAT),
        )


def _rows(entries: list[Entry], files: Mapping[str, bytes]) -> list[tuple]:
    """Entries as rows of PART."""
    member = {name: number for number, name in enumerate(files)}
    return [(e.kind, e.predict, member.get(e.file, -1), e.width, e.height, e.rate, e.samples, e.start, e.stop) for e in entries]
