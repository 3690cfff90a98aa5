"""Writing canonical shards: plain WebDataset tars, the document's JSON first, an index beside each.

(key, document, files) --ShardWriter--> NAME-00000.tar + NAME-00000.tar.index.npz
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from webdataset import TarWriter

from mmpt.data.documents import Interleaved
from mmpt.data.index import ShardIndex, index_name
from mmpt.data.names import KEY, SUFFIX, matches

MAX_NAME = 100  # characters of a member's name in a plain (ustar) tar


class ShardWriter:
    """Writes samples in order into NAME-00000.tar, NAME-00001.tar, ...: the same samples make the same bytes.

    A shard grows under another name and is renamed once it is whole and indexed.
    """

    def __init__(self, folder: Path, prefix: str, samples_per_shard: int, finished: Sequence[Path] = ()) -> None:
        """`finished`: shards that were written before, behind which this goes on."""
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard = {samples_per_shard}: 1 or more is wanted")
        self.folder, self.prefix, self.samples_per_shard = Path(folder), prefix, samples_per_shard
        self.shards = list(finished)
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._keys: set[str] = set()  # of the shard in hand
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, document: dict[str, Any], files: dict[str, bytes]) -> None:
        """Append one sample; `files` are its members by suffix, as the document's parts name them.

        Raises ValueError, with nothing written, for a bad name, a key that the shard has already, or a document that is not JSON.
        """
        self._check_names(key, files)
        members = {"json": json.dumps(document, ensure_ascii=False, allow_nan=False).encode(), **files}
        if self._tar is None:
            # The file is opened here: TarWriter itself would take a path that begins with "pipe:" for a command.
            self._file = _aside(self._next).open("wb")
            self._tar = TarWriter(self._file, user="mmpt", group="mmpt", mode=0o644, mtime=0, encoder=False)
        # One member at a time: TarWriter sorts a sample's members by name, and the JSON must come first.
        for suffix, data in members.items():
            self._tar.write({"__key__": key, suffix: data})
        self._keys.add(key)
        if len(self._keys) == self.samples_per_shard:
            self._finish_shard()

    def _check_names(self, key: str, files: dict[str, bytes]) -> None:
        if not matches(KEY, key):
            raise ValueError(f"key {key!r}: letters, digits, '_' and '-' only, as webdataset splits names at the first dot")
        if key in self._keys:
            raise ValueError(f"key {key!r} is in this shard already; a document needs a key of its own")
        for suffix in files:
            # webdataset drops members whose suffix begins with '_'.
            if not matches(SUFFIX, suffix) or suffix == "json" or suffix.startswith("_"):
                raise ValueError(f"member {suffix!r} of {key}: a suffix such as 000.png is wanted")
        longest = max((f"{key}.{suffix}" for suffix in ("json", *files)), key=len)
        if len(longest) > MAX_NAME:
            raise ValueError(f"member {longest!r}: {len(longest)} characters, a tar takes {MAX_NAME}; shorten the key")

    @property
    def _next(self) -> Path:
        return self.folder / f"{self.prefix}-{len(self.shards):05d}.tar"

    def _close(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            self._file.close()
        self._tar, self._file, self._keys = None, None, set()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._close()
        path = self._next
        index = ShardIndex.build(_aside(path), Interleaved())
        sidecar = path.with_name(index_name(path.name))
        sidecar.unlink(missing_ok=True)
        _aside(path).rename(path)
        index.save(sidecar)
        self.shards.append(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish_shard()
        else:
            self._close()
            _aside(self._next).unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".part")
