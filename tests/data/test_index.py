from __future__ import annotations

import dataclasses
import errno
import io
import os
import pickle
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.corpus import shard_index
from mmpt.data.documents import Interleaved
from mmpt.data.index import MAX_MEMBER_BYTES, PART, ShardIndex, index_name
from mmpt.data.storage import Storage
from mmpt.types import AUDIO, IMAGE, VIDEO, UserError


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


def build(tar: Path) -> ShardIndex:
    return ShardIndex.build(tar, Interleaved())


def of(tar: Path) -> ShardIndex:
    return shard_index(Storage.of(str(tar.parent)), Interleaved(), tar.name)


def sidecar(tar: Path) -> Path:
    return tar.with_name(index_name(tar.name))


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "some.tar", samples(40))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_those_of_tarfile_in_every_dialect(tmp_path: Path, format: int) -> None:
    path, long = tmp_path / "some.tar", "k" * 90 + ".json"
    with tarfile.open(path, "w", format=format) as archive:
        for name in ("a.json", "a.x.png", long):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    index, content = build(path), path.read_bytes()
    assert [content[o : o + s].decode() for o, s in zip(index.offsets, index.sizes, strict=True)] == ["a.json", "a.x.png", long]
    assert index.first_member.tolist() == [0, 2, 3]
    assert index.crcs.tolist() == [zlib.crc32(name.encode()) for name in ("a.json", "a.x.png", long)]


OUTSIDE = ["/etc/a.json", "../a.json", "a/../b.json", "./a.json", "folder/a.json"]
ODD = ["a", ".json", "a\n.json", "é.json", "a.é", "a..json", "a b.json"]


@pytest.mark.parametrize("name", OUTSIDE + ODD)
def test_names_that_are_not_key_and_suffix_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"KEY\.suffix is wanted") as caught:
        build(write_tar(tmp_path / "some.tar", ["fine.json", name]))
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "DIRTYPE", "FIFOTYPE", "CHRTYPE", "BLKTYPE", "GNUTYPE_SPARSE"])
def test_anything_but_a_plain_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "some.tar", ["evil.json"], type=getattr(tarfile, kind), linkname="/etc/passwd")
    with pytest.raises(UserError, match=r"'evil.json' is not a plain file"):
        build(path)


def test_a_member_over_the_limit_is_refused_without_being_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.json")
    info.size = MAX_MEMBER_BYTES + 1
    (tmp_path / "some.tar").write_bytes(info.tobuf())
    with pytest.raises(UserError, match=r"'huge.json' has 1,073,741,825 bytes"):
        build(tmp_path / "some.tar")


def test_samples_that_lie_apart_are_refused_and_unsorted_ones_are_not(tmp_path: Path) -> None:
    unsorted = write_tar(tmp_path / "unsorted.tar", ["z.json", "a.png", "a.json", "m.json"])
    assert build(unsorted).keys.tolist() == [b"z", b"a", b"m"]
    with pytest.raises(UserError, match="members of a lie apart"):
        build(write_tar(tmp_path / "apart.tar", ["a.json", "b.json", "a.png"]))


def test_keys_with_dots_are_found_faulty_not_silently_merged(tmp_path: Path) -> None:
    index = build(write_tar(tmp_path / "some.tar", ["v1.0_x.json", "v1.0_x.png", "v1.1_x.json", "v1.1_x.png"]))
    assert index.reasons.tolist() == [b"missing"] and b"no JSON member" in index.details[0]


def test_a_tar_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no samples"):
        build(write_tar(tmp_path / "some.tar", []))


def test_every_cut_is_refused(tar: Path) -> None:
    """A tar cut anywhere before its end mark, member borders and the insides of headers included."""
    content = tar.read_bytes()
    end = 2 * 40 * 1024
    for size in (*range(0, end + 1, 512 * 5), 1024 * 20 + 100, 1024 * 20 + 512 + 3, end, end + 511):
        tar.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"not a whole tar|cut short"):
            build(tar)
    tar.write_bytes(content[: end + 512])  # all samples and half of the end mark: nothing is lost
    assert len(build(tar)) == 40


def test_a_damaged_header_is_refused_not_taken_for_the_end(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    content[1024 * 30 + 10] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(UserError, match="damaged at byte 30,720"):
        build(tar)


def test_joined_tars_are_refused_as_readers_stop_after_the_first(tar: Path) -> None:
    other = write_tar(tar.with_name("other.tar"), samples(3, first=40))
    tar.write_bytes(tar.read_bytes() + other.read_bytes())
    with pytest.raises(UserError, match="tars that were joined"):
        build(tar)


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 10240, b"\x1f\x8b\x08\0gzip"])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"shard .*some.tar"):
        build(tmp_path / "some.tar")


def test_the_sidecar_is_written_once_and_used(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = of(tar)
    assert sidecar(tar).is_file()
    monkeypatch.setattr(ShardIndex, "build", lambda tar, layout: pytest.fail("built again"))
    loaded = of(tar)
    for field in dataclasses.fields(ShardIndex):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(built, field.name))


def test_no_sidecar_is_written_where_that_is_not_allowed(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(self: ShardIndex, path: Path) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(ShardIndex, "save", read_only)
    assert len(of(tar)) == 40
    assert not sidecar(tar).exists()


def test_a_sidecar_of_another_tar_of_the_same_size_is_not_used(tar: Path) -> None:
    size = tar.stat().st_size
    of(tar)
    written = sidecar(tar).stat().st_mtime_ns
    write_tar(tar, ["other.json", "other.png", *samples(39)])
    os.utime(tar, ns=(written + 1, written + 1))
    assert tar.stat().st_size == size
    assert of(tar).keys[0] == b"other"


@pytest.mark.parametrize("change", ["longer", "the same size"])
def test_a_newer_sidecar_of_another_tar_is_not_used(tar: Path, change: str) -> None:
    """As copying gives: every file has the time of the copy."""
    of(tar)
    write_tar(tar, samples(50) if change == "longer" else ["other.json", "other.png", *samples(39)])
    later = tar.stat().st_mtime_ns + 10**9
    os.utime(sidecar(tar), ns=(later, later))
    assert len(of(tar)) == (50 if change == "longer" else 40)
    assert of(tar).keys.tolist() == build(tar).keys.tolist()


def test_a_sidecar_is_used_for_names_that_headers_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "some.tar", ["k" * 150 + ".json"])
    of(tar)
    monkeypatch.setattr(ShardIndex, "build", lambda tar, layout: pytest.fail("built again"))
    assert len(of(tar)) == 1


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_sidecar_is_never_believed(position: int, value: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tar = write_tar(Path(folder) / "some.tar", samples(3))
        whole = of(tar)
        content = bytearray(sidecar(tar).read_bytes())
        position %= len(content)
        content[position:] = b"" if cut else bytes([value]) + content[position + 1 :]
        sidecar(tar).write_bytes(content)
        found = of(tar)
        for field in dataclasses.fields(ShardIndex):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(whole, field.name))


def arrays(tar: Path) -> dict[str, np.ndarray]:
    return {field.name: getattr(build(tar), field.name) for field in dataclasses.fields(ShardIndex)}


def one_part(*fields: float) -> dict[str, np.ndarray]:
    """The first document's only part, the others having none."""
    return {"parts": np.array([fields], PART), "first_part": np.array([0, *[1] * 40])}


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
    "parts of another shape": {"parts": np.zeros(3)},
    "parts of no document": {"parts": np.zeros(3, dtype=PART)},
    "a part in a member that is not there": one_part(IMAGE, 0, 9, 1, 1, 0, 0, 0, 0),
    "a sound of no rate": one_part(AUDIO, 0, 0, 0, 0, 0, 5, 0, 1),
    "a clip without end": one_part(VIDEO, 0, 0, 4, 4, 0, 0, 0, np.inf),
    "a reason that is none": {"reasons": np.array([b"because"] * 40)},
    "CRC of too few": {"crcs": np.array([1])},
    "a member twice": {"suffixes": np.array([b"json", b"json"] * 40)},
    "code": {"keys": np.array([os.system], dtype=object)},
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_sidecar_with_unsound_arrays_is_built_again(tar: Path, name: str) -> None:
    np.savez(sidecar(tar), **{**arrays(tar), **BAD_ARRAYS[name]})
    assert ShardIndex.load(sidecar(tar)) is None
    assert len(of(tar)) == 40


def test_a_compressed_sidecar_is_not_unfolded(tar: Path) -> None:
    np.savez_compressed(sidecar(tar), **arrays(tar))
    assert ShardIndex.load(sidecar(tar)) is None


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(["a"]), b"PK\x03\x04"])
def test_a_sidecar_that_is_no_npz_is_built_again(tar: Path, content: bytes) -> None:
    sidecar(tar).write_bytes(content)
    assert len(of(tar)) == 40
    assert ShardIndex.load(sidecar(tar)) is not None
