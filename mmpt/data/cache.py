"""Copies of remote files on the local disk: bounded, shared by processes, never read before they are whole.

KEY, size, chunks of bytes --Cache.open--> a descriptor of the copy, which is made where it is not there
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmpt.types import UserError

KEY, PART = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{32}\.part")
"""Names of what is ours in the folder: nothing else is counted or removed."""


@dataclass(frozen=True)
class Cache:
    """Copies of remote files in a folder, `max_bytes` of them at most; several processes may share it.

    KEY       a whole copy; KEY is a hash, so no name from outside names a file here
    KEY.part  a copy in progress, as large as it will be; its lock is held by the process that makes it
    lock      held while names come and go

    A file that is removed to make room takes its disk space until the last process that reads it lets it go.
    """

    path: Path
    max_bytes: int

    def open(self, key: str, size: int, what: str, chunks: Callable[[], Iterator[bytes]]) -> int:
        """A descriptor of the copy `key`, made of `chunks()` where it is not there; `size` bytes. Raises UserError."""
        if size > self.max_bytes:
            raise UserError(
                f"{what}: {size:,} bytes do not fit the cache of {self.max_bytes:,}; set data.cache_gib to more than "
                f"{size / 2**30:.3g}, or write smaller shards"
            )
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            while True:
                with _locked(self.path / "lock"):
                    if (file := self._held(key, size)) is not None:
                        return file
                    busy = self._make_room(key, size)
                    if busy is None:
                        file = self._start(key, size)
                        break
                _wait_for(busy)
            return self._finish(key, file, chunks())
        except OSError as error:
            mend = "free space there, or set data.cache to another folder"
            raise UserError(f"cache {self.path}: {os.strerror(error.errno)}; {mend}") from None

    def _held(self, key: str, size: int) -> int | None:
        try:
            file = os.open(self.path / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != size:  # not as it was left; made again
            os.close(file)
            (self.path / key).unlink()
            return None
        touch(file)
        return file

    def _make_room(self, key: str, size: int) -> Path | None:
        """Remove the least recently used copies until `size` bytes fit; or the copy in progress that must end first."""
        parts = [path for path in self.path.iterdir() if PART.fullmatch(path.name) and not _removed_as_abandoned(path)]
        if (own := self.path / f"{key}.part") in parts:
            return own
        entries = [(path, path.lstat()) for path in self.path.iterdir() if KEY.fullmatch(path.name)]
        free = self.max_bytes - sum(found.st_size for _, found in entries) - sum(part.lstat().st_size for part in parts)
        for path, found in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if free >= size:
                break
            path.unlink()
            free += found.st_size
        return None if free >= size else parts[0]

    def _start(self, key: str, size: int) -> int:
        file = os.open(self.path / f"{key}.part", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.ftruncate(file, size)  # the others count it as if it were there already
        return file

    def _finish(self, key: str, file: int, chunks: Iterator[bytes]) -> int:
        part, offset = self.path / f"{key}.part", 0
        try:
            for chunk in chunks:
                while chunk:
                    written = os.pwrite(file, chunk, offset)
                    chunk, offset = chunk[written:], offset + written
            assert offset == os.fstat(file).st_size
            touch(file)
            os.fsync(file)  # else a crash could leave a copy of the right size without its bytes
            with _locked(self.path / "lock"):
                part.rename(self.path / key)
        except BaseException:
            with _locked(self.path / "lock"):
                part.unlink(missing_ok=True)
            os.close(file)
            raise
        fcntl.flock(file, fcntl.LOCK_UN)
        return file


def touch(file: int) -> None:
    """Mark a copy as used now; by our clock, as the system's steps by milliseconds."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would not do, if a fork has copied the descriptor
        os.close(file)


def _wait_for(part: Path) -> None:
    """Until the process that copies it is done, or gone: its lock goes with it."""
    try:
        file = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    fcntl.flock(file, fcntl.LOCK_SH)
    os.close(file)


def _removed_as_abandoned(part: Path) -> bool:
    file = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        part.unlink()
        return True
    finally:
        os.close(file)
