from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.corpus import Corpus
from mmpt.data.index import ShardIndex, index_name
from mmpt.data.shards import ShardWriter
from mmpt.data.spec import DataSpec
from mmpt.data.storage import Storage

DOCUMENT = {"v": 1, "id": "doc", "parts": [{"type": "text", "text": "Straße, 東京"}]}

keys = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)
suffixes = st.from_regex(r"[0-9]{3}\.(png|jpg|opus)", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
files = st.dictionaries(suffixes, st.binary(max_size=1500), max_size=3)
samples = st.lists(st.tuples(keys, texts, files), min_size=1, max_size=7, unique_by=lambda sample: sample[0])


def open_shards(shards: list[Path]) -> Corpus:
    """A corpus of the shards, by the sidecars that were written with them."""
    shape = {"root": ".", "pattern": "a.tar"}
    spec = DataSpec.model_validate({"version": 1, "name": "a", "format": "interleaved", "shards": shape, "split": {"train": ":"}})
    indices = [load(shard) for shard in shards]
    return Corpus(spec, Storage.of(str(shards[0].parent)), [shard.name for shard in shards], indices)


def load(shard: Path) -> ShardIndex:
    index = ShardIndex.load(shard.with_name(index_name(shard.name)))
    assert index is not None and index.fits(shard)
    return index


def write(folder: Path, count: int, samples_per_shard: int = 3) -> list[Path]:
    with ShardWriter(folder, "part", samples_per_shard) as writer:
        for number in range(count):
            writer.write(f"doc{number}", {**DOCUMENT, "id": f"doc{number}"}, {"000.png": b"png %d" % number, "001.txt": b""})
    return writer.shards


@settings(max_examples=25, deadline=None)
@given(samples=samples, samples_per_shard=st.integers(1, 4))
def test_corpus_and_webdataset_both_read_back_what_was_written(samples: list, samples_per_shard: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder), "random", samples_per_shard) as writer:
            for key, text, files in samples:
                writer.write(key, {"v": 1, "text": text}, files)
        assert len(writer.shards) == -(-len(samples) // samples_per_shard)

        corpus = open_shards(writer.shards)
        reference = list(webdataset.WebDataset([str(shard) for shard in writer.shards], shardshuffle=False))
        assert len(corpus) == len(reference) == len(samples)
        for number, (key, text, files) in enumerate(samples):
            sample = corpus.read(number)
            assert (sample.key, sample.shard) == (key, writer.shards[number // samples_per_shard].name)
            assert json.loads(bytes(sample.fields["json"])) == {"v": 1, "text": text}
            assert {suffix: data for suffix, data in sample.fields.items() if suffix != "json"} == files
            assert reference[number]["__key__"] == key
            assert {name: data for name, data in reference[number].items() if not name.startswith("__")} == sample.fields
        corpus.close()


def test_the_json_comes_first_and_headers_say_nothing_of_this_machine(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, 2)
    with tarfile.open(shard) as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == [f"doc{n}.{s}" for n in (0, 1) for s in ("json", "000.png", "001.txt")]
    assert {(m.mtime, m.uname, m.gname, m.mode) for m in members} == {(0, "mmpt", "mmpt", 0o644)}


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 7), write(tmp_path / "b", 7)
    assert [path.name for path in first] == ["part-00000.tar", "part-00001.tar", "part-00002.tar"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        sidecars = [path.with_name(index_name(path.name)).read_bytes() for path in (one, other)]
        assert sidecars[0] == sidecars[1]


def test_no_empty_shard_after_the_last_full_one(tmp_path: Path) -> None:
    assert len(write(tmp_path, 6)) == 2
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["part-00000.tar", "part-00001.tar"]


@pytest.mark.parametrize("key", ["", "v1.0", "a/b", "../a", "/a", "a\n", "é", "a b"])
def test_keys_that_readers_would_split_elsewhere_are_refused(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path, "part", 3) as writer, pytest.raises(ValueError, match="key"):
        writer.write(key, DOCUMENT, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["", "json", "a/b.png", "..", ".png", "png.", "../x.png", "é.png", "png\n", "_meta.png"])
def test_member_names_that_are_no_suffix_are_refused(tmp_path: Path, suffix: str) -> None:
    with ShardWriter(tmp_path, "part", 3) as writer, pytest.raises(ValueError, match="member"):
        writer.write("doc", DOCUMENT, {suffix: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "document", "files", "told"),
    [
        ("doc", {}, {}, "in this shard already"),
        ("k" * 97, {}, {"000.png": b""}, "105 characters, a tar takes 100"),
        ("new", {"score": float("nan")}, {}, "JSON"),
        ("new", {"text": "\ud800"}, {}, "surrogates"),
    ],
)
def test_a_sample_that_cannot_be_written_whole_leaves_nothing(
    tmp_path: Path, key: str, document: dict, files: dict, told: str
) -> None:
    with ShardWriter(tmp_path, "part", 3) as writer:
        writer.write("doc", DOCUMENT, {})
        with pytest.raises(ValueError, match=told):
            writer.write(key, document, files)
    with tarfile.open(writer.shards[0]) as archive:
        assert archive.getnames() == ["doc.json"]


def test_a_folder_that_looks_like_a_command_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset opens the name itself, and runs what follows `pipe:`."""
    monkeypatch.chdir(tmp_path)
    assert len(load(write(Path("pipe:touch ran; cat >"), 1)[0])) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pipe:touch ran; cat >"]


def test_a_write_that_breaks_off_leaves_whole_shards_only(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power"), ShardWriter(tmp_path, "part", 2) as writer:
        for number in range(3):
            writer.write(f"doc{number}", DOCUMENT, {})
        raise RuntimeError("power cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.tar", "part-00000.tar.index.npz"]
    assert len(load(tmp_path / "part-00000.tar")) == 2


def test_writing_over_a_shard_replaces_its_index_too(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with ShardWriter(tmp_path, "part", 3) as writer:
        writer.write("new", DOCUMENT, {})
    corpus = open_shards(writer.shards)
    assert len(corpus) == 1
    assert corpus.read(0).key == "new"
    corpus.close()
