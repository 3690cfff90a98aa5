"""Whether a model trained under ring attention finds a needle: a picture or a word, thousands of tokens before the question.

    OMP_WAIT_POLICY=PASSIVE torchrun --nproc-per-node 2 benchmarks/needle.py --ring 2
    python benchmarks/needle.py

A document is noise, in which eight shapes are hidden, each once: as a small picture of it in one of eight colours, or as the word
for shape and colour. At its end it asks for each shape, and the colour is to be said: by chance one in eight is right. Packs hold
one long document and others of any length, with the same shapes in other colours: who looks into another document is wrong.
Short documents come first. What is found is counted on documents never seen, by the needle's kind and distance, and, where ranks
share a pack, by whether another rank holds it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import record
import torch
from jaxtyping import Int, UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmpt.config import RunConfig, parse
from mmpt.data.collate import Item, PackEntry, collate
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout, splitter_of
from mmpt.parallel.mesh import World, join_world
from mmpt.parallel.sequence import plan_batch
from mmpt.train.machine import keep_freed_memory, make_repeatable
from mmpt.train.optimizer import make_optimizer
from mmpt.train.step import train_step
from mmpt.types import (
    IGNORE,
    IMAGE,
    DocumentRef,
    LoaderState,
    LoadReport,
    MediaSpan,
    PackedBatch,
    PlanCursor,
    TokenizedDocument,
)

PAD, MEDIA = 0, 1
SHAPES, COLORS, NOISE = 8, 8, 64
SHAPE = 2  # the token that asks for the first shape; so the others
COLOR = SHAPE + SHAPES
NAME = COLOR + COLORS  # the word for the first shape in the first colour
WORD = NAME + SHAPES * COLORS  # the first word of the noise
VOCABULARY = WORD + NOISE
SIDE, PATCH = 16, 8  # pixels
PICTURE = (SIDE // PATCH) ** 2  # tokens
RED, GREEN, BLUE, YELLOW = (225, 40, 40), (40, 190, 60), (50, 80, 230), (230, 210, 40)
WHITE, BLACK, PINK, CYAN = (240, 240, 240), (20, 20, 20), (200, 60, 200), (60, 200, 210)
PAINTS = np.array([RED, GREEN, BLUE, YELLOW, WHITE, BLACK, PINK, CYAN])
LEAST = SHAPES * (PICTURE + 2)  # tokens of a document whose needles are all pictures


@dataclass(frozen=True)
class Stage:
    """Steps on one pack of so many tokens, whose documents have up to `longest`."""

    tokens: int
    longest: int
    steps: int


STAGES = (Stage(2048, 64, 250), Stage(2048, 2048, 150), Stage(4096, 4096, 150), Stage(8192, 8192, 150))
TRIED = ((4096, 24), (8192, 12), (16384, 6))  # tokens of packs that are tried at the end, and how many of them


@dataclass(frozen=True)
class Question:
    """Where something is asked for, and where it stands, in tokens of the batch."""

    asked: int
    needle: int
    kind: str


def draw_shape(shape: int, color: int, chance: np.random.Generator) -> UInt8[np.ndarray, "side side 3"]:
    """Anywhere near the middle, on grey, with noise."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2 - chance.uniform(-1.5, 1.5, (2, 1, 1))
    far = np.hypot(x, y)
    inside = (
        far < 5.5,
        np.maximum(abs(x), abs(y)) < 4.5,
        np.minimum(abs(x), abs(y)) < 1.6,
        abs(x - y) < 2.4,
        (far < 6.5) & (far > 3.8),
        abs(x) < 1.6,
        abs(y) < 1.6,
        abs(x + y) < 2.4,
    )[shape]
    pixels = np.where(inside[..., None], PAINTS[color], chance.integers(110, 150)) + chance.normal(0, 8, (SIDE, SIDE, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def as_item(pixels: UInt8[np.ndarray, "side side 3"]) -> Item:
    """In patches, as the image encoder reads them."""
    side = SIDE // PATCH
    patches = pixels.reshape(side, PATCH, side, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(PICTURE, -1)
    return Item(values=torch.from_numpy(np.ascontiguousarray(patches)), grid=(1, side, side), times=(0.0,))


def make_document(length: int, chance: np.random.Generator) -> tuple[TokenizedDocument, list[Item], list[Question]]:
    """Of `length` tokens, at least LEAST: noise with every shape in it, and then the questions."""
    shapes, colors = chance.permutation(SHAPES), chance.integers(0, COLORS, SHAPES)
    pictured = chance.random(SHAPES) < 0.5
    noise = WORD + chance.integers(0, NOISE, length - int(np.where(pictured, PICTURE, 1).sum()) - 2 * SHAPES)
    cuts = np.sort(chance.integers(0, len(noise) + 1, SHAPES))
    tokens: list[int] = []
    spans, items, places = [], [], []
    for shape, color, seen, part in zip(shapes, colors, pictured, np.split(noise, cuts), strict=False):
        tokens += part.tolist()
        places.append(len(tokens))
        if seen:
            spans.append(MediaSpan(start=len(tokens), length=PICTURE, modality=IMAGE, item=len(items)))
            items.append(as_item(draw_shape(shape, color, chance)))
        tokens += [MEDIA] * PICTURE if seen else [NAME + int(shape) * COLORS + int(color)]
    tokens += noise[cuts[-1] :].tolist()
    labels, questions = [IGNORE] * len(tokens), []
    for i in chance.permutation(SHAPES):
        questions.append(Question(len(tokens), places[i], "picture" if pictured[i] else "word"))
        tokens += [SHAPE + int(shapes[i]), COLOR + int(colors[i])]
        labels += [COLOR + int(colors[i]), IGNORE]
    return TokenizedDocument(tokens=tuple(tokens), labels=tuple(labels), media=tuple(spans)), items, questions


def make_lengths(stage: Stage, chance: np.random.Generator) -> list[int]:
    """Of the documents of a pack: one of most of it, if the stage lets it, and others of any length."""
    lengths, left = [], stage.tokens
    if stage.longest == stage.tokens:
        lengths.append(int(stage.tokens * chance.uniform(0.6, 0.95)))
        left -= lengths[0]
    while left >= LEAST:
        lengths.append(int(chance.integers(LEAST, max(min(left, stage.longest), LEAST) + 1)))
        left -= lengths[-1]
    chance.shuffle(lengths)
    return lengths


def make_batch(config: RunConfig, stage: Stage, number: int) -> tuple[PackedBatch, list[Question]]:
    """Pack `number` of the stage's kind, the same on every rank."""
    chance = np.random.default_rng((config.data.seed, stage.tokens, stage.longest, number))
    entries, questions, start = [], [], 0
    for place, length in enumerate(make_lengths(stage, chance)):
        document, items, asked = make_document(length, chance)
        ref = DocumentRef(source="needle", key=str(place), epoch=0, piece=0, pack=number, position=start, seed=0)
        entries.append(PackEntry(ref=ref, tokens=length, segments=[document], items={IMAGE: items}))
        questions += [Question(start + each.asked, start + each.needle, each.kind) for each in asked]
        start += length
    state = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
    report = LoadReport(milliseconds={}, tokens={}, faults=())
    batch = collate([entries], model=config.model, pack_tokens=stage.tokens, pad=PAD, state=state, report=report)
    return batch, questions


def make_config(arguments: argparse.Namespace) -> RunConfig:
    small = {"dim": 64, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 128, "bias": True}  # biases: a place to look without a content
    return parse(
        {
            "name": "needle",
            "model": {
                "vocabulary": VOCABULARY,
                "levels": [],
                "image": {**small, "size": SIDE, "patch": PATCH, "layers": 1},
                "transformer": {**small, "layers": 2, "mask": "media", "rope_theta": 500_000},
            },
            "data": {"spec": "made", "tokenizer": "made", "pack_tokens": STAGES[-1].tokens, "packs_per_batch": 1},
            "optimizer": {"lr": 5e-3, "betas": [0.9, 0.98], "weight_decay": 0.01, "warmup_steps": 50, "final_fraction": 0.1},
            "train": {"steps": sum(stage.steps for stage in STAGES), "precision": "fp32", "seed": arguments.seed},
            "parallel": {"ring": arguments.ring, "ulysses": arguments.ulysses, "tp": arguments.tp},
        },
        where="needle",
    )


def train(model: MultimodalModel, config: RunConfig, world: World) -> Iterator[str]:
    """Through all stages; a line now and then."""
    optimizer, split = make_optimizer(model, config.optimizer), splitter_of(config.model, world)
    step, began = 0, time.perf_counter()
    for stage in STAGES:
        for number in range(stage.steps):
            batch, _ = make_batch(config, stage, number)
            figures = train_step(model, optimizer, [split(batch) if split else batch], step, config, world, detailed=False)
            step += 1
            if step % 50 == 0 or number + 1 == stage.steps:
                yield f"{stage.tokens:>6} tokens  step {step:>4}  loss {figures['loss']:.3f}  {time.perf_counter() - began:.0f} s"


@torch.no_grad()
def find(model: MultimodalModel, config: RunConfig, world: World, tokens: int, packs: int) -> Counter[str]:
    """On packs never seen: how many questions of each kind there were, and how many were answered right, over all ranks."""
    split, found = splitter_of(config.model, world), Counter()
    for number in range(packs):
        batch, questions = make_batch(config, Stage(tokens, tokens, 0), 1_000_000 + number)
        mine, owner = who_has_what(batch, config, world)
        output = model(split(batch) if split else batch)
        right = (output.output_hidden @ output.output_weight.T).argmax(-1) == batch.labels[mine]
        place = {token: row for row, token in enumerate(mine.tolist())}
        for question in questions:
            if question.asked in place:
                hit = bool(right[place[question.asked]])
                distance = question.asked - question.needle
                abroad = owner[question.asked] != owner[question.needle]
                for name in ("all", question.kind, near(distance), "another rank's" if abroad else "own"):
                    found[f"{name}/asked"] += 1
                    found[f"{name}/right"] += hit
    return Counter(world.add_up(found))


def near(distance: int) -> str:
    """The power of two below which it is."""
    return f"< {2 ** max(distance.bit_length(), 9):,}"


def who_has_what(batch: PackedBatch, config: RunConfig, world: World) -> tuple[Int[Tensor, " t"], Int[Tensor, " T"]]:
    """Tokens of the batch that this rank has, in its order; and the rank of the ring that has each token."""
    layout, tokens = world.layout, len(batch.tokens)
    if layout.sequence == 1:
        return torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64)
    _, order = plan_batch(batch, layout.ring, config.model.transformer.mask)
    return order.view(layout.sequence, -1)[world.sequence_rank], order.argsort() // (tokens // layout.ring)


def make_table(found: dict[int, Counter[str]]) -> Table:
    names = {name.split("/")[0] for counts in found.values() for name in counts}
    bounds = sorted((name for name in names if name.startswith("<")), key=lambda name: int(name[2:].replace(",", "")))
    table = Table("packs of", *(f"{tokens:,}" for tokens in found), title="Answered right, of those asked (by chance 12.5 %)")
    for name in ("all", "word", "picture", "own", "another rank's", *bounds):
        cells = [(counts[f"{name}/right"], counts[f"{name}/asked"]) for counts in found.values()]
        if any(asked for _, asked in cells):
            label = f"{name} tokens back" if name in bounds else name
            table.add_row(label, *(f"{right / asked:.1%} of {asked:,.0f}" if asked else "-" for right, asked in cells))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis in ("ring", "ulysses", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make_repeatable()
    keep_freed_memory()
    config = make_config(arguments)
    with join_world(config) as world:
        model = MultimodalModel(config.model).initialize(config.train.seed)
        weights = sum(p.numel() for p in model.parameters())
        apply_layout(model, config.train, world)
        began, processor = time.perf_counter(), time.process_time()
        for line in train(model, config, world):
            if world.is_main:
                print(line, flush=True)
        seconds = {"seconds": time.perf_counter() - began, "processor_seconds_a_rank": time.process_time() - processor}
        found = {tokens: find(model, config, world, tokens, packs) for tokens, packs in TRIED}
        if world.is_main:
            Console().print(make_table(found))
            print(", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in seconds.items()))
            figures = {"weights": weights, **seconds, "found": {str(tokens): dict(counts) for tokens, counts in found.items()}}
            settings = {**vars(arguments), "stages": [vars(stage) for stage in STAGES]}
            name = (
                "needle" if world.size == 1 else f"needle_{'_'.join(f'{k}{v}' for k, v in vars(world.layout).items() if v > 1)}"
            )
            print(record.write(name, settings, figures, ("torch", "mmpt")))


if __name__ == "__main__":
    main()
