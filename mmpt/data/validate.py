"""Everything that is wrong with the shards of a spec, found by reading every byte; no fault hides the next one.

    NAME.tar --scan--> members --gather--> samples --_Judge--> faults of the tar, of their order, of JSON and media
    hashes of the keys of all shards --_shared_keys--> keys that stand in two shards

`ShardIndex.build` refuses a tar at its first fault, which protects a run. This lists them all, for whoever mends the data.
"""

from __future__ import annotations

import json
import reprlib
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64
from rich.table import Table
from rich.text import Text

from mmpt.data.cache import Cache
from mmpt.data.corpus import Progress, over_shards
from mmpt.data.documents import Entry, Files, check_entry, layout_of
from mmpt.data.faults import REASONS as OF_MEDIA
from mmpt.data.faults import BadMedia
from mmpt.data.media.audio import SAMPLE_RATE, decode_audio, probe_audio
from mmpt.data.media.images import decode_image
from mmpt.data.media.video import decode_video, frame_times, probe_video
from mmpt.data.names import KEY, SUFFIX, matches
from mmpt.data.spec import IN_PLACE, DataSpec
from mmpt.data.storage import Storage
from mmpt.data.tars import BLOCK, BROKEN, MAX_HEADER_BYTES, MAX_MEMBER_BYTES, Member, SmallReads
from mmpt.types import IMAGE, TEXT, VIDEO, UserError

REASONS = {
    **OF_MEDIA,
    "unreadable": "the shard, or the rest of it, is no tar",
    "truncated": "the tar is cut short",
    "trailing": "more follows after the tar's end mark: readers stop there",
    "empty": "the tar holds no samples",
    "link": "a link, folder, device or sparse file, where a plain file is wanted",
    "name": "a member's name is not KEY.suffix",
    "order": "members of a sample lie apart: a streaming reader makes several samples of it",
    "duplicate-key": "two samples have one key",
    "duplicate-member": "a sample has a member twice",
    "unnamed": "no part of the document names this member",
}

SOUND_SLACK = 0.1  # seconds by which a sound may differ from its `samples`: coders pad to whole frames
TRACK_SLACK = 0.5  # seconds by which the sound track of a clip may be shorter than its pictures
FPS_SLACK = 0.01  # relative; 29.97 may be called 30
FRAMES_SLACK = 1  # an edit list may hide the first or the last

_SIDE = 16  # pixels to which pictures are brought: all of their bytes are decoded, but little is kept
_STRETCH = 600.0  # seconds of sound decoded at once


@dataclass(frozen=True, kw_only=True)
class ShardFault:
    shard: str
    key: str  # of the document; the member's whole name where that is none; "" for the shard itself
    part: int | None  # number within the document, where it is about one
    reason: str  # one of REASONS
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    shards: int
    documents: int  # sound or not
    faults: tuple[ShardFault, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        return {**asdict(self), "reasons": self.reasons}

    @property
    def reasons(self) -> dict[str, int]:
        """Faults of each kind, the most frequent first."""
        return dict(Counter(fault.reason for fault in self.faults).most_common())


def validate(
    spec: DataSpec,
    splits: Sequence[str] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> Report:
    """Read all shards of `splits`, by default of every split, in `workers` processes; a shard of two splits once.

    Keys must be unique over all of them. Takes 8 bytes of memory per document, beside one sample per worker and the names of
    one shard's members. Raises UserError for a format that is not read in place, and for an unknown split.
    """
    if spec.format not in IN_PLACE:
        raise UserError(
            f"spec {spec.path}: format {spec.format} is not read in place; `mmpt data build {spec.path} --out DIR` converts it, "
            f"and the spec that it writes can be validated"
        )
    names = list(dict.fromkeys(name for split in splits or spec.split for name in spec.shard_names(split)))
    judged = over_shards(partial(_judge_shard, spec, cache), names, workers, progress)
    shared = _shared_keys(spec, cache, names, [each.hashes for each in judged], workers)
    return Report(
        shards=len(names),
        documents=sum(each.documents for each in judged),
        faults=tuple(fault for name, each in zip(names, judged, strict=True) for fault in (*each.faults, *shared.get(name, ()))),
    )


def render(report: Report) -> Table:
    """A line for each fault. Names and details may come from a stranger's file: no control character reaches the terminal."""
    title = f"{report.documents:,} documents of {report.shards:,} shards, faults: {len(report.faults):,}"
    counts = ", ".join(f"{count:,} {reason}" for reason, count in report.reasons.items())
    table = Table("shard", "key", "part", "reason", "detail", title=title, caption=counts or None)
    for fault in report.faults:
        cells = (fault.shard, fault.key, "" if fault.part is None else str(fault.part), fault.reason, fault.detail)
        table.add_row(*(Text(_printable(cell), overflow="fold") for cell in cells))
    return table


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass
class _Faults:
    """The faults of one shard, in the making."""

    shard: str
    found: list[ShardFault] = field(default_factory=list)

    def add(self, reason: str, detail: str, key: str = "", part: int | None = None) -> None:
        assert reason in REASONS, reason
        self.found.append(ShardFault(shard=self.shard, key=key[:200], part=part, reason=reason, detail=detail[:300]))


def _scan(path: Path, faults: _Faults) -> Iterator[Member]:
    """The plain members of a tar, in order, as far as they are whole."""
    with SmallReads(path) as file:
        size, offset = path.stat().st_size, 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                # Not `for info in archive`, which keeps every header it has seen.
                while (info := archive.next()) is not None:
                    archive.members.clear()
                    if info.size < 0:
                        raise ValueError(f"member {info.name!r} of {info.size} bytes")
                    if archive.offset > size:
                        faults.add("truncated", f"it ends within member {info.name!r}, at byte {size:,} of {archive.offset:,}")
                        return
                    offset = archive.offset
                    if member := _member(info, faults):
                        yield member
        except (*BROKEN, OSError) as error:
            faults.add("unreadable", f"no tar from byte {offset:,} on: {error or type(error).__name__}")
            return
        _check_end(file, offset, faults)


def _member(info: tarfile.TarInfo, faults: _Faults) -> Member | None:
    key, dot, suffix = info.name.partition(".")
    if not info.isfile() or info.issparse():
        faults.add("link", f"{info.name!r} is not a plain file", key=info.name)
    elif not dot or not matches(KEY, key) or not matches(SUFFIX, suffix):
        faults.add("name", f"{info.name!r}: letters, digits, '_' and '-', no folders, no dot in the key", key=info.name)
    else:
        return Member(key=key, suffix=suffix, offset=info.offset_data, size=info.size)
    return None


def _check_end(file: SmallReads, offset: int, faults: _Faults) -> None:
    """tarfile takes a damaged or cut header for the end of the tar, and so do the readers that are built on it."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        faults.add("truncated", f"it ends at byte {offset + len(block):,}, where a member or the end mark is wanted")
    elif block != bytes(BLOCK):
        faults.add("unreadable", f"the header at byte {offset:,} is damaged; what follows is not read")
    else:
        while rest := file.read(MAX_HEADER_BYTES):
            if rest.strip(b"\0"):
                faults.add("trailing", f"more follows after the end mark at byte {offset:,}; give joined tars as a shard each")
                return


def _gather(members: Iterable[Member], faults: _Faults) -> list[tuple[str, dict[str, Member]]]:
    """The members of each sample, by suffix, wherever in the tar they lie."""
    samples: list[tuple[str, dict[str, Member]]] = []
    newest: dict[str, dict[str, Member]] = {}  # the last sample of each key
    apart: set[str] = set()
    last = None
    for member in members:
        files = newest.get(member.key)
        if files is not None and member.suffix in files and member.key == last:
            faults.add("duplicate-member", f"member {member.suffix} stands there twice", key=member.key)
            continue
        if files is None or member.suffix in files:
            if files is not None:
                faults.add("duplicate-key", "another sample of this shard has the key", key=member.key)
            files = newest[member.key] = {}
            samples.append((member.key, files))
        elif member.key != last and member.key not in apart:
            apart.add(member.key)
            faults.add("order", f"member {member.suffix} lies apart from the others of its sample", key=member.key)
        files[member.suffix] = member
        last = member.key
    if not samples and not faults.found:
        faults.add("empty", "it holds no samples")
    return samples


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What a worker found in one shard."""

    documents: int
    faults: list[ShardFault]
    hashes: UInt64[np.ndarray, " keys"]  # of the shard's keys, each once


def _judge_shard(spec: DataSpec, cache: Cache | None, name: str) -> _Judged:
    storage, faults = Storage.of(spec.root, cache), _Faults(name)
    samples: list[tuple[str, dict[str, Member]]] = []
    try:
        if not storage.exists(name):
            faults.add("missing", "no such shard")
        else:
            samples = _gather(_scan(storage.local_path(name), faults), faults)
            judge = _Judge(spec, storage, faults)
            for key, members in samples:
                judge.sample(key, members)
    except UserError as error:  # a link that leaves the root, no permission, a disk that fails
        faults.add("unreadable", str(error))
    finally:
        storage.close()
    hashes = np.unique(np.array([_hash(key) for key, _ in samples], dtype=np.uint64))
    return _Judged(documents=len(samples), faults=faults.found, hashes=hashes)


class _Judge:
    """Finds what is wrong with the samples of a shard."""

    def __init__(self, spec: DataSpec, storage: Storage, faults: _Faults) -> None:
        self.spec, self.storage, self.faults, self.layout = spec, storage, faults, layout_of(spec)

    def sample(self, key: str, members: Mapping[str, Member]) -> None:
        for member in members.values():
            if member.size > MAX_MEMBER_BYTES:
                self.faults.add("limit", f"{member.suffix}: {member.size:,} bytes, {MAX_MEMBER_BYTES:,} are read", key=key)
                return
        files = {member.suffix: self.storage.pread(self.faults.shard, member.size, member.offset) for member in members.values()}
        try:
            entries = self.layout.entries(files)
            self.layout.content(files)
        except BadMedia as error:
            self.faults.add(error.reason, str(error), key=key)
            return
        claims = _claims(files) if self.spec.format == "interleaved" else [{}] * len(entries)
        for number, (entry, claim) in enumerate(zip(entries, claims, strict=True)):
            try:
                self._part(number, entry, claim, files)
            except BadMedia as error:
                self.faults.add(error.reason, str(error), key=key, part=number)
        if self.spec.format == "interleaved":  # a pair may carry more than is wanted of it
            for suffix in sorted(set(files) - {"json"} - {entry.file for entry in entries}):
                self.faults.add("unnamed", f"member {suffix}: no part names it", key=key)

    def _part(self, number: int, entry: Entry, claim: Mapping[str, Any], files: Files) -> None:
        """Raises BadMedia for the first fault of a part."""
        if entry.kind == TEXT:
            return
        check_entry(number, entry, files)
        data = files[entry.file]
        if entry.kind == IMAGE:
            decode_image(data, _SIDE, _SIDE)
        elif entry.kind == VIDEO:
            _check_video(entry, claim, data)
            times = frame_times((entry.start, entry.stop), self.spec.video.fps, self.spec.video.max_frames)
            decode_video(data, times, _SIDE, _SIDE)
        elif claim.get("type") == "video":
            _check_seconds(entry, _sound_seconds(data, entry.start, entry.stop), TRACK_SLACK)
        else:
            info = probe_audio(data)
            if info.sample_rate != entry.rate:
                raise BadMedia("size", f"{entry.file}: sample_rate = {entry.rate}, but it has {info.sample_rate} Hz")
            _check_seconds(entry, _sound_seconds(data, 0.0, info.samples / info.sample_rate), SOUND_SLACK)


def _claims(files: Files) -> list[dict[str, Any]]:
    """The part of the JSON that each entry comes from: a video with a sound track makes two."""
    parts = json.loads(bytes(files["json"]))["parts"]
    return [part for part in parts for _ in range(2 if part["type"] == "video" and part.get("audio", False) else 1)]


def _sound_seconds(data: bytes, start: float, stop: float) -> float:
    """Seconds that the decoder gives between two instants: a stretch at a time, so that hours of sound take little memory."""
    samples, at = 0, start
    while at < stop:
        samples += len(decode_audio(data, start=at, seconds=min(_STRETCH, stop - at)))
        at += _STRETCH
    return samples / SAMPLE_RATE


def _check_seconds(entry: Entry, seconds: float, slack: float) -> None:
    claimed = entry.samples / entry.rate
    if abs(claimed - seconds) > slack:
        raise BadMedia("size", f"{entry.file}: {claimed:.2f} seconds by its JSON, but the decoder gives {seconds:.2f}")


def _check_video(entry: Entry, claim: Mapping[str, Any], data: bytes) -> None:
    info = probe_video(data)
    if (info.width, info.height) != (entry.width, entry.height):
        raise BadMedia("size", f"{entry.file}: wh = [{entry.width}, {entry.height}], but it is {info.width} x {info.height}")
    if entry.stop > info.seconds + max(SOUND_SLACK, 1 / info.fps):
        raise BadMedia("size", f"{entry.file}: clip ends at {entry.stop:g} s, but the video at {info.seconds:g}")
    for name, found, slack in (("fps", info.fps, FPS_SLACK * info.fps), ("frames", info.frames, FRAMES_SLACK)):
        value = claim.get(name, found)
        if type(value) not in (int, float):
            raise BadMedia("json", f"{entry.file}: {name} = {reprlib.repr(value)}: a number is wanted")
        if not found - slack <= value <= found + slack:  # NaN fails; no arithmetic on a value of any number of digits
            raise BadMedia("size", f"{entry.file}: {name} = {reprlib.repr(value)}, but it has {found:g}")


def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")


def _shared_keys(
    spec: DataSpec, cache: Cache | None, names: Sequence[str], hashes: Sequence[np.ndarray], workers: int
) -> dict[str, list[ShardFault]]:
    """Keys that stand in several shards, as faults of each shard but the first. Shards with equal hashes are read for names."""
    everything = np.concatenate([*hashes, np.zeros(0, dtype=np.uint64)])
    everything.sort()
    shared = np.unique(everything[1:][everything[1:] == everything[:-1]])
    concerned = [name for name, each in zip(names, hashes, strict=True) if len(shared) and np.isin(each, shared).any()]
    first: dict[str, str] = {}  # shard that has the key first
    found: dict[str, list[ShardFault]] = {}
    keys_of = over_shards(partial(_keys_among, spec, cache, shared), concerned, workers, None)
    for name, keys in zip(concerned, keys_of, strict=True):
        faults = _Faults(name)
        for key in keys:
            if first.setdefault(key, name) != name:
                faults.add("duplicate-key", f"shard {first[key]} has the key as well", key=key)
        found[name] = faults.found
    return found


def _keys_among(spec: DataSpec, cache: Cache | None, wanted: UInt64[np.ndarray, " n"], name: str) -> list[str]:
    """The keys of a shard whose hashes are wanted, in order, each once."""
    storage = Storage.of(spec.root, cache)
    keys = dict.fromkeys(member.key for member in _scan(storage.local_path(name), _Faults(name)))
    chosen = np.isin(np.array([_hash(key) for key in keys], dtype=np.uint64), wanted)
    return [key for key, is_wanted in zip(keys, chosen, strict=True) if is_wanted]
