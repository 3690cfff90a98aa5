"""A tokenizer with the tokens of all tasks, parts of documents to make segments of, and a run with all tasks in its mixture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from mmpt.config import RunConfig, parse
from mmpt.data.pieces import Costs
from mmpt.data.segments import MODALITY
from mmpt.data.shards import ShardWriter
from mmpt.data.tokens import Tokenizer
from mmpt.types import Audio, Image, Part, Text, Video

SENTINELS = 12
TEXTS = ["the red disc stands above the blue box. ", "then another one! ", "is it green? no.\n", "a b c d e f g "]

texts = st.builds(
    lambda text, predict: Text(text=text, predict=predict), st.text(max_size=12) | st.sampled_from(TEXTS), st.booleans()
)
images = st.builds(lambda data: Image(data=data, crc32=0, width=1, height=1), st.binary(min_size=1, max_size=3))
sounds = st.builds(lambda data: Audio(data=data, crc32=0, sample_rate=1, samples=1), st.binary(min_size=1, max_size=3))
clips = st.builds(lambda data: Video(data=data, crc32=0, width=1, height=1, clip=(0, 1)), st.binary(min_size=1, max_size=3))
parts_of_documents = st.lists(st.tuples(texts | images | sounds | clips, st.integers(0, 5)), min_size=1, max_size=6)
"""Parts, each with its slots if it is a medium; 0 leaves it out."""


@cache
def task_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocabulary=320, mask=True, sentinels=SENTINELS)


def costs_of(parts: Sequence[Part], slots: Sequence[int], tokenizer: Tokenizer, fusion: bool = True) -> Costs:
    """As an index and a budget tell them: a medium has four rows for each slot."""
    is_text = [isinstance(part, Text) for part in parts]
    words = [len(tokenizer.encode(part.text)) if isinstance(part, Text) else 0 for part in parts]
    tokens = [words[i] if is_text[i] else fusion * slots[i] for i in range(len(parts))]
    kinds = [MODALITY[type(part)] for part in parts]
    predict = [isinstance(part, Text) and part.predict for part in parts]
    return Costs(kinds, predict, tokens, [0 if text else 4 * count for text, count in zip(is_text, slots, strict=True)])


def write_texts(folder: Path, count: int, longest: int = 8) -> Path:
    """A corpus of `count` documents of texts alone, of one to four sentences, some of `longest`: two shards and a spec."""
    with ShardWriter(folder, "texts", samples_per_shard=-(-count // 2)) as writer:
        for number in range(count):
            draw = random.Random(number)
            sentences = longest if number % 8 == 0 else draw.randint(1, 4)
            said = ["".join(draw.choices(TEXTS, k=sentences)) for _ in range(1 + number % 5 // 4)]
            parts = [{"type": "text", "text": text, "predict": i != 1} for i, text in enumerate(said)]
            writer.write(f"text{number:03d}", {"v": 1, "parts": parts}, {})
    tree = {"version": 1, "name": "texts", "format": "interleaved", "split": {"train": ":"}}
    (folder / "texts.yaml").write_text(yaml.safe_dump(tree | {"shards": {"root": ".", "pattern": "texts-{00000..00001}.tar"}}))
    return folder / "texts.yaml"


def task_config(
    config: RunConfig, folder: Path, parts: Sequence[dict[str, Any]], model: dict[str, Any] | None = None
) -> RunConfig:
    """`config` with a mixture of `parts`, the tokenizer of all tasks, and what `model` says."""
    task_tokenizer().save(folder / "tokenizer.json")
    mixture = {"version": 1, "name": "tasks", "mixture": [{"weight": 1.0, **part} for part in parts]}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(mixture))
    tree = config.model_dump()
    tree["data"] |= {"spec": str(folder / "tasks.yaml"), "tokenizer": str(folder / "tokenizer.json")}
    tree["model"] |= {"vocabulary": len(task_tokenizer())}
    for name, value in (model or {}).items():
        tree["model"][name] = {**tree["model"][name], **value} if isinstance(value, dict) else value
    return parse(tree, where="task_config")


def all_tasks(config: RunConfig, folder: Path, spec: Path) -> RunConfig:
    """Packs of 256 tokens: texts with every task, some of them longer, and the documents of `spec` with hidden words."""
    write_texts(folder, 40, longest=80)
    tasks = ("next_token", "masked", "span")
    parts = [*({"spec": "texts.yaml", "task": task} for task in tasks), {"spec": str(spec), "task": "masked"}]
    made = task_config(config, folder, parts, {"head": "bert", "token_types": 2})
    return made.model_copy(update={"data": made.data.model_copy(update={"pack_tokens": 256})})
