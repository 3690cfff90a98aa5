"""A source in its published format to canonical shards, row after row; stopped anywhere, it goes on after the last whole shard.

    spec --Inputs--> files, cut into segments where a split begins or ends
    segment --Reader.rows, Reader.draft--> documents --ShardWriter--> NAME-00000.tar, ...     each shard: DIR/build.json
                                       \\--> what was wrong, row by row                        DIR/build_faults.jsonl
    all segments --> DIR/spec.yaml: the same splits, format interleaved

Shards end at 2,048 documents, at 1 GiB, and where a segment ends, so a split is a range of shards. All of it follows from the
inputs alone: the folder is the same to the byte however often the build was stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from mmpt.data.faults import BadMedia
from mmpt.data.shards import ShardWriter
from mmpt.data.spec import IN_PLACE, DataSpec
from mmpt.recipes.csv_table import CsvReader
from mmpt.recipes.draft import Draft, Reader
from mmpt.recipes.inputs import Inputs, split_range
from mmpt.recipes.llava import LlavaReader
from mmpt.recipes.mmc4 import Mmc4Reader
from mmpt.recipes.obelics import ObelicsReader
from mmpt.recipes.text import TextReader
from mmpt.types import UserError

READERS: dict[str, type[Reader]] = {
    "text": TextReader,
    "mmc4": Mmc4Reader,
    "obelics": ObelicsReader,
    "llava": LlavaReader,
    "csv": CsvReader,
}
VERSION = 1  # of what a build writes for given inputs
DOCUMENTS_PER_SHARD = 2048
SHARD_BYTES = 1 << 30
ROWS_PER_REPORT = 64
FIRST_FAULTS = 3  # named where a build fails
MAX_DETAIL = 300  # characters
STATE, FAULTS, SPEC = "build.json", "build_faults.jsonl", "spec.yaml"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a build is, those before it that it goes on with counted in."""

    documents: int
    skipped: int  # rows that made no document
    left_out: int  # pictures that documents had to do without
    files_done: int
    files: int
    bytes_done: int  # of the input files
    bytes_total: int


def build_spec(spec: DataSpec, out: Path, progress: Callable[[Progress], None] | None = None) -> Path:
    """Write the source of `spec` into `out` as interleaved shards, or go on with it. Returns the path of its new spec.

    Raises UserError for a format that needs no build, inputs that are missing or damaged, a folder that holds something else, and
    a file of whose rows more than `on_bad.max_fraction` are bad.
    """
    if spec.format in IN_PLACE:
        raise UserError(f"spec {spec.path}: format {spec.format} is read as it lies; there is nothing to build")
    inputs = Inputs.of(spec)
    if (out / SPEC).resolve() == spec.path.resolve():
        raise UserError(f"--out {out}: it holds {SPEC} itself, which would be overwritten; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        return _Build(spec, out, inputs, progress).run()


@dataclass(kw_only=True)
class State:
    """Where a build stands after its last whole shard: DIR/build.json."""

    fingerprint: str
    file: int = 0  # number of the input that is being read
    row: int = 0  # its next row
    rows: int = 0  # of that input, read so far
    bad: int = 0  # of those, skipped
    shards: int = 0
    cuts: list[int] = field(default_factory=list)  # shards there were at the end of each finished segment
    documents: int = 0
    skipped: int = 0
    left_out: int = 0
    fault_bytes: int = 0  # of DIR/build_faults.jsonl

    def begin_file(self, number: int) -> None:
        self.file, self.row, self.rows, self.bad = number, 0, 0, 0

    @classmethod
    def resume(cls, spec: DataSpec, out: Path, fingerprint: str) -> State:
        """The state that a folder was left in. Raises UserError where it is another build's, or not whole."""
        if not (out / STATE).is_file():
            if (out / SPEC).exists() or any(out.glob(f"{spec.name}-*.tar")):
                raise UserError(f"{out} holds shards or a spec that no build of this spec began; choose another --out")
            return cls(fingerprint=fingerprint)
        try:
            state = cls(**json.loads((out / STATE).read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{out / STATE} is not the record of a build; remove {out} or choose another --out") from error
        if state.fingerprint != fingerprint:
            raise UserError(
                f"{out} was begun from another spec than {spec.path}, or from other files; remove it or choose another --out"
            )
        if gone := [path for path in _shards(spec, out, state.shards) if not path.is_file()]:
            raise UserError(f"{gone[0]} is gone, which this build wrote; remove {out} and build anew")
        return state


def _fingerprint(spec: DataSpec, inputs: Inputs) -> str:
    """Of all that decides what the shards hold; the limits of media and of faults do not, and may change on the way."""
    fields = {"version", "name", "format", "shards", "map", "templates", "placement", "split"}
    told = [VERSION, DOCUMENTS_PER_SHARD, SHARD_BYTES, spec.model_dump(mode="json", include=fields), sorted(inputs.sizes.items())]
    return blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def _shards(spec: DataSpec, out: Path, count: int) -> list[Path]:
    return [out / f"{spec.name}-{number:05d}.tar" for number in range(count)]


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keeps a second build out of the folder. The lock goes with the process, however that ends."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another build is writing there; wait for it, or choose another --out") from error
        yield
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class _Build:
    def __init__(self, spec: DataSpec, out: Path, inputs: Inputs, progress: Callable[[Progress], None] | None) -> None:
        self.spec, self.out, self.inputs, self.progress = spec, out, inputs, progress
        self.reader = READERS[spec.format](spec)
        self.state = State.resume(spec, out, _fingerprint(spec, inputs))
        for stray in out.glob("*.part"):  # of a build that was killed
            stray.unlink()
        self.writer = ShardWriter(out, spec.name, DOCUMENTS_PER_SHARD, finished=_shards(spec, out, self.state.shards))
        self.faults = (out / FAULTS).open("ab")
        self.faults.truncate(self.state.fault_bytes)  # what was found after the last whole shard is found again
        self.faults.seek(self.state.fault_bytes)

    def run(self) -> Path:
        with closing(self.faults):
            self._save()
            for segment in self.inputs.segments[len(self.state.cuts) :]:
                with closing(self._documents(segment)) as documents:
                    while self._write_shard(documents):
                        self._save()
                self.state.cuts.append(self.state.shards)
                self._save()
        self._report(done=self.state.file, position=0)
        _replace(self.out / SPEC, self._new_spec())
        return self.out / SPEC

    def _save(self) -> None:
        self.faults.flush()
        os.fsync(self.faults.fileno())
        self.state.fault_bytes = self.faults.tell()
        _replace(self.out / STATE, json.dumps(asdict(self.state), indent=1) + "\n")

    def _write_shard(self, documents: Iterator[tuple[dict[str, Any], Draft]]) -> bool:
        """Write the next shard; False if no document was left for one."""
        size = count = 0
        with self.writer:
            for document, draft in documents:
                self.writer.write(document["id"], document, draft.files)
                count, size = count + 1, size + draft.bytes
                if count == DOCUMENTS_PER_SHARD or size >= SHARD_BYTES:
                    break
        self.state.shards = len(self.writer.shards)
        return count > 0

    def _documents(self, segment: range) -> Iterator[tuple[dict[str, Any], Draft]]:
        """Documents of a segment from the state on; the state stands behind each as it is given."""
        if self.state.file < segment.start:
            self.state.begin_file(segment.start)
        while self.state.file < segment.stop:
            number = self.state.file
            if number in self.inputs.sizes:
                with (self.inputs.root / self.inputs.names[number]).open("rb") as file:
                    yield from self._documents_of(file)
                self._check_rows(number)
            else:
                self._note(BadMedia("missing", "no such input file"), row=None)
            self.state.begin_file(number + 1)

    def _documents_of(self, file: BinaryIO) -> Iterator[tuple[dict[str, Any], Draft]]:
        for number, row in self.reader.rows(file, self.state.row):
            if self.state.rows % ROWS_PER_REPORT == 0:
                self._report(self.state.file, file.tell())
            self.state.row, self.state.rows = number + 1, self.state.rows + 1
            try:
                key = f"{self.state.file:05d}-{number:08d}"
                if isinstance(row, BadMedia):
                    raise row
                draft = self.reader.draft(key, row)
                document = draft.document(key)
            except BadMedia as fault:
                self.state.skipped, self.state.bad = self.state.skipped + 1, self.state.bad + 1
                self._note(fault, number)
                continue
            for fault in draft.left_out:
                self._note(fault, number, left_out="picture")
            self.state.documents, self.state.left_out = self.state.documents + 1, self.state.left_out + len(draft.left_out)
            yield document, draft

    def _note(self, fault: BadMedia, row: int | None, **more: str) -> None:
        name = self.inputs.names[self.state.file]
        told = {"file": name, "row": row, "reason": fault.reason, "detail": str(fault)[:MAX_DETAIL], **more}
        self.faults.write(json.dumps(told).encode() + b"\n")

    def _check_rows(self, number: int) -> None:
        """Raises UserError where too many of an input's rows were bad."""
        rows, bad, most = self.state.rows, self.state.bad, self.spec.on_bad.max_fraction
        if bad <= most * rows:
            return
        self.faults.flush()
        name, first = self.inputs.names[number], []
        with (self.out / FAULTS).open("rb") as file:
            for line in file:
                fault = json.loads(line)
                if fault["file"] == name and "left_out" not in fault and len(first) < FIRST_FAULTS:
                    first.append(f"row {fault['row']}: {fault['reason']}: {fault['detail']}")
        raise UserError(
            f"{self.inputs.root / name}: {bad:,} of {rows:,} rows are bad, and on_bad.max_fraction = {most}; "
            f"{'; '.join(first)}; all are in {self.out / FAULTS}"
        )

    def _report(self, done: int, position: int) -> None:
        if not self.progress:
            return
        files, before = self.inputs.before(done)
        self.progress(
            Progress(
                documents=self.state.documents,
                skipped=self.state.skipped,
                left_out=self.state.left_out,
                files_done=files,
                files=len(self.inputs.sizes),
                bytes_done=before + position,
                bytes_total=sum(self.inputs.sizes.values()),
            )
        )

    def _new_spec(self) -> str:
        """The spec of the shards. Raises UserError for a split that no document came into."""
        cuts, last = {}, 0  # number of an input, where a segment begins or ends -> shards that hold what came before it
        for segment, cut in zip(self.inputs.segments, self.state.cuts, strict=True):
            cuts[segment.start], cuts[segment.stop] = last, cut
            last = cut
        splits = {}
        for name in self.spec.split:
            files = split_range(self.spec, name)
            splits[name] = f"{cuts[files.start]}:{cuts[files.stop]}"
            if cuts[files.start] == cuts[files.stop]:
                raise UserError(f"spec {self.spec.path}: no row of split {name!r} made a document; see {self.out / FAULTS}")
        tree = {
            "version": 1,
            "name": self.spec.name,
            "format": "interleaved",
            "shards": {"root": ".", "pattern": f"{self.spec.name}-{{00000..{self.state.shards - 1:05d}}}.tar"},
            "split": splits,
            **self.spec.model_dump(mode="json", include={"image", "audio", "video", "on_bad"}, exclude_defaults=True),
        }
        return f"# Written by `mmpt data build` from format {self.spec.format}.\n" + yaml.safe_dump(tree, sort_keys=False)
