from __future__ import annotations

import dataclasses
import errno
import io
import multiprocessing
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.index import MAX_MEMBER_BYTES, Corpus, ShardIndex, index_path
from mmpt.types import UserError


def write_tar(path: Path, names: list[str], **header: object) -> Path:
    """A tar as a stranger's tool writes it: each member holds its own name."""
    with tarfile.open(path, "w") as archive:
        for name in names:
            data = name.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in header.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, first: int = 0) -> list[str]:
    return [f"k{number:03d}.{suffix}" for number in range(first, first + count) for suffix in ("json", "000.png")]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "some.tar", samples(40))


def keys(corpus: Corpus) -> list[str]:
    return [corpus.read(number).key for number in range(len(corpus))]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_those_of_tarfile_in_every_dialect(tmp_path: Path, format: int) -> None:
    path, long = tmp_path / "some.tar", "k" * 90 + ".json"
    with tarfile.open(path, "w", format=format) as archive:
        for name in ("a.json", "a.x.png", long):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    index, content = ShardIndex.build(path), path.read_bytes()
    assert [content[o : o + s].decode() for o, s in zip(index.offsets, index.sizes, strict=True)] == ["a.json", "a.x.png", long]
    assert index.first_member.tolist() == [0, 2, 3]


OUTSIDE = ["/etc/a.json", "../a.json", "a/../b.json", "./a.json", "folder/a.json"]
ODD = ["a", ".json", "a\n.json", "é.json", "a.é", "a..json", "a b.json"]


@pytest.mark.parametrize("name", OUTSIDE + ODD)
def test_names_that_are_not_key_and_suffix_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"KEY\.suffix is wanted") as caught:
        ShardIndex.build(write_tar(tmp_path / "some.tar", ["fine.json", name]))
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "DIRTYPE", "FIFOTYPE", "CHRTYPE", "BLKTYPE", "GNUTYPE_SPARSE"])
def test_anything_but_a_plain_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "some.tar", ["evil.json"], type=getattr(tarfile, kind), linkname="/etc/passwd")
    with pytest.raises(UserError, match=r"'evil.json' is not a plain file"):
        ShardIndex.build(path)


def test_a_member_over_the_limit_is_refused_without_being_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.json")
    info.size = MAX_MEMBER_BYTES + 1
    (tmp_path / "some.tar").write_bytes(info.tobuf())
    with pytest.raises(UserError, match=r"'huge.json' has 1,073,741,825 bytes"):
        ShardIndex.build(tmp_path / "some.tar")


def test_samples_that_lie_apart_are_refused_and_unsorted_ones_are_not(tmp_path: Path) -> None:
    unsorted = write_tar(tmp_path / "unsorted.tar", ["z.json", "a.png", "a.json", "m.json"])
    assert ShardIndex.build(unsorted).keys.tolist() == [b"z", b"a", b"m"]
    with pytest.raises(UserError, match="members of a lie apart"):
        ShardIndex.build(write_tar(tmp_path / "apart.tar", ["a.json", "b.json", "a.png"]))


def test_keys_with_dots_are_refused_not_merged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample v1 has no .json member"):
        ShardIndex.build(write_tar(tmp_path / "some.tar", ["v1.0_x.json", "v1.0_x.png", "v1.1_x.json", "v1.1_x.png"]))


def test_a_tar_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no samples"):
        ShardIndex.build(write_tar(tmp_path / "some.tar", []))


def test_every_cut_is_refused(tar: Path) -> None:
    """A tar cut anywhere before its end mark, member borders and the insides of headers included."""
    content = tar.read_bytes()
    end = 2 * 40 * 1024
    for size in (*range(0, end + 1, 512 * 5), 1024 * 20 + 100, 1024 * 20 + 512 + 3, end, end + 511):
        tar.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"not a whole tar|cut short"):
            ShardIndex.build(tar)
    tar.write_bytes(content[: end + 512])  # all samples and half of the end mark: nothing is lost
    assert len(ShardIndex.build(tar)) == 40


def test_a_damaged_header_is_refused_not_taken_for_the_end(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    content[1024 * 30 + 10] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(UserError, match="damaged at byte 30,720"):
        ShardIndex.build(tar)


def test_joined_tars_are_refused_as_readers_stop_after_the_first(tar: Path) -> None:
    other = write_tar(tar.with_name("other.tar"), samples(3, first=40))
    tar.write_bytes(tar.read_bytes() + other.read_bytes())
    with pytest.raises(UserError, match="tars that were joined"):
        ShardIndex.build(tar)


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 10240, b"\x1f\x8b\x08\0gzip"])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"shard .*some.tar"):
        ShardIndex.build(tmp_path / "some.tar")


def test_the_sidecar_is_written_once_and_used(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = ShardIndex.of(tar)
    assert index_path(tar).is_file()
    monkeypatch.setattr(ShardIndex, "build", lambda tar: pytest.fail("built again"))
    loaded = ShardIndex.of(tar)
    for field in dataclasses.fields(ShardIndex):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(built, field.name))


def test_no_sidecar_is_written_where_that_is_not_allowed(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(self: ShardIndex, path: Path) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(ShardIndex, "save", read_only)
    assert len(ShardIndex.of(tar)) == 40
    assert not index_path(tar).exists()


def test_a_sidecar_of_another_tar_of_the_same_size_is_not_used(tar: Path) -> None:
    size = tar.stat().st_size
    ShardIndex.of(tar)
    written = index_path(tar).stat().st_mtime_ns
    write_tar(tar, ["other.json", "other.png", *samples(39)])
    os.utime(tar, ns=(written + 1, written + 1))
    assert tar.stat().st_size == size
    corpus = Corpus("some", [tar])
    assert corpus.read(0).fields == {"json": b"other.json", "png": b"other.png"}
    corpus.close()


@pytest.mark.parametrize("change", ["longer", "the same size"])
def test_a_newer_sidecar_of_another_tar_is_not_used(tar: Path, change: str) -> None:
    """As copying gives: every file has the time of the copy."""
    ShardIndex.of(tar)
    write_tar(tar, samples(50) if change == "longer" else ["other.json", "other.png", *samples(39)])
    later = tar.stat().st_mtime_ns + 10**9
    os.utime(index_path(tar), ns=(later, later))
    assert len(ShardIndex.of(tar)) == (50 if change == "longer" else 40)
    assert ShardIndex.of(tar).keys.tolist() == ShardIndex.build(tar).keys.tolist()


def test_a_sidecar_is_used_for_names_that_headers_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "some.tar", ["k" * 150 + ".json"])
    ShardIndex.of(tar)
    monkeypatch.setattr(ShardIndex, "build", lambda tar: pytest.fail("built again"))
    assert len(ShardIndex.of(tar)) == 1


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_sidecar_is_never_believed(position: int, value: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tar = write_tar(Path(folder) / "some.tar", samples(3))
        whole = ShardIndex.of(tar)
        content = bytearray(index_path(tar).read_bytes())
        position %= len(content)
        content[position:] = b"" if cut else bytes([value]) + content[position + 1 :]
        index_path(tar).write_bytes(content)
        found = ShardIndex.of(tar)
        for field in dataclasses.fields(ShardIndex):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(whole, field.name))


def arrays(tar: Path) -> dict[str, np.ndarray]:
    return {field.name: getattr(ShardIndex.build(tar), field.name) for field in dataclasses.fields(ShardIndex)}


BAD_ARRAYS = {
    "another format's number": {"version": np.array(99)},
    "a list of versions": {"version": np.array([1, 1])},
    "numbers for keys": {"keys": np.zeros(40)},
    "too few keys": {"keys": np.array([b"a"])},
    "offsets beyond the tar": {"offsets": np.full(80, 2**63 - 1)},
    "offsets before the tar": {"offsets": np.full(80, -1)},
    "sizes below nothing": {"sizes": np.full(80, -1)},
    "samples without members": {"first_member": np.zeros(41, dtype=np.int64)},
    "fractions": {"first_member": np.arange(0.0, 82.0, 2.0)},
    "sizes of many tars": {"tar_size": np.array([1, 2])},
    "names of folders": {"keys": np.array([b"../a"] * 40)},
    "names that are no text": {"keys": np.array([b"\xff"] * 40)},
    "a key twice": {"keys": np.array([b"a"] * 40)},
    "no JSON": {"suffixes": np.array([b"a.png", b"b.png"] * 40)},
    "a member twice": {"suffixes": np.array([b"json", b"json"] * 40)},
    "code": {"keys": np.array([os.system], dtype=object)},
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_sidecar_with_unsound_arrays_is_built_again(tar: Path, name: str) -> None:
    np.savez(index_path(tar), **{**arrays(tar), **BAD_ARRAYS[name]})
    assert ShardIndex.load(index_path(tar)) is None
    assert len(ShardIndex.of(tar)) == 40


def test_a_compressed_sidecar_is_not_unfolded(tar: Path) -> None:
    np.savez_compressed(index_path(tar), **arrays(tar))
    assert ShardIndex.load(index_path(tar)) is None


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(["a"]), b"PK\x03\x04"])
def test_a_sidecar_that_is_no_npz_is_built_again(tar: Path, content: bytes) -> None:
    index_path(tar).write_bytes(content)
    assert len(ShardIndex.of(tar)) == 40
    assert ShardIndex.load(index_path(tar)) is not None


def test_numbers_run_on_over_the_shards(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", samples(count, first=10 * n)) for n, count in enumerate((3, 1, 4))]
    corpus = Corpus("some", tars)
    assert keys(corpus) == [f"k{number:03d}" for number in (0, 1, 2, 10, 20, 21, 22, 23)]
    assert corpus.read(3).shard == "1.tar"
    for outside in (-1, 8):
        with pytest.raises(IndexError, match="of 8"):
            corpus.read(outside)
    corpus.close()


def test_the_fingerprint_follows_names_order_and_layout(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / f"{n}.tar", samples(3, first=n)) for n in (0, 5))
    fingerprint = Corpus("some", [one, two]).fingerprint
    assert fingerprint == Corpus("other", [one, two]).fingerprint
    assert fingerprint != Corpus("some", [two, one]).fingerprint
    assert fingerprint != Corpus("some", [one]).fingerprint
    assert fingerprint != Corpus("some", [one, two.rename(tmp_path / "renamed.tar")]).fingerprint


def test_a_shard_that_shrank_under_the_run_is_told(tar: Path) -> None:
    corpus = Corpus("some", [tar])
    os.truncate(tar, 1024)
    with pytest.raises(UserError, match="cut after it was indexed"):
        corpus.read(39)
    corpus.close()


def _read_in_worker(corpus: Corpus, queue: multiprocessing.Queue) -> None:
    queue.put((len(corpus._files), keys(corpus), corpus.fingerprint))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_same(tar: Path, method: str) -> None:
    corpus = Corpus("some", [tar])
    corpus.read(0)  # the parent has the shard open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_in_worker, args=(corpus, queue))
    worker.start()
    for number in reversed(range(40)):  # at the same time, in another order
        assert corpus.read(number).key == f"k{number:03d}"
    open_at_start, read, fingerprint = queue.get(timeout=60)
    worker.join(timeout=60)
    assert read == keys(corpus)
    assert fingerprint == corpus.fingerprint
    assert open_at_start == (method == "fork")
    corpus.close()


def test_more_shards_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpt.data.index.MAX_OPEN", 3)
    tars = [write_tar(tmp_path / f"{number}.tar", samples(1, first=number)) for number in range(8)]
    corpus = Corpus("some", tars)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert keys(corpus) == [f"k{number:03d}" for number in range(8)]
        assert len(os.listdir("/proc/self/fd")) == before + 3
    corpus.close()
    assert len(os.listdir("/proc/self/fd")) == before
