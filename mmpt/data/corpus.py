"""The documents of one split, by number.

spec, split --Corpus.open--> indices of its shards --read--> Sample --document--> Document, its media still encoded
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mmpt.data.cache import Cache
from mmpt.data.documents import Layout, layout_of
from mmpt.data.faults import BadMedia
from mmpt.data.index import ShardIndex, index_name, write_arrays
from mmpt.data.spec import IN_PLACE, DataSpec
from mmpt.data.storage import Storage
from mmpt.data.tokens import Tokenizer
from mmpt.types import AUDIO, IMAGE, TEXT, Audio, Document, Image, Part, Sample, Text, UserError, Video

MAX_TOKENS_A_BYTE = 4  # a tokenizer may write out some characters first; a byte-level one makes 1 at most
Progress = Callable[[int, int], None]
"""Told how many shards are done, and how many there are."""


class Corpus:
    """All documents of one split. May be pickled and forked."""

    def __init__(self, spec: DataSpec, storage: Storage, names: Sequence[str], shards: Sequence[ShardIndex]) -> None:
        self.spec, self.name, self.layout = spec, spec.name, layout_of(spec)
        self.storage, self.names, self.shards = storage, list(names), list(shards)
        self.starts = np.cumsum([0, *map(len, shards)])  # number of the first document of each shard
        self.parts = np.concatenate([shard.parts for shard in shards])
        self.first_part = _joined_edges([shard.first_part for shard in shards])

    @classmethod
    def open(
        cls, spec: DataSpec, split: str, cache: Cache | None = None, workers: int = 0, progress: Progress | None = None
    ) -> Corpus:
        """Load the indices of a split's shards, and make those that are missing or stale, in `workers` processes.

        Raises UserError where a shard is missing, damaged or unsafe.
        """
        if spec.format not in IN_PLACE:
            mend = f"`mmpt data build {spec.path} --out DIR` converts it"
            raise UserError(f"spec {spec.path}: format {spec.format} is not read in place; {mend}")
        storage, names = Storage.of(spec.root, cache), spec.shard_names(split)
        _refuse_missing(spec, storage, names, split)
        make = partial(shard_index, storage, layout_of(spec))
        return cls(spec, storage, names, over_shards(make, names, workers, progress))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """Of shard names and indices: what decides which document has which number, and how large it is."""
        digest = blake2b(digest_size=8)
        for name, index in zip(self.names, self.shards, strict=True):
            digest.update(f"{name} {index.fingerprint} ".encode())
        return digest.hexdigest()

    def token_counts(self, tokenizer: Tokenizer, workers: int = 0, progress: Progress | None = None) -> Int[np.ndarray, " parts"]:
        """Tokens of every text part, 0 for media; from the sidecars of this tokenizer, which are made where they are missing."""
        count = partial(_shard_counts, self, tokenizer)
        return np.concatenate(over_shards(count, range(len(self.shards)), workers, progress))

    def shard_of(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def key(self, number: int) -> str:
        shard = self.shard_of(number)
        return self.shards[shard].keys[number - self.starts[shard]].decode()

    def read(self, number: int) -> Sample:
        """Sample `number` with all its members: views into one buffer, which one read has filled."""
        shard = self.shard_of(number)
        index, local = self.shards[shard], number - int(self.starts[shard])
        members = slice(int(index.first_member[local]), int(index.first_member[local + 1]))
        offsets, sizes = index.offsets[members].tolist(), index.sizes[members].tolist()
        start = offsets[0]
        data = memoryview(bytearray(offsets[-1] + sizes[-1] - start))
        self.storage.pread_into(self.names[shard], data, start)
        views = (data[offset - start : offset - start + size] for offset, size in zip(offsets, sizes, strict=True))
        fields = dict(zip((name.decode() for name in index.suffixes[members]), views, strict=True))
        return Sample(key=index.keys[local].decode(), shard=self.names[shard], fields=fields)

    def document(self, number: int) -> Document:
        """Document `number`. Its texts are checked against the index, its media are not: see `Image.crc32`.

        Raises BadMedia for a document that is faulty in the index, or whose texts have changed since.
        """
        shard = self.shard_of(number)
        index, local = self.shards[shard], number - int(self.starts[shard])
        if index.reasons[local]:
            raise BadMedia(index.reasons[local].decode(), index.details[local].decode(errors="replace"))
        sample = self.read(number)
        crcs = index.crcs[index.first_member[local] : index.first_member[local + 1]].tolist()
        rows = index.parts[index.first_part[local] : index.first_part[local + 1]]
        media = set(rows["member"][rows["kind"] != TEXT].tolist())
        for member, (name, data) in enumerate(sample.fields.items()):
            if member not in media and zlib.crc32(data) != crcs[member]:
                raise BadMedia("crc", f"{name} has changed since it was indexed")
        texts, meta = self._content(sample, int(np.count_nonzero(rows["kind"] == TEXT)))
        remaining = iter(texts)
        files = list(sample.fields.values())
        parts = tuple(_part(row, files, crcs, remaining) for row in rows.tolist())
        return Document(key=sample.key, source=self.name, parts=parts, meta=meta)

    def _content(self, sample: Sample, texts: int) -> tuple[list[str], Mapping[str, Any]]:
        """Texts and meta. Raises BadMedia where the index tells of another document: sidecars come from strangers too."""
        try:
            found, meta = self.layout.content(sample.fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadMedia("json", "it is not the document that was indexed") from error
        if len(found) != texts:
            raise BadMedia("json", f"it has {len(found)} texts, and {texts} were indexed")
        return found, meta

    def close(self) -> None:
        self.storage.close()


def _part(row: tuple, files: list[memoryview], crcs: list[int], texts: Iterator[str]) -> Part:
    kind, predict, member, width, height, rate, samples, start, stop = row
    if kind == TEXT:
        return Text(text=next(texts), predict=predict)
    data, crc32 = files[member], crcs[member]
    if kind == IMAGE:
        return Image(data=data, crc32=crc32, width=width, height=height)
    if kind == AUDIO:
        return Audio(data=data, crc32=crc32, sample_rate=rate, samples=samples, start=start)
    return Video(data=data, crc32=crc32, width=width, height=height, clip=(start, stop))


def _joined_edges(edges: Sequence[np.ndarray]) -> Int[np.ndarray, " total_plus_1"]:
    """Edges of spans that are laid end to end."""
    starts = np.cumsum([0, *(int(each[-1]) for each in edges)])
    return np.concatenate([each[:-1] + start for each, start in zip(edges, starts, strict=False)] + [starts[-1:]])


def _refuse_missing(spec: DataSpec, storage: Storage, names: Sequence[str], split: str) -> None:
    if spec.shards.is_remote:
        return  # a question for each of perhaps a million shards; the one that is missing says so when it is fetched
    missing = [name for name in names if not storage.exists(name)]
    if missing:
        raise UserError(
            f"spec {spec.path}: shards.root {spec.shards.root!r} lacks {missing[0]}, {len(missing)} of {len(names)} shards "
            f"of split {split!r}; build them, or correct shards.root and shards.pattern"
        )


def over_shards(action: Callable, items: Sequence, workers: int, progress: Progress | None) -> list:
    """`action` of every item, in order; in processes if `workers` is over 1."""
    tell = progress or (lambda done, total: None)
    if workers < 2 or len(items) < 2:
        results = []
        for item in items:
            results.append(action(item))
            tell(len(results), len(items))
        return results
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            for done, _ in enumerate(as_completed(futures), start=1):
                tell(done, len(items))
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def shard_index(storage: Storage, layout: Layout, name: str) -> ShardIndex:
    """The sidecar's index if it fits the tar, else a new one, written where that is possible."""
    path = storage.aside(name, index_name(name))
    if storage.is_remote and not path.is_file() and storage.exists(index_name(name)):
        path = storage.local_path(index_name(name))  # it was put beside the tar, and saves fetching that
    if path.is_file():
        found = ShardIndex.load(path)
        if found is not None and found.layout == layout.signature.encode() and _is_fresh(storage, name, path, found):
            return found
    index = ShardIndex.build(storage.local_path(name), layout)
    with contextlib.suppress(OSError):  # a read-only or full disk: the index works from memory, and is made again next time
        index.save(path)
    return index


def _is_fresh(storage: Storage, name: str, path: Path, index: ShardIndex) -> bool:
    """Whether an index is its tar's. What lies aside of a remote tar carries that tar's version in its path."""
    if storage.is_remote:
        return storage.size(name) == index.tar_size
    tar = storage.local_path(name)
    # The size alone would not do: tars come in steps of 10,240 bytes, and a rewritten one often has its old size.
    return path.stat().st_mtime_ns >= tar.stat().st_mtime_ns and index.fits(tar)


def _shard_counts(corpus: Corpus, tokenizer: Tokenizer, shard: int) -> Int[np.ndarray, " parts"]:
    index, name = corpus.shards[shard], corpus.names[shard]
    path = corpus.storage.aside(name, f"{name}.tokens-{tokenizer.fingerprint}.npz")
    found = _load_counts(path, index)
    if found is None:
        found, is_whole = _count_tokens(corpus, tokenizer, shard)
        with contextlib.suppress(OSError):
            if is_whole:
                write_arrays(path, counts=found, index=np.array(index.fingerprint.encode()))
    return found


def _load_counts(path: Path, index: ShardIndex) -> Int[np.ndarray, " parts"] | None:
    """Counts that were saved for this very index, else None. Nothing in the file can run code."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                return None
        with np.load(path, allow_pickle=False) as arrays:
            counts, of = arrays["counts"], arrays["index"]
    except Exception:  # as in ShardIndex.load
        return None
    sound = counts.dtype == np.int64 and counts.shape == index.parts.shape and (counts >= 0).all()
    if not sound or of != index.fingerprint.encode() or counts[index.parts["kind"] != TEXT].any():
        return None
    tokens, size = (np.concatenate([[0], np.cumsum(each)]) for each in (counts, index.sizes))
    bound = MAX_TOKENS_A_BYTE * np.diff(size[index.first_member])
    return counts if (np.diff(tokens[index.first_part]) <= bound).all() else None


def _count_tokens(corpus: Corpus, tokenizer: Tokenizer, shard: int) -> tuple[Int[np.ndarray, " parts"], bool]:
    """And whether every text could be read: one that has changed since it was indexed counts 0, and is found out later."""
    index, start = corpus.shards[shard], int(corpus.starts[shard])
    counts, is_whole = np.zeros(len(index.parts), dtype=np.int64), True
    for local in np.flatnonzero(np.diff(index.first_part)).tolist():
        rows = slice(index.first_part[local], index.first_part[local + 1])
        if (index.parts["kind"][rows] == TEXT).any():
            try:
                parts = corpus.document(start + local).parts
            except BadMedia:
                is_whole = False
                continue
            counts[rows] = [len(tokenizer.encode(part.text)) if isinstance(part, Text) else 0 for part in parts]
    return counts, is_whole
