from __future__ import annotations

import io
import json
import os
from itertools import islice
from pathlib import Path

import fuzzing
import numpy as np
import pytest
import yaml
from rich.console import Console

from mmpt.config import ModelConfig, RunConfig
from mmpt.data.loader import Loader
from mmpt.data.shards import ShardWriter
from mmpt.data.stats import render, stats
from mmpt.data.tokens import Tokenizer
from mmpt.types import UserError

TEXTS = "version: 1\nname: texts\nformat: interleaved\nshards: {root: '.', pattern: 'x-00000.tar'}\nsplit: {train: ':'}\n"
MIXTURE = """\
version: 1
name: both
mixture:
- {spec: spec.yaml, weight: 3}
- {spec: texts/spec.yaml, weight: 1, max_epochs: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of the fuzz, one of texts (of which one is faulty), and a mixture of both."""
    folder = tmp_path_factory.mktemp("stats")
    fuzzing.write_corpus(folder)
    with ShardWriter(folder / "texts", "x", samples_per_shard=10) as writer:
        for number in range(5):
            parts = [{"type": "text", "text": "a" * (number + 1)}] if number else [{"type": "image", "file": "1.png"}]
            writer.write(f"t{number}", {"v": 1, "parts": parts}, {})
    (folder / "texts" / "spec.yaml").write_text(TEXTS)
    mixture = (
        "version: 1\nname: both\nmixture:\n- {spec: spec.yaml, weight: 3}\n- {spec: texts/spec.yaml, weight: 1, max_epochs: 1}\n"
    )
    (folder / "both.yaml").write_text(mixture)
    return folder


@pytest.fixture
def config(folder: Path) -> RunConfig:
    return fuzzing.run_config(folder)


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder / "tokenizer.json")


def test_counts_of_a_corpus(folder: Path) -> None:
    found = stats(folder / "spec.yaml", "train").sources["fuzzed"]
    assert (found.shards, found.documents, found.faulty) == (2, 8, {})
    assert found.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    # A video with a sound track makes a part of each.
    assert found.parts == {"text": 8, "image": 6, "audio": 4 + 2, "video": 2}
    assert (found.width["min"], found.width["max"], found.height["min"], found.height["max"]) == (20, 64, 24, 48)
    assert found.seconds == pytest.approx({"audio": 4 * 0.3 + 2 * 1.0, "video": 2.0})
    assert found.clip_seconds["median"] == 1.0 and found.sound_seconds["min"] == pytest.approx(0.3)
    assert found.tokens == {} and found.lengths == {} and found.fill is None


def test_faulty_documents_are_counted_by_reason(folder: Path, tokenizer: Tokenizer) -> None:
    found = stats(folder / "texts" / "spec.yaml", "train", tokenizer).sources["texts"]
    assert found.documents == 5 and found.faulty == {"missing": 1}
    assert found.parts == {"text": 4, "image": 0, "audio": 0, "video": 0}
    assert found.tokens == {"text": sum(len(tokenizer.encode("a" * count)) for count in (2, 3, 4, 5))}
    assert found.width == {} and found.seconds == {"audio": 0.0, "video": 0.0}


def test_tokens_lengths_and_fill_are_those_of_a_run(folder: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    found = stats(folder / "spec.yaml", "train", tokenizer, config)
    source = found.sources["fuzzed"]
    batches = list(islice(Loader(config, 0, 1), 30))
    documents = [ref for batch in batches for ref in batch.provenance]
    assert len(documents) >= 80
    tokens = sum(sum(batch.report.tokens.values()) for batch in batches)
    assert source.fill == pytest.approx(tokens / (len(batches) * 2 * config.data.pack_tokens), rel=0.1)
    assert found.fill == pytest.approx(source.fill)
    # A picture of 32 x 32 at 16 pixels a token takes 4, a clip of a second at 2 frames a second 8.
    assert (source.tokens["image"], source.tokens["video"]) == (source.parts["image"] * 4, 2 * 8)
    epoch = tokens / len(documents) * 8
    assert source.lengths["min"] <= epoch / 8 <= source.lengths["max"]


def test_a_mixture_has_a_column_for_each_source(folder: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    found = stats(folder / "both.yaml", "train", tokenizer, config)
    assert list(found.sources) == ["fuzzed", "texts"]
    assert 0 < found.fill <= 1 and all(0 < source.fill <= 1 for source in found.sources.values())
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["sources"]["texts"]["faulty"] == {"missing": 1} and plain["split"] == "train"
    out = io.StringIO()
    Console(file=out, width=200).print(render(found))
    text = out.getvalue()
    for shown in ("fuzzed", "texts", "faulty: missing", "picture width: min, 5 %, median, 95 %, max", "packs of the mixture"):
        assert shown in text


def test_a_spec_that_stands_twice_has_a_column_for_each_task(folder: Path, config: RunConfig, tmp_path: Path) -> None:
    once = {"spec": os.path.relpath(folder / "texts" / "spec.yaml", tmp_path), "weight": 1}
    mixture = {"version": 1, "name": "twice", "mixture": [once, once | {"max_epochs": 2, "task": "masked"}]}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(mixture))
    Tokenizer.train(["aaaaa"], 300, mask=True).save(tmp_path / "t.json")
    found = stats(tmp_path / "twice.yaml", "train", Tokenizer.load(tmp_path / "t.json"), config)
    assert list(found.sources) == ["texts", "texts:masked"] and found.fill > 0


def test_of_towers_alone(folder: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Of a document its first text is a segment; media take no tokens."""
    model = ModelConfig.model_validate(config.model.model_dump() | {"fusion": False, "levels": ["tower"]})
    source = stats(folder / "spec.yaml", "train", tokenizer, config.model_copy(update={"model": model})).sources["fuzzed"]
    assert source.tokens["image"] == source.tokens["audio"] == source.tokens["video"] == 0 < source.tokens["text"]
    assert source.lengths["max"] <= source.tokens["text"] + 2 and 0 < source.fill <= 1


def test_quantiles_are_numpys(folder: Path) -> None:
    found = stats(folder / "spec.yaml", "train").sources["fuzzed"]
    sides = [36, 20, 40, 24, 33, 64]
    assert found.width["median"] == np.median(sides) and found.width["95 %"] == pytest.approx(np.quantile(sides, 0.95))


def test_an_unknown_split_is_the_users_mistake(folder: Path) -> None:
    with pytest.raises(UserError, match="no split 'test'"):
        stats(folder / "spec.yaml", "test")
