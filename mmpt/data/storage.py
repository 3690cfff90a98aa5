"""Where the bytes of a source lie: below a local folder, or below a remote address, whose files are copied into a cache.

Storage.of(root) --LocalStorage:  name -> file below root -----------------------> pread_into
                 `-RemoteStorage: name -> range requests -> Cache (on disk, bounded) -^

What fails for a moment is tried again, so that no file is called bad because a disk or a network was.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mmpt.data.cache import Cache, touch
from mmpt.data.retry import is_missing, retrying
from mmpt.data.spec import REMOTE
from mmpt.types import UserError

MAX_OPEN = 128  # files; systems allow 256 to 1,024 to a process
CHUNK = 8 << 20  # bytes of a range request: what is lost where a connection drops

DRIVERS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "az": ("adlfs", "az"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
"""Protocol -> the package that speaks it, and the extra of mmpt that installs it."""

CHECKSUMS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "Last-Modified", "last_modified")
"""What file systems call that which changes with an object's content, best first."""


class ShortRead(UserError):
    """A file ends before the bytes that an index promises."""


class _Handle:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.file)


class Storage(ABC):
    """The files below one root, by name. May be pickled and forked: what is open belongs to a process.

    Names are relative, with '/' between folders; one that leaves the root is refused. All methods raise UserError, which
    names the file, for what is missing, refused, or still failing after TRIES tries.
    """

    is_remote: bool

    def __init__(self, root: str) -> None:
        self.root = root
        self._address = _shown(root)
        self.sleep: Callable[[float], None] = time.sleep  # between tries
        self._handles: dict[str, _Handle] = {}  # least recently used first
        self._pid = os.getpid()

    @classmethod
    def of(cls, root: str, cache: Cache | None = None) -> Storage:
        """The storage of a folder, or of an address (s3://, gs://, az://, http(s)://), which needs a cache."""
        if not REMOTE.fullmatch(root):
            if "://" in root:
                raise UserError(f"root {_shown(root)}: {', '.join(f'{name}://' for name in DRIVERS)} or a folder is wanted")
            return LocalStorage(root)
        if cache is None:
            raise UserError(f"root {_shown(root)}: a remote root needs a cache; set data.cache to a folder")
        return RemoteStorage(root, cache)

    def exists(self, name: str) -> bool:
        return self._stat(name) is not None

    def size(self, name: str) -> int:
        """In bytes."""
        return self._found(name)[0]

    def fingerprint(self, name: str) -> str:
        """Of size and time of change, or size and checksum where the root is remote: a changed file has another one."""
        return self._found(name)[1]

    @abstractmethod
    def local_path(self, name: str) -> Path:
        """The file itself, or its copy in the cache: open it soon, the next copy may take its place."""

    @abstractmethod
    def aside(self, name: str, sidecar: str) -> Path:
        """Where what is made of a file is kept, under the name `sidecar`: beside it, or with its copy in the cache."""

    def pread(self, name: str, size: int, offset: int) -> bytes:
        buffer = bytearray(size)
        self.pread_into(name, memoryview(buffer), offset)
        return bytes(buffer)

    def pread_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises ShortRead where the file ends before."""
        retrying(self._shown(name), partial(self._read, name, buffer, offset), self.sleep)

    def close(self) -> None:
        self._handles = {}

    def _read(self, name: str, buffer: memoryview, offset: int) -> None:
        try:
            handle, done = self._handle(name), 0
            while done < len(buffer):
                count = os.preadv(handle.file, [buffer[done:]], offset + done)
                if not count:
                    raise ShortRead(
                        f"{self._shown(name)}: {done:,} of {len(buffer):,} bytes at {offset:,}: it was cut after it was "
                        "indexed; copy it again"
                    )
                done += count
        except OSError:
            self._handles.pop(name, None)  # a stale descriptor stays stale: the next try opens anew
            raise

    def _handle(self, name: str) -> _Handle:
        if self._pid != os.getpid():  # forked: these are the parent's
            self._handles, self._pid = {}, os.getpid()
        handle = self._handles.pop(name, None) or _Handle(self._open(_checked(name, self._address)))
        while len(self._handles) >= MAX_OPEN:
            self._handles.pop(next(iter(self._handles)), None)
        self._handles[name] = handle
        return handle

    def _found(self, name: str) -> tuple[int, str]:
        found = self._stat(name)
        if found is None:
            raise UserError(f"{self._shown(name)}: no such file; check shards.root and shards.pattern")
        return found

    @abstractmethod
    def _stat(self, name: str) -> tuple[int, str] | None:
        """Size and fingerprint, asked anew; None where there is no such file."""

    @abstractmethod
    def _open(self, name: str) -> int:
        """A new descriptor of the file, or of its copy."""

    def _shown(self, name: str) -> str:
        return f"{self._address}/{name}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}


class LocalStorage(Storage):
    """The files below a folder."""

    is_remote = False

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._folder = os.path.realpath(root)

    def local_path(self, name: str) -> Path:
        self._found(name)
        return Path(self._real(name))

    def aside(self, name: str, sidecar: str) -> Path:
        return Path(self._real(name)).with_name(Path(sidecar).name)

    def _stat(self, name: str) -> tuple[int, str] | None:
        path = self._real(name)
        found = retrying(self._shown(name), partial(_stat_or_none, path), self.sleep)
        if found is None or not stat.S_ISREG(found.st_mode):
            return None
        return found.st_size, f"{found.st_size}-{found.st_mtime_ns}"

    def _open(self, name: str) -> int:
        # Not blocking: opening a pipe would wait for whoever writes into it.
        file = os.open(self._real(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise UserError(f"{self._shown(name)}: not a plain file; give one, not a folder, pipe or device")
        return file

    def _real(self, name: str) -> str:
        path = os.path.realpath(os.path.join(self._folder, _checked(name, self._address)))
        if os.path.commonpath([path, self._folder]) != self._folder:
            raise UserError(f"{self._shown(name)}: a link that leaves shards.root; copy the file below it")
        return path


def _stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


class RemoteStorage(Storage):
    """The files below an address, each copied whole into the cache when it is first read."""

    is_remote = True

    def __init__(self, root: str, cache: Cache) -> None:
        super().__init__(root.rstrip("/"))
        self.cache = cache
        self._known: dict[str, tuple[int, str]] = {}  # what was found when last asked: nothing else is read
        # By process id. A file system has threads that a fork does not copy; the parent's is left alone, even by its finalizer.
        self._systems: dict[int, tuple[Any, str]] = {}

    def local_path(self, name: str) -> Path:
        if not os.fstat(self._handle(name).file).st_nlink:  # still open here, removed by another process
            self._handles.pop(name, None)
            self._handle(name)
        return self.cache.path / self._key(name)

    def aside(self, name: str, sidecar: str) -> Path:
        """Below a folder of the file's own version: what is made of another is not found there."""
        folder = self.cache.path / "aside" / self._key(name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder / Path(sidecar).name

    def _handle(self, name: str) -> _Handle:
        handle = super()._handle(name)
        touch(handle.file)  # what is used last leaves the cache last
        return handle

    def _open(self, name: str) -> int:
        size, fingerprint = self._known.get(name) or self._found(name)
        file = self.cache.open(self._key(name), size, self._shown(name), partial(self._chunks, name, size, fingerprint))
        # Copies that had to go free their disk space only when nobody has them open.
        self._handles = {other: handle for other, handle in [*self._handles.items()] if os.fstat(handle.file).st_nlink}
        return file

    def _key(self, name: str) -> str:
        _, fingerprint = self._known.get(name) or self._found(name)
        return hashlib.blake2b("\0".join((self._address, name, fingerprint)).encode(), digest_size=16).hexdigest()

    def _found(self, name: str) -> tuple[int, str]:
        self._known[name] = super()._found(name)
        return self._known[name]

    def _stat(self, name: str) -> tuple[int, str] | None:
        system, path = self._system(name)
        info = retrying(self._shown(name), partial(_info_or_none, system, path, self._shown(name)), self.sleep)
        if info is None or info["type"] != "file":
            return None
        if not isinstance(info["size"], int) or info["size"] < 0:
            raise UserError(f"{self._shown(name)}: its server tells no size; serve it from one that does")
        checksum = next((str(info[field]) for field in CHECKSUMS if info.get(field)), "")
        return info["size"], f"{info['size']}-{hashlib.blake2b(checksum.encode(), digest_size=8).hexdigest()}"

    def _chunks(self, name: str, size: int, fingerprint: str) -> Iterator[bytes]:
        """The file's bytes, in order; a try that fails goes on from the chunk that it was at."""
        system, path = self._system(name)
        what = self._shown(name)
        done, start = 0, partial(system.open, path, "rb", block_size=CHUNK, cache_type="none")
        with retrying(what, start, self.sleep) as source:
            while done < size and source.size == size:
                chunk = retrying(what, partial(_range, source, what, done, min(CHUNK, size - done)), self.sleep)
                yield chunk
                done += len(chunk)
        if done != size or self._stat(name) != (size, fingerprint):
            raise UserError(f"{what}: it was changed since it was indexed; index it again")

    def _system(self, name: str) -> tuple[Any, str]:
        """This process's file system, and the name's path in it."""
        if os.getpid() not in self._systems:
            self._systems[os.getpid()] = _file_system(self.root)
        system, path = self._systems[os.getpid()]
        return system, f"{path}/{_checked(name, self._address)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_systems": {}}


def _file_system(root: str) -> tuple[Any, str]:
    """A new file system for an address, and the address as that calls it. Settings and credentials: the environment's."""
    import fsspec  # here and not above: only remote roots need it

    protocol = root.partition("://")[0]
    try:
        options = {
            name: {**values, **fsspec.config.conf.get(protocol, {}).get(name, {})} for name, values in _options(protocol).items()
        }
        system, path = fsspec.core.url_to_fs(root, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError:
        package, extra = DRIVERS[protocol]
        raise UserError(f"root {_shown(root)}: {package} is not installed; pip install 'mmpt[{extra}]'") from None
    if protocol == "s3":
        system.retries = 1
    return system, path


def _options(protocol: str) -> dict[str, dict[str, Any]]:
    """What a driver does otherwise than by itself, unless its user says so. Raises ImportError for one that is missing."""
    if protocol == "s3":  # tries are counted here alone: those of botocore and of s3fs would multiply them
        return {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    if protocol.startswith("http"):  # it waits five minutes, however much has come
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)}}
    return {}


def _info_or_none(system: Any, path: str, what: str) -> dict[str, Any] | None:
    try:
        return system.info(path)
    except ValueError:
        raise UserError(f"{what}: no address that its driver understands; check shards.root") from None
    except FileNotFoundError as error:
        if is_missing(error):
            return None
        raise


def _range(source: Any, what: str, offset: int, size: int) -> bytes:
    """Up to `size` bytes from `offset` on, at least one."""
    try:
        source.seek(offset)
        chunk = source.read(size)
    except ValueError:
        raise UserError(f"{what}: its server sends no ranges of bytes; serve it from one that does") from None
    if not 0 < len(chunk) <= size:
        raise ConnectionError(f"{len(chunk)} bytes for {size}")
    return chunk


def _checked(name: str, address: str) -> str:
    # As a server may read it, too: %2e%2e is '..'.
    for spelling in (name, unquote(name)):
        if not name or "\0" in spelling or spelling.startswith("/") or ".." in spelling.split("/"):
            raise UserError(f"{address}: {name!r} leaves shards.root; no absolute name and no '..' is allowed")
    return name


def _shown(root: str) -> str:
    """For messages: an address without user, password and query."""
    if "://" not in root:
        return root
    parts = urlsplit(root)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
