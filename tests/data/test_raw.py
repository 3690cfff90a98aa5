"""Raw batches against Python's own tarfile."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.corpus import Corpus
from mmpt.data.raw import RawLoader, read_batch
from mmpt.data.spec import load_spec

PER_SHARD = (4, 1, 7)
SPEC = """\
version: 1
name: raw
format: pairs
shards: {root: ., pattern: "{0..2}.tar"}
split: {all: ":"}
"""


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8 + number, 8), (number * 9, 100, 3)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("raw")
    (folder / "spec.yaml").write_text(SPEC)
    number = 0
    for shard, samples in enumerate(PER_SHARD):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for _ in range(samples):
                members = {"jpg": jpeg(number), "txt": b"t" * (number * 100 + 1), "json": json.dumps({"n": number}).encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"key{number:03d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                number += 1
    return Corpus.open(load_spec(folder / "spec.yaml"), "all")


@pytest.fixture(scope="module")
def expected(corpus) -> list[tuple[bytes, dict[str, bytes]]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in range(len(PER_SHARD)):
        with tarfile.open(Path(corpus.spec.root) / f"{shard}.tar") as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    return [(key.encode(), members) for key, members in samples.items()]


def found(batch) -> list[tuple[bytes, dict[str, bytes]]]:
    assert len(batch) == len(batch.keys)
    members = [{suffix: bytes(data) for suffix, data in sample.items()} for sample in batch]
    return list(zip(batch.keys.tolist(), members, strict=True))


@given(numbers=st.lists(st.integers(0, sum(PER_SHARD) - 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_samples_in_any_order_are_those_of_the_tars(corpus, expected, numbers):
    assert found(read_batch(corpus, numbers)) == [expected[number] for number in numbers]


def test_neighbors_are_read_at_once(corpus, monkeypatch):
    reads = []
    read = corpus.storage.pread_into
    monkeypatch.setattr(corpus.storage, "pread_into", lambda name, *rest: (reads.append(name), read(name, *rest)))
    read_batch(corpus, range(sum(PER_SHARD)))
    assert reads == ["0.tar", "1.tar", "2.tar"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_its_order_batch_by_batch_every_time(corpus, expected, workers):
    order = np.random.default_rng(0).permutation(sum(PER_SHARD))
    loader = RawLoader(corpus, order, batch=5, workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [5, 5, 2]
        assert len(loader) == 3
        assert [sample for batch in batches for sample in found(batch)] == [expected[number] for number in order]
    loader.close()


@pytest.mark.parametrize("numbers", [[-1], [0, 12]])
def test_a_number_that_is_not_there_is_refused(corpus, numbers):
    with pytest.raises(IndexError, match="of 12"):
        read_batch(corpus, numbers)
