"""One hand-made shard for each kind of fault; the report is exact."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import pytest
from corrupt import BLOCK, pack
from rich.console import Console

from mmpt.data.faults import REASONS as MEDIA_REASONS
from mmpt.data.shards import ShardWriter
from mmpt.data.spec import DataSpec, load_spec
from mmpt.data.validate import REASONS, Report, render, validate
from mmpt.types import UserError

Members = dict[str, bytes]
HURT, WHOLE = fuzzing.HURT, fuzzing.WHOLE


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    fuzzing.write_corpus(folder)
    return folder


@pytest.fixture
def spec(sound: Path, tmp_path: Path) -> DataSpec:
    """Of a copy: doc0 a picture, doc1 two sounds, doc2 a clip, doc3 two pictures, doc4 an opus and a picture; then texts."""
    for path in (*sound.glob("*.tar"), sound / "spec.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return load_spec(tmp_path / "spec.yaml")


def members_of(spec: DataSpec, shard: str = HURT) -> Members:
    with tarfile.open(Path(spec.root) / shard) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}


def found(spec: DataSpec, tar: bytes | None = None) -> list[tuple[str, str, int | None, str]]:
    """(shard, key, part, reason) of every fault, with `tar` in place of the first shard."""
    if tar is not None:
        (Path(spec.root) / HURT).write_bytes(tar)
    return [(fault.shard, fault.key, fault.part, fault.reason) for fault in validate(spec).faults]


def with_part(members: Members, key: str, number: int = 0, data: bytes | None = None, **fields: Any) -> bytes:
    """The tar with other fields in one part of a JSON, and other bytes in its medium, the checksum being theirs."""
    record = json.loads(members[f"{key}.json"])
    part = record["parts"][number]
    changed = dict(members)
    if data is not None:
        changed[f"{key}.{part['file']}"] = data
        part["crc32"] = zlib.crc32(data)
    part |= fields
    changed[f"{key}.json"] = json.dumps(record).encode()
    return pack(changed.items())


def test_a_sound_corpus_has_none(spec: DataSpec) -> None:
    seen = []
    report = validate(spec, progress=lambda done, total: seen.append((done, total)))
    assert report == Report(shards=2, documents=8, faults=())
    assert seen == [(1, 2), (2, 2)]


def test_processes_report_the_same(spec: DataSpec) -> None:
    (Path(spec.root) / HURT).write_bytes(with_part(members_of(spec), "doc0", crc32=1))
    assert validate(spec, workers=2) == validate(spec)


def test_every_reason_has_words() -> None:
    assert set(MEDIA_REASONS) < set(REASONS) and all(REASONS.values())


PART_FAULTS: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "crc": ("doc0", 0, {"crc32": 1}, "crc"),
    "wh of a picture": ("doc0", 0, {"wh": [36, 25]}, "size"),
    "pixels": ("doc3", 1, {"wh": [41, 40]}, "size"),
    "samples": ("doc1", 0, {"samples": 4000}, "size"),
    "fewer samples": ("doc1", 1, {"samples": 2400}, "size"),
    "sample rate": ("doc1", 1, {"sample_rate": 16001}, "size"),
    "samples of opus": ("doc4", 0, {"samples": 28800}, "size"),
    "wh of a clip": ("doc2", 0, {"wh": [32, 48]}, "size"),
    "fps": ("doc2", 0, {"fps": 9}, "size"),
    "fps nan": ("doc2", 0, {"fps": float("nan")}, "size"),
    "fps huge": ("doc2", 0, {"fps": 10**400}, "size"),
    "fps text": ("doc2", 0, {"fps": "8"}, "json"),
    "frames": ("doc2", 0, {"frames": 10}, "size"),
    "clip": ("doc2", 0, {"clip": [0.5, 1.5]}, "size"),
    "no picture": ("doc0", 0, {"data": b"RIFF"}, "decode"),
    "no sound": ("doc1", 1, {"data": b"fLaC" + bytes(50)}, "decode"),
    "no clip": ("doc2", 0, {"data": bytes(100), "audio": False}, "decode"),
    "nothing": ("doc3", 0, {"data": b""}, "decode"),
}


@pytest.mark.parametrize("name", PART_FAULTS)
def test_faults_of_one_part(spec: DataSpec, name: str) -> None:
    key, number, fields, reason = PART_FAULTS[name]
    assert found(spec, with_part(members_of(spec), key, number, **fields)) == [(HURT, key, number, reason)]


def test_what_is_within_tolerance_is_none(spec: DataSpec) -> None:
    members = members_of(spec)
    for key, number, fields in [
        ("doc1", 1, {"samples": 4800 + 1500}),
        ("doc2", 0, {"fps": 8.05}),
        ("doc2", 0, {"frames": 7}),
        ("doc2", 0, {"clip": [0, 1.1]}),
    ]:
        assert found(spec, with_part(members, key, number, **fields)) == [], fields


@pytest.mark.parametrize("file", ["000.jpg", "000.wav", "001.flac", "000.mp4", "000.png", "001.webp", "000.opus"])
def test_media_that_are_cut_are_undecodable(spec: DataSpec, file: str) -> None:
    members = members_of(spec)
    name = next(name for name in members if name.endswith(file))
    key, _, suffix = name.partition(".")
    number = [part.get("file") for part in json.loads(members[f"{key}.json"])["parts"]].index(suffix)
    faults = found(spec, with_part(members, key, number, data=members[name][: len(members[name]) * 2 // 3]))
    assert faults and {(shard, k) for shard, k, _, _ in faults} == {(HURT, key)}
    assert faults[0][2:] in [(number, "decode"), (number, "size")]


def replaced(name: str, data: bytes) -> Callable[[Members], bytes]:
    return lambda members: pack({**members, name: data}.items())


def without(*names: str) -> Callable[[Members], bytes]:
    return lambda members: pack((name, data) for name, data in members.items() if name not in names)


def added(name: str, data: bytes = b"x", last: str = "doc4.001.jpg") -> Callable[[Members], bytes]:
    """A further member behind `last`."""

    def make(members: Members) -> bytes:
        out = []
        for known, content in members.items():
            out += [(known, content)] + ([(name, data)] if known == last else [])
        return pack(out)

    return make


DOCUMENT_FAULTS: dict[str, tuple[Callable[[Members], bytes], list[tuple[str, int | None, str]]]] = {
    "no JSON": (without("doc0.json"), [("doc0", None, "missing")]),
    "no medium": (without("doc1.000.wav"), [("doc1", None, "missing")]),
    "empty JSON": (replaced("doc2.json", b""), [("doc2", None, "json")]),
    "deep JSON": (replaced("doc2.json", b"[" * 10**5), [("doc2", None, "json")]),
    "version": (replaced("doc2.json", b'{"v":2,"parts":[]}'), [("doc2", None, "json")]),
    "meta": (replaced("doc2.json", b'{"v":1,"parts":[{"type":"text","text":"a"}],"meta":3}'), [("doc2", None, "json")]),
    "half a character": (replaced("doc2.json", b'{"v":1,"parts":[{"type":"text","text":"\\ud800"}]}'), [("doc2", None, "text")]),
    "unnamed": (added("doc4.002.jpg"), [("doc4", None, "unnamed")]),
    "two unnamed": (
        replaced("doc3.json", b'{"v":1,"parts":[{"type":"text","text":"a"}]}'),
        [("doc3", None, "unnamed"), ("doc3", None, "unnamed")],
    ),
    "apart": (added("doc0.001.jpg"), [("doc0", None, "order"), ("doc0", None, "unnamed")]),
    "member twice": (added("doc4.000.opus"), [("doc4", None, "duplicate-member")]),
    "key twice": (added("doc0.json", b'{"v":1,"parts":[{"type":"text","text":"a"}]}'), [("doc0", None, "duplicate-key")]),
    "key of another shard": (
        added("doc7.json", b'{"v":1,"parts":[{"type":"text","text":"a"}]}'),
        [],
    ),
    "folder": (added("a/doc9.json"), [("a/doc9.json", None, "name")]),
    "outside": (added("../doc9.json"), [("../doc9.json", None, "name")]),
    "line break": (added("doc9\n.json"), [("doc9\n.json", None, "name")]),
    "no suffix": (added("doc9"), [("doc9", None, "name")]),
}


@pytest.mark.parametrize("name", DOCUMENT_FAULTS)
def test_faults_of_one_document(spec: DataSpec, name: str) -> None:
    change, wanted = DOCUMENT_FAULTS[name]
    others = [(WHOLE, "doc7", None, "duplicate-key")] if name == "key of another shard" else []
    assert found(spec, change(members_of(spec))) == [(HURT, *fault) for fault in wanted] + others


TAR_FAULTS: dict[str, tuple[Callable[[bytes], bytes], list[tuple[str, str]]]] = {
    "nothing": (lambda tar: b"", [("", "unreadable")]),
    "no tar": (lambda tar: b"<html>" * 100, [("", "unreadable")]),
    "zeros": (lambda tar: bytes(10240), [("", "empty")]),
    "no end mark": (lambda tar: tar.rstrip(b"\0") + bytes(-len(tar.rstrip(b"\0")) % BLOCK), [("", "truncated")]),
    "trailing": (lambda tar: tar + b"x", [("", "trailing")]),
    "joined": (lambda tar: tar + tar, [("", "trailing")]),
    "header": (lambda tar: tar[:5] + b"\xff" + tar[6:], [("", "unreadable")]),
}


@pytest.mark.parametrize("name", TAR_FAULTS)
def test_faults_of_the_tar(spec: DataSpec, name: str) -> None:
    change, wanted = TAR_FAULTS[name]
    tar = change((Path(spec.root) / HURT).read_bytes())
    assert found(spec, tar) == [(HURT, key, None, reason) for key, reason in wanted]


def test_a_cut_within_a_member_is_told_and_so_is_what_its_document_lacks(spec: DataSpec) -> None:
    tar = pack(members_of(spec).items())[: -2 * BLOCK - 1]
    assert found(spec, tar) == [(HURT, "", None, "truncated"), (HURT, "doc4", None, "missing")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_the_like(spec: DataSpec, kind: bytes) -> None:
    info = tarfile.TarInfo("evil.json")
    info.type, info.linkname = kind, "/etc/passwd"
    assert found(spec, pack([(info, b""), *members_of(spec).items()])) == [(HURT, "evil.json", None, "link")]


@pytest.mark.parametrize("size", [-512, 2**40, 2**70])
def test_sizes_beyond_reason_end_the_reading_of_a_shard_not_the_run(spec: DataSpec, size: int) -> None:
    record = f"{len(f'99 size={size}') + 1} size={size}\n".encode()
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    tar = pack([(header, record), *members_of(spec).items()])
    faults = validate(_written(spec, tar)).faults
    assert [(fault.shard, fault.key) for fault in faults] == [(HURT, "")]
    assert faults[0].reason in ("unreadable", "truncated")


def _written(spec: DataSpec, tar: bytes) -> DataSpec:
    (Path(spec.root) / HURT).write_bytes(tar)
    return spec


def test_headers_that_claim_too_much_are_not_read(spec: DataSpec) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**40
    tar = header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    assert found(spec, tar) == [(HURT, "", None, "unreadable")]


def test_all_faults_are_told_at_once(spec: DataSpec) -> None:
    members = members_of(spec)
    del members["doc0.000.jpg"]
    members["doc1.json"] = b"{}"
    members["doc3.000.png"] = members["doc3.001.webp"]
    members["a b.json"] = b""
    tar = pack(members.items())[:-BLOCK] + b"x"
    (Path(spec.root) / WHOLE).unlink()
    assert found(spec, tar) == [
        (HURT, "a b.json", None, "name"),
        (HURT, "", None, "trailing"),
        (HURT, "doc0", None, "missing"),
        (HURT, "doc1", None, "json"),
        (HURT, "doc3", 0, "crc"),
        (WHOLE, "", None, "missing"),
    ]


def test_a_link_that_leaves_the_root_is_not_read(spec: DataSpec, tmp_path: Path) -> None:
    path = Path(spec.root) / HURT
    outside = tmp_path.parent / f"{tmp_path.name}-outside.tar"
    path.rename(outside)
    path.symlink_to(outside)
    assert [(shard, reason) for shard, _, _, reason in found(spec)] == [(HURT, "unreadable")]


def test_keys_of_three_shards(tmp_path: Path) -> None:
    for shard, keys in enumerate([("a", "b"), ("c", "a"), ("a", "c", "d")]):
        with ShardWriter(tmp_path / str(shard), "x", samples_per_shard=10) as writer:
            for key in keys:
                writer.write(key, {"v": 1, "parts": [{"type": "text", "text": key}]}, {})
        (tmp_path / str(shard) / "x-00000.tar").rename(tmp_path / f"{shard}.tar")
    text = 'version: 1\nname: keys\nformat: interleaved\nshards: {root: ".", pattern: "{0..2}.tar"}\n'
    (tmp_path / "spec.yaml").write_text(text + 'split: {train: "0:2", val: "1:", all: ":"}\n')
    spec = load_spec(tmp_path / "spec.yaml")
    assert [(f.shard, f.key, f.reason, f.detail) for f in validate(spec).faults] == [
        ("1.tar", "a", "duplicate-key", "shard 0.tar has the key as well"),
        ("2.tar", "a", "duplicate-key", "shard 0.tar has the key as well"),
        ("2.tar", "c", "duplicate-key", "shard 1.tar has the key as well"),
    ]
    assert [(fault.shard, fault.key) for fault in validate(spec, ["val"]).faults] == [("2.tar", "a"), ("2.tar", "c")]
    assert validate(spec, ["train", "val"]).shards == 3
    with pytest.raises(UserError, match="no split 'test'"):
        validate(spec, ["test"])


def pairs(folder: Path, members: Members) -> DataSpec:
    folder.mkdir(exist_ok=True)
    (folder / "0.tar").write_bytes(pack(members.items()))
    text = 'version: 1\nname: pairs\nformat: pairs\nshards: {root: ".", pattern: "0.tar"}\nsplit: {train: ":"}\n'
    (folder / "spec.yaml").write_text(text)
    return load_spec(folder / "spec.yaml")


def test_pairs(spec: DataSpec, tmp_path: Path) -> None:
    picture = members_of(spec)["doc0.000.jpg"]
    members = {"0.jpg": picture, "0.json": b'{"url": ""}', "0.txt": b"a", "0.npy": b"more than is wanted"}
    assert validate(pairs(tmp_path / "p", members)).faults == ()
    members |= {"1.jpg": picture, "2.jpg": picture[:200], "2.txt": b"b", "3.jpg": picture, "3.txt": b"\xff", "4.jpg": picture}
    members |= {"4.txt": b"c", "4.json": b"[]"}
    faults = [(fault.key, fault.part, fault.reason) for fault in validate(pairs(tmp_path / "p", members)).faults]
    assert faults == [("1", None, "missing"), ("2", faults[1][1], "decode"), ("3", None, "text"), ("4", None, "json")]


def test_other_formats_are_built_first(tmp_path: Path) -> None:
    text = 'version: 1\nname: t\nformat: text\nshards: {root: ".", pattern: "0.jsonl"}\nsplit: {train: ":"}\n'
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(UserError, match="mmpt data build"):
        validate(load_spec(tmp_path / "spec.yaml"))


def test_the_report_is_plain_json_and_a_table_without_control_characters(spec: DataSpec) -> None:
    tar = added("\x1b[31m\udcff")(members_of(spec))
    report = validate(_written(spec, tar))
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["documents"] == 8 and plain["shards"] == 2 and plain["reasons"] == {"name": 1}
    assert plain["faults"] == [
        {"shard": HURT, "key": "\x1b[31m\udcff", "part": None, "reason": "name", "detail": report.faults[0].detail}
    ]
    out = io.StringIO()
    Console(file=out, width=200, no_color=True).print(render(report))
    assert HURT in out.getvalue() and r"\x1b[31m\udcff" in out.getvalue() and "\x1b" not in out.getvalue()
    assert "8 documents of 2 shards, faults: 1" in out.getvalue()
