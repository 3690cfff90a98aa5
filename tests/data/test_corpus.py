from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmpt.data.corpus import Corpus
from mmpt.data.documents import Interleaved
from mmpt.data.faults import BadMedia
from mmpt.data.index import ShardIndex
from mmpt.data.shards import ShardWriter
from mmpt.data.spec import DataSpec, load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.types import Text, UserError


def write_shards(folder: Path, *counts: int, start: int = 0) -> DataSpec:
    """A spec over shards of so many documents each, every one a text of its own."""
    folder.mkdir(exist_ok=True)
    for shard, count in enumerate(counts):
        with ShardWriter(folder, f"s{shard}", samples_per_shard=max(count, 1)) as writer:
            for number in range(count):
                key = f"k{start + 10 * shard + number:03d}"
                writer.write(key, {"v": 1, "id": key, "parts": [{"type": "text", "text": f"text of {key}"}]}, {})
        (folder / f"s{shard}-00000.tar").rename(folder / f"{shard}.tar")
        (folder / f"s{shard}-00000.tar.index.npz").rename(folder / f"{shard}.tar.index.npz")
    tree = {
        "version": 1,
        "name": "some",
        "format": "interleaved",
        "shards": {"root": ".", "pattern": f"{{0..{len(counts) - 1}}}.tar"},
        "split": {"train": ":"},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    return load_spec(folder / "spec.yaml")


def keys(corpus: Corpus) -> list[str]:
    return [corpus.read(number).key for number in range(len(corpus))]


def test_numbers_run_on_over_the_shards(tmp_path: Path) -> None:
    corpus = Corpus.open(write_shards(tmp_path, 3, 1, 4), "train")
    wanted = [f"k{number:03d}" for number in (0, 1, 2, 10, 20, 21, 22, 23)]
    assert keys(corpus) == wanted == [corpus.key(number) for number in range(8)]
    assert [part.text for number in range(8) for part in corpus.document(number).parts] == [f"text of {key}" for key in wanted]
    assert corpus.read(3).shard == "1.tar" and corpus.first_part.tolist() == list(range(9))
    for outside in (-1, 8):
        with pytest.raises(IndexError, match="of 8"):
            corpus.read(outside)
    corpus.close()


def test_the_fingerprint_follows_names_order_and_content(tmp_path: Path) -> None:
    fingerprint = Corpus.open(write_shards(tmp_path / "a", 3, 2), "train").fingerprint
    assert fingerprint == Corpus.open(write_shards(tmp_path / "b", 3, 2), "train").fingerprint
    assert fingerprint != Corpus.open(write_shards(tmp_path / "c", 2, 3), "train").fingerprint
    assert fingerprint != Corpus.open(write_shards(tmp_path / "d", 3, 2, start=1), "train").fingerprint
    assert fingerprint != Corpus.open(write_shards(tmp_path / "e", 3), "train").fingerprint


def test_missing_shards_are_named_and_counted(tmp_path: Path) -> None:
    spec = write_shards(tmp_path, 1, 1, 1)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(UserError, match=r"lacks 1.tar, 1 of 3 shards of split 'train'"):
        Corpus.open(spec, "train")


def test_a_format_that_is_not_read_in_place_names_the_command(tmp_path: Path) -> None:
    spec = write_shards(tmp_path, 1).model_copy(update={"format": "mmc4"})
    with pytest.raises(UserError, match="format mmc4 is not read in place; `mmpt data build"):
        Corpus.open(spec, "train")


def test_indexing_in_processes_gives_the_same(tmp_path: Path) -> None:
    spec = write_shards(tmp_path, 3, 1, 2)
    one = Corpus.open(spec, "train")
    for sidecar in tmp_path.glob("*.npz"):
        sidecar.unlink()
    told = []
    other = Corpus.open(spec, "train", workers=2, progress=lambda done, total: told.append((done, total)))
    assert one.fingerprint == other.fingerprint and told == [(1, 3), (2, 3), (3, 3)]
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_a_shard_that_shrank_under_the_run_is_told(tmp_path: Path) -> None:
    corpus = Corpus.open(write_shards(tmp_path, 30), "train")
    os.truncate(tmp_path / "0.tar", 1024)
    with pytest.raises(UserError, match="cut after it was indexed"):
        corpus.read(29)
    corpus.close()


def test_a_text_that_changed_since_it_was_indexed_is_found(tmp_path: Path) -> None:
    corpus = Corpus.open(write_shards(tmp_path, 3), "train")
    content = bytearray((tmp_path / "0.tar").read_bytes())
    at = content.index(b"text of k001")
    content[at] ^= 1
    (tmp_path / "0.tar").write_bytes(content)
    assert corpus.document(0).parts == (Text(text="text of k000"),)
    with pytest.raises(BadMedia, match="json has changed since it was indexed") as caught:
        corpus.document(1)
    assert caught.value.reason == "crc"


def test_a_faulty_document_is_noted_and_has_no_parts(tmp_path: Path) -> None:
    spec = write_shards(tmp_path, 3)
    path = tmp_path / "0.tar"
    path.write_bytes(path.read_bytes().replace(b'"v": 1, "id": "k001"', b'"v": 2, "id": "k001"'))
    corpus = Corpus.open(spec, "train")
    assert corpus.shards[0].reasons.tolist() == [b"", b"json", b""] and corpus.first_part.tolist() == [0, 1, 1, 2]
    with pytest.raises(BadMedia, match="v = 2: this reads version 1"):
        corpus.document(1)
    assert corpus.document(2).key == "k002"


def test_token_counts_are_kept_for_each_tokenizer(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_shards(tmp_path, 3, 2)
    wanted = [len(tokenizer.encode(f"text of k{number:03d}")) for number in (0, 1, 2, 10, 11)]
    assert Corpus.open(spec, "train").token_counts(tokenizer).tolist() == wanted
    corpus, encode = Corpus.open(spec, "train"), Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail("counted again"))
    assert corpus.token_counts(tokenizer).tolist() == wanted
    monkeypatch.setattr(Tokenizer, "encode", encode)
    other = Tokenizer.train(["text of"] * 3, vocabulary=265)
    assert corpus.token_counts(other).tolist() != wanted


@pytest.mark.parametrize("content", ["another index", "negative", "another shape", "more than its bytes", "no npz"])
def test_counts_that_do_not_fit_are_made_again(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    corpus = Corpus.open(write_shards(tmp_path, 3), "train")
    wanted = corpus.token_counts(tokenizer)
    (path,) = tmp_path.glob("*.tokens-*.npz")
    index = np.array(corpus.shards[0].fingerprint.encode())
    changed = {
        "another index": {"counts": np.array([9, 9, 9]), "index": np.array(b"x")},
        "negative": {"counts": np.array([-1, 9, 9]), "index": index},
        "another shape": {"counts": np.array([9]), "index": index},
        "more than its bytes": {"counts": np.array([9, 10**6, 9]), "index": index},
    }
    path.write_bytes(b"hello") if content == "no npz" else np.savez(path, **changed[content])
    assert corpus.token_counts(tokenizer).tolist() == wanted.tolist()


def test_meta_comes_with_a_document(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "m", samples_per_shard=1) as writer:
        writer.write("a", {"v": 1, "parts": [{"type": "text", "text": "a"}], "meta": {"license": "CC0-1.0"}}, {})
    spec = {"version": 1, "name": "m", "format": "interleaved", "split": {"train": ":"}}
    (tmp_path / "m.yaml").write_text(json.dumps(spec | {"shards": {"root": ".", "pattern": "m-00000.tar"}}))
    assert Corpus.open(load_spec(tmp_path / "m.yaml"), "train").document(0).meta == {"license": "CC0-1.0"}


def _read_in_worker(corpus: Corpus, queue: multiprocessing.Queue) -> None:
    queue.put((keys(corpus), corpus.fingerprint))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_same(tmp_path: Path, method: str) -> None:
    corpus = Corpus.open(write_shards(tmp_path, 40), "train")
    corpus.read(0)  # the parent has the shard open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_in_worker, args=(corpus, queue))
    worker.start()
    for number in reversed(range(40)):  # at the same time, in another order
        assert corpus.read(number).key == f"k{number:03d}"
    read, fingerprint = queue.get(timeout=60)
    worker.join(timeout=60)
    assert read == keys(corpus)
    assert fingerprint == corpus.fingerprint
    corpus.close()


@pytest.mark.parametrize("more", [-1, 1])
def test_a_sidecar_that_tells_of_other_texts_is_found_out(tmp_path: Path, more: int) -> None:
    spec = write_shards(tmp_path, 3)
    path = tmp_path / "0.tar.index.npz"
    index = ShardIndex.load(path)
    parts = np.concatenate([index.parts[:1], index.parts]) if more > 0 else index.parts[1:]
    replace(index, parts=parts, first_part=np.append(0, index.first_part[1:] + more)).save(path)
    with pytest.raises(BadMedia, match=f"it has 1 texts, and {1 + more} were indexed"):
        Corpus.open(spec, "train").document(0)


def test_a_sidecar_that_calls_a_faulty_document_sound_is_found_out(tmp_path: Path) -> None:
    spec = write_shards(tmp_path, 1)
    tar, path = tmp_path / "0.tar", tmp_path / "0.tar.index.npz"
    sound = ShardIndex.load(path)
    tar.write_bytes(tar.read_bytes().replace(b'"parts"', b'"pants"'))
    replace(sound, crcs=ShardIndex.build(tar, Interleaved()).crcs).save(path)
    with pytest.raises(BadMedia, match="it is not the document that was indexed"):
        Corpus.open(spec, "train").document(0)


def test_a_sample_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_shards(tmp_path, 3)
    monkeypatch.setattr("mmpt.data.index.MAX_SAMPLE_BYTES", 20)
    (tmp_path / "0.tar.index.npz").unlink()
    with pytest.raises(UserError, match="sample k000 has over 20 bytes or"):
        Corpus.open(spec, "train")
