import errno
import http.server
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import methodcaller
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from children import in_children
from object_store import BUCKET, ENVIRONMENT, Proxy, Store, running_store, some_bytes

from mmpt.data import storage as storage_module
from mmpt.data.cache import Cache
from mmpt.data.retry import TRIES
from mmpt.data.storage import ShortRead, Storage
from mmpt.types import UserError

DELAYS = [0.1, 0.2, 0.4, 0.8, 1.6]  # seconds between six tries


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as server:
        yield server


@pytest.fixture
def proxy(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    front = Proxy(store.port)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": front.endpoint}.items():
        monkeypatch.setenv(name, value)
    yield front
    front.stop()


def remote(folder: str, cache: Path, max_bytes: int = 1 << 20) -> Storage:
    found = Storage.of(f"s3://{BUCKET}/{folder}", Cache(cache, max_bytes))
    found.sleep = [].append
    return found


@pytest.fixture(params=["local", "remote"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A storage of either kind, with `a.tar` and `deep/b.tar` in it."""
    files = {"a.tar": some_bytes(70_000, 1), "deep/b.tar": some_bytes(3_000, 2)}
    if request.param == "remote":
        store, _ = request.getfixturevalue("store"), request.getfixturevalue("proxy")
        for name, data in files.items():
            store.put(f"both/{name}", data)
        return remote("both", tmp_path / "cache")
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return Storage.of(str(tmp_path))


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(offset=st.integers(0, 70_000), size=st.integers(0, 70_000))
def test_reads_what_was_written(both: Storage, offset: int, size: int) -> None:
    data = some_bytes(70_000, 1)
    size = min(size, 70_000 - offset)
    buffer = bytearray(size)
    both.pread_into("a.tar", memoryview(buffer), offset)
    assert buffer == both.pread("a.tar", size, offset) == data[offset : offset + size]


def test_tells_what_is_there(both: Storage) -> None:
    assert both.exists("a.tar") and both.exists("deep/b.tar")
    assert not both.exists("c.tar") and not both.exists("a.tar/b.tar") and not both.exists("deep")
    assert (both.size("a.tar"), both.size("deep/b.tar")) == (70_000, 3_000)
    assert both.fingerprint("a.tar") != both.fingerprint("deep/b.tar")
    assert both.local_path("deep/b.tar").read_bytes() == some_bytes(3_000, 2)


def test_what_is_made_of_a_file_has_a_place(both: Storage) -> None:
    places = {both.aside(name, f"{Path(name).name}.npz") for name in ("a.tar", "deep/b.tar")}
    assert len(places) == 2
    for place in places:
        place.write_bytes(b"arrays")
    assert both.aside("a.tar", "a.tar.npz").read_bytes() == b"arrays"
    with pytest.raises(UserError, match=r"leaves shards\.root"):
        both.aside("../a.tar", "a.tar.npz")


@pytest.mark.parametrize(
    "ask",
    [methodcaller(name, "c.tar") for name in ("size", "fingerprint", "local_path")] + [methodcaller("pread", "c.tar", 1, 0)],
)
def test_a_missing_file_is_named_at_once(both: Storage, ask: methodcaller) -> None:
    both.sleep = lambda _: pytest.fail("waited")
    with pytest.raises(UserError, match=r"c\.tar: no such file; check shards\.root"):
        ask(both)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "deep/../../a.tar", "..", "", "%2e%2e/a.tar", "%2fetc", "a\0.tar"])
def test_names_stay_below_the_root(both: Storage, name: str) -> None:
    for ask in (both.exists, both.size, both.fingerprint, both.local_path, partial(both.pread, size=1, offset=0)):
        with pytest.raises(UserError, match=r"leaves shards\.root"):
            ask(name)


def test_reading_past_the_end_is_a_short_read_that_names_the_file(both: Storage) -> None:
    with pytest.raises(ShortRead, match=r"b\.tar: 10 of 20 bytes at 2,990: it was cut after it was indexed"):
        both.pread("deep/b.tar", 20, 2_990)


def test_a_fork_reads_and_so_does_its_parent_afterwards(both: Storage) -> None:
    expected = some_bytes(70_000, 1)[5:900]
    assert both.pread("a.tar", 895, 5) == expected
    assert in_children([partial(both.pread, "a.tar", 895, 5), partial(both.size, "deep/b.tar")]) == [expected, 3_000]
    assert both.pread("a.tar", 895, 5) == expected
    assert both.pread("deep/b.tar", 3_000, 0) == some_bytes(3_000, 2)


def test_a_fork_holds_no_file_of_its_parent(both: Storage) -> None:
    both.pread("a.tar", 1, 0)
    path = both.local_path("a.tar").resolve()

    def open_after_reading_another() -> bool:
        both.pread("deep/b.tar", 1, 0)
        return str(path) in {os.path.realpath(entry) for entry in Path("/dev/fd").iterdir()}

    assert open_after_reading_another()
    assert in_children([open_after_reading_another]) == [False]


def test_a_copy_by_pickle_reads(both: Storage) -> None:
    both.sleep = len  # of a function, where a bound method of this test's could not go with it
    both.pread("a.tar", 1, 0)
    copy = pickle.loads(pickle.dumps(both))
    both.close()
    assert copy.pread("a.tar", 100, 50) == both.pread("a.tar", 100, 50) == some_bytes(70_000, 1)[50:150]


def test_threads_may_read_while_files_are_closed_and_opened(both: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "MAX_OPEN", 1)
    sizes = {"a.tar": (70_000, 1), "deep/b.tar": (3_000, 2)}

    def read(number: int) -> bool:
        name = ("a.tar", "deep/b.tar")[number % 2]
        offset = 37 * number % 2_000
        return both.pread(name, 500, offset) == some_bytes(*sizes[name])[offset : offset + 500]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))


# A local folder


def test_links_may_not_leave_the_root(tmp_path: Path) -> None:
    (tmp_path / "secret.tar").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "plain.tar").write_bytes(b"plain")
    (root / "inside.tar").symlink_to("plain.tar")
    (root / "out.tar").symlink_to(tmp_path / "secret.tar")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.tar").symlink_to("loop.tar")
    os.mkfifo(root / "pipe.tar")
    (tmp_path / "link").symlink_to(root)
    for address in (root, tmp_path / "link"):
        storage = Storage.of(str(address))
        assert storage.pread("inside.tar", 5, 0) == b"plain"
        for name in ("out.tar", "up/secret.tar"):
            with pytest.raises(UserError, match=f"{name}: a link that leaves shards.root"):
                storage.pread(name, 1, 0)
            with pytest.raises(UserError, match=r"leaves shards\.root"):
                storage.local_path(name)
        for name in ("loop.tar", "pipe.tar", "up"):
            with pytest.raises(UserError, match=name):
                storage.pread(name, 1, 0)


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"one")
    storage = Storage.of(str(tmp_path))
    before = storage.fingerprint("a.tar")
    assert storage.fingerprint("a.tar") == before
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    touched = storage.fingerprint("a.tar")
    path.write_bytes(b"three")
    assert len({before, touched, storage.fingerprint("a.tar")}) == 3


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "MAX_OPEN", 3)
    for number in range(10):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]))
    storage = Storage.of(str(tmp_path))

    def opened() -> set[str]:
        paths = (Path(os.path.realpath(entry)) for entry in Path("/dev/fd").iterdir())
        return {path.name for path in paths if path.parent == tmp_path.resolve()}

    for number in [0, *range(10), 8]:
        assert storage.pread(f"{number}.tar", 1, 0) == bytes([number])
        storage.pread("0.tar", 1, 0)
    assert opened() == {"0.tar", "8.tar", "9.tar"}
    storage.close()
    assert not opened()


def test_a_disk_that_fails_for_a_moment_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(b"abcdef")
    storage = Storage.of(str(tmp_path))
    delays: list[float] = []
    storage.sleep = delays.append
    failures, preadv = [errno.EIO, errno.ESTALE], os.preadv

    def failing(*arguments) -> int:
        if failures:
            raise OSError(failures.pop(), "bad moment")
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    assert storage.pread("a.tar", 3, 2) == b"cde"
    assert delays == DELAYS[:2]
    failures += [errno.EIO] * TRIES
    with pytest.raises(UserError, match=r"a\.tar: Input/output error, after 6 tries"):
        storage.pread("a.tar", 3, 2)
    assert not failures


def test_a_file_that_was_put_anew_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(b"abcdef")
    storage = Storage.of(str(tmp_path))
    storage.sleep = [].append
    storage.pread("a.tar", 1, 0)
    (tmp_path / "new").write_bytes(b"abcdef")
    (tmp_path / "new").rename(tmp_path / "a.tar")
    preadv = os.preadv

    def as_a_network_disk(file: int, *arguments) -> int:
        if not os.fstat(file).st_nlink:
            raise OSError(errno.ESTALE, "stale file handle")
        return preadv(file, *arguments)

    monkeypatch.setattr(os, "preadv", as_a_network_disk)
    assert storage.pread("a.tar", 3, 2) == b"cde"


# An object store


def test_the_cache_stays_within_its_bound_and_evicted_shards_come_again(store: Store, proxy: Proxy, tmp_path: Path) -> None:
    for number in range(3):
        store.put(f"bound/{number}.tar", some_bytes(10_000, number))
    storage = remote("bound", tmp_path, max_bytes=25_000)
    for number in (0, 1, 2, 0, 0, 2, 1, 2):
        assert storage.pread(f"{number}.tar", 500, 9_500) == some_bytes(10_000, number)[9_500:]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 25_000
    assert [proxy.gets(f"bound/{number}.tar") for number in range(3)] == [2, 2, 1]
    held = [os.fstat(int(entry.name)) for entry in Path("/dev/fd").iterdir() if entry.name.isdecimal() and entry.exists()]
    assert sum(found.st_size == 10_000 for found in held) <= 2  # what was evicted gives its disk space back


def test_a_warm_cache_needs_no_server(store: Store, proxy: Proxy, tmp_path: Path) -> None:
    store.put("warm/a.tar", some_bytes(10_000))
    storage = remote("warm", tmp_path)
    storage.pread("a.tar", 1, 0)
    other = pickle.loads(pickle.dumps(partial(remote, "warm", tmp_path)))()
    other.fingerprint("a.tar")
    assert other.pread("a.tar", 10_000, 0) == some_bytes(10_000)
    assert proxy.gets("warm/a.tar") == 1
    proxy.stop()
    storage.close()
    assert storage.pread("a.tar", 10_000, 0) == some_bytes(10_000)


def test_processes_that_want_the_same_shard_at_once_fetch_it_once(store: Store, proxy: Proxy, tmp_path: Path) -> None:
    data = some_bytes(200_000, 3)
    store.put("once/a.tar", data)
    storage = remote("once", tmp_path)
    assert in_children([partial(storage.pread, "a.tar", len(data), 0)] * 2) == [data] * 2
    assert proxy.gets("once/a.tar") == 1


def test_dropped_connections_are_resumed_where_they_broke(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "CHUNK", 20_000)
    data = some_bytes(90_000, 4)
    store.put("drop/a.tar", data)
    storage = remote("drop", tmp_path)
    delays: list[float] = []
    storage.sleep = delays.append
    storage.fingerprint("a.tar")
    proxy.cut(times=3, after=30_000)  # a chunk passes whole, the next in half
    assert storage.pread("a.tar", len(data), 0) == data
    assert proxy.cuts_left == 0
    assert len(delays) == 3
    assert proxy.gets("drop/a.tar") == 5 + 3  # no chunk that had come was asked for again


def test_a_server_that_is_gone_ends_in_an_error_after_six_tries(store: Store, proxy: Proxy, tmp_path: Path) -> None:
    store.put("gone/a.tar", some_bytes(1_000))
    storage = remote("gone", tmp_path)
    storage.fingerprint("a.tar")
    proxy.stop()
    for ask in (storage.exists, storage.local_path):
        delays: list[float] = []
        storage.sleep = delays.append
        with pytest.raises(UserError, match=r"s3://shards/gone/a\.tar: .*, after 6 tries") as raised:
            ask("a.tar")
        assert delays == pytest.approx(DELAYS)
        assert "testing-secret" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}


def test_a_changed_object_is_seen_and_never_mixed_with_the_old(store: Store, proxy: Proxy, tmp_path: Path) -> None:
    for name in "ab":
        store.put(f"change/{name}.tar", some_bytes(10_000, 1))
    storage = remote("change", tmp_path, max_bytes=15_000)
    before = storage.fingerprint("a.tar")
    assert storage.pread("a.tar", 10_000, 0) == some_bytes(10_000, 1)
    store.put("change/a.tar", some_bytes(10_000, 2))
    assert storage.pread("a.tar", 10_000, 0) == some_bytes(10_000, 1)  # what was indexed
    storage.pread("b.tar", 1, 0)  # which evicts it
    with pytest.raises(UserError, match=r"a\.tar: it was changed since it was indexed"):
        storage.pread("a.tar", 1, 0)
    assert storage.fingerprint("a.tar") != before
    assert storage.pread("a.tar", 10_000, 0) == some_bytes(10_000, 2)


def test_an_object_that_changes_while_it_is_copied_is_refused(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "CHUNK", 4_000)
    store.put("during/a.tar", some_bytes(10_000, 1))
    storage = remote("during", tmp_path)
    real = storage_module._range

    def changing(source, what: str, offset: int, size: int) -> bytes:
        if offset == 4_000:
            store.put("during/a.tar", some_bytes(10_000, 2))
        return real(source, what, offset, size)

    monkeypatch.setattr(storage_module, "_range", changing)
    with pytest.raises(UserError, match=r"a\.tar: it was changed"):
        storage.pread("a.tar", 1, 0)
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}


def test_a_driver_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for protocol, package in (("gs", "gcsfs"), ("az", "adlfs"), ("http", "aiohttp")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"{package} is not installed; pip install 'mmpt\[{protocol}\]'"):
            Storage.of(f"{protocol}://bucket/folder", Cache(tmp_path, 1)).exists("a.tar")


@pytest.mark.parametrize("root", ["file:///etc", "memory://x", "ftp://host/x", "s3://a::file://etc"])
def test_other_protocols_are_refused(root: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="s3://, gs://, az://, http://, https:// or a folder"):
        Storage.of(root, Cache(tmp_path, 1))


def test_a_remote_root_needs_a_cache() -> None:
    with pytest.raises(UserError, match=r"set data\.cache"):
        Storage.of("s3://bucket/folder")


# A web server


class Web(http.server.BaseHTTPRequestHandler):
    """`a.tar`, by ranges; `whole.tar`, never by ranges; `forbidden.tar`; `busy.tar`, after two refusals."""

    data = some_bytes(5_000, 9)
    busy = 0

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name == "busy.tar" and (type(self).busy > 0):
            type(self).busy -= 1
            return self.send_error(503)
        if name not in ("a.tar", "whole.tar", "busy.tar"):
            return self.send_error(403 if name == "forbidden.tar" else 404)
        span = self.headers.get("Range") if name != "whole.tar" else None
        start, stop = map(int, span.removeprefix("bytes=").split("-")) if span else (0, len(self.data) - 1)
        self.send_response(206 if span else 200)
        body = self.data[start : stop + 1]
        self.send_header("Content-Length", str(len(body)))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setattr(storage_module, "CHUNK", 2_000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        storage = Storage.of(f"http://user:pa55word@127.0.0.1:{server.server_port}/data", Cache(tmp_path, 1 << 20))
        storage.sleep = [].append
        yield storage
        server.shutdown()
        thread.join(timeout=10)


def test_a_web_server_is_read_by_ranges(web: Storage) -> None:
    assert web.pread("a.tar", 4_000, 500) == Web.data[500:4_500]
    assert web.size("a.tar") == 5_000
    assert not web.exists("c.tar")


def test_a_web_server_without_ranges_is_refused(web: Storage) -> None:
    with pytest.raises(UserError, match=r"whole\.tar: its server sends no ranges of bytes"):
        web.pread("whole.tar", 1, 0)


def test_a_busy_web_server_is_asked_again(web: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    web.sleep = delays.append
    monkeypatch.setattr(Web, "busy", 4)
    assert web.pread("busy.tar", 5_000, 0) == Web.data
    assert delays == DELAYS[:2]  # a HEAD and a GET to a try


@pytest.mark.parametrize("name", ["forbidden.tar", "c.tar"])
def test_messages_hold_no_password(web: Storage, name: str) -> None:
    with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:\d+/data/{name}: ") as raised:
        web.pread(name, 1, 0)
    assert "pa55word" not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(UserError) as raised:
        web.pread("../" + name, 1, 0)
    assert "pa55word" not in str(raised.value)
