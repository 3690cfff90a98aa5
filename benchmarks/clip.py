"""CLIP's training steps beside open_clip's own model and loss: samples per CPU-second, or per second of an accelerator.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/clip.py [--patch 8] [--rounds 15]
        on a CPU: towers of 6 layers x 192, pictures of 64 pixels; threads that wait in a loop would be counted as work
    python benchmarks/clip.py
        with an accelerator: ViT-B/32 at 224, torch.compile on both

Both start from the same weights and read the same pictures and captions; whole steps (forward, ClipLoss or ours, backward, fused
AdamW), bf16 autocast, batches in memory. Ours packs captions; open_clip pads them to 77, its default, and for a fair second row
to the longest caption of the data. Rounds are interleaved; figures are medians. Before that, both are trained for some steps in
fp32, and the losses printed side by side.

Captions have as many words as those of Conceptual Captions (10.3, deviation 4.5: Sharma et al., ACL 2018), log-normal, and 1.2
tokens a word, drawn by Zipf's law; pictures are noise, which costs what a photograph costs.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import record
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table

from mmpt.config import RunConfig, load
from mmpt.data.collate import Item, PackEntry, collate
from mmpt.model.convert import write_checkpoint
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout
from mmpt.parallel.mesh import World, join_world
from mmpt.train.machine import keep_freed_memory, make_repeatable
from mmpt.train.optimizer import make_optimizer, set_learning_rate
from mmpt.train.step import autocast, train_step
from mmpt.types import (
    IGNORE,
    IMAGE,
    NOTHING,
    TEXT,
    DocumentRef,
    EmbeddingToken,
    LoaderState,
    LoadReport,
    PackedBatch,
    PlanCursor,
    TokenizedDocument,
)

CONFIG = Path(__file__).parents[1] / "configs" / "clip_vit_b32.yaml"
WORDS, DEVIATION, TOKENS_A_WORD = 10.3, 4.5, 1.2
CONTEXT = 77
BOS, EOS = 49406, 49407
WARM_UP, COMPARED = 3, 5  # steps
PEER = "open_clip, captions padded to 77"
OURS = "mmpt, captions packed"

Step = Callable[[int], float]
"""A whole training step on batch i; its loss."""


def small(patch: int) -> list[str]:
    """Of the towers that a CPU trains."""
    tower = {"dim": 192, "layers": 6, "n_heads": 3, "ffn_dim": 768}
    parts = [f"model.{part}.{name}={value}" for part in ("image", "transformer") for name, value in tower.items()]
    return [*parts, "model.image.size=64", f"model.image.patch={patch}", "model.embedding_dim=192"]


@dataclass(frozen=True)
class Pairs:
    """A batch of pictures and captions, before either side made it its own."""

    patches: torch.Tensor  # (pictures, patches, values), uint8
    captions: Sequence[tuple[int, ...]]  # without marks


def draw_pairs(config: RunConfig, count: int, seed: int) -> Pairs:
    draw, image = np.random.default_rng(seed), config.model.image
    spread = math.log(1 + (DEVIATION / WORDS) ** 2)
    words = draw.lognormal(math.log(WORDS) - spread / 2, math.sqrt(spread), count)
    lengths = np.clip(np.round(words * TOKENS_A_WORD), 1, CONTEXT - 2).astype(int)
    captions = [tuple((draw.zipf(1.2, length) % BOS).tolist()) for length in lengths]
    shape = (count, image.patches_per_side**2, 3 * image.patch**2)
    return Pairs(torch.from_numpy(draw.integers(0, 256, shape, dtype=np.uint8)), captions)


def our_batch(pairs: Pairs, config: RunConfig, pack_tokens: int) -> PackedBatch:
    """One pack, as the loader makes it."""
    side, entries = config.model.image.patches_per_side, []
    for number, (patches, words) in enumerate(zip(pairs.patches, pairs.captions, strict=True)):
        tokens = (BOS, *words, EOS)
        embeddings = (
            EmbeddingToken(start=len(tokens) - 1, stop=len(tokens), modality=TEXT, item=NOTHING, content=2 * number),
            EmbeddingToken(start=len(tokens), stop=len(tokens), modality=IMAGE, item=0, content=2 * number + 1),
        )
        labels = (IGNORE,) * len(tokens)
        entries.append(
            PackEntry(
                ref=DocumentRef(source="drawn", key=f"{number}", epoch=0, piece=0, pack=0, position=0, seed=0),
                tokens=len(tokens),
                segments=(TokenizedDocument(tokens=tokens, labels=labels, embeddings=embeddings),),
                items={IMAGE: [Item(values=patches, grid=(1, side, side), times=(0.0,))]},
            )
        )
    cursor = PlanCursor(window=0, pack=0, sources={})
    return collate(
        [entries],
        model=config.model,
        pack_tokens=pack_tokens,
        pad=0,
        state=LoaderState(fingerprint={}, cursor=cursor, packs_consumed=0),
        report=LoadReport(milliseconds={}, tokens={}, faults=()),
    )


def ours(config: RunConfig, model: MultimodalModel, batches: Sequence[PackedBatch], world: World) -> Step:
    optimizer = make_optimizer(model, config.optimizer)

    def step(i: int) -> float:
        torch.use_deterministic_algorithms(True, warn_only=world.device.type == "cuda")  # as a run does
        figures = train_step(model, optimizer, [batches[i % len(batches)]], i, config, world, detailed=False)
        torch.use_deterministic_algorithms(False)
        return figures["loss"]

    return step


def open_clips(config: RunConfig, checkpoint: Path, data: Sequence[Pairs], context: int, device: torch.device) -> Step:
    """A step of its training script, for captions padded to `context`; from a checkpoint of its own."""
    model = open_clip.create_model(f"local-dir:{checkpoint}", precision="fp32", device=device)
    assert type(model) is open_clip.CLIP, type(model)
    model.positional_embedding = torch.nn.Parameter(model.positional_embedding[:context].detach().clone())
    model.attn_mask = model.attn_mask[:context, :context].contiguous()
    optimizer, loss_of = make_optimizer(model, config.optimizer), open_clip.ClipLoss()
    batches = [(pictures(pairs, config).to(device), padded(pairs, context).to(device)) for pairs in data]
    run = torch.compile(model) if config.train.compile else model

    def step(i: int) -> float:
        set_learning_rate(optimizer, config.optimizer, i, config.train.steps)
        with autocast(config, device):
            loss = loss_of(*run(*batches[i % len(batches)]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return step


def pictures(pairs: Pairs, config: RunConfig) -> torch.Tensor:
    """(pictures, 3, size, size), normalised."""
    image = config.model.image
    shape = {"h": image.patches_per_side, "p": image.patch, "q": image.patch}
    pixels = rearrange(pairs.patches, "m (h w) (p q c) -> m c (h p) (w q)", **shape).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std))
    return (pixels - mean) / std


def padded(pairs: Pairs, context: int) -> torch.Tensor:
    rows = [torch.tensor([BOS, *words, EOS]) for words in pairs.captions]
    return torch.stack([torch.nn.functional.pad(row, (0, context - len(row))) for row in rows])


def clock(device: torch.device) -> float:
    """CPU-seconds of the process, of all its threads; seconds where an accelerator computes."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def build(config: RunConfig, data: Sequence[Pairs], world: World) -> dict[str, Step]:
    """A step of each side, from the same weights."""
    longest = max(len(words) for pairs in data for words in pairs.captions) + 2
    tokens = [sum(len(words) + 2 for words in pairs.captions) for pairs in data]
    pack_tokens = -(-max(tokens) // 64) * 64
    batches = [our_batch(pairs, config, pack_tokens).to(world.device) for pairs in data]
    with tempfile.TemporaryDirectory() as folder:
        model = MultimodalModel(config.model).initialize(seed=0)
        write_checkpoint(model, config.model, "open_clip", Path(folder))
        model = apply_layout(model.to(world.device), config.train, world)
        contexts = {PEER: CONTEXT, f"open_clip, padded to the longest, {longest}": longest}
        peers = {name: open_clips(config, Path(folder), data, context, world.device) for name, context in contexts.items()}
    return {OURS: ours(config, model, batches, world), **peers}


def measure(steps: dict[str, Step], pairs: int, rounds: int, device: torch.device) -> dict[str, list[tuple[float, float]]]:
    """Samples per clock second, and per second, of every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for i in range(WARM_UP + rounds):
        for name, step in steps.items():
            wall, began = time.perf_counter(), clock(device)
            step(i)
            spent, passed = clock(device) - began, time.perf_counter() - wall
            if i >= WARM_UP:
                found[name].append((pairs / spent, pairs / passed))
    return found


def compare(config: RunConfig, data: Sequence[Pairs], world: World) -> list[tuple[float, float]]:
    """Losses of both in fp32, step by step."""
    steps = build(config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})}), data, world)
    return [(steps[OURS](i), steps[PEER](i)) for i in range(COMPARED)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=8, help="of the small towers, pixels")
    parser.add_argument("--batch", type=int, default=0, help="pairs; 64 on a CPU, 1,024 on an accelerator")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="clip", help="of the file of results")
    arguments = parser.parse_args()
    make_repeatable()
    torch.use_deterministic_algorithms(False)  # switched on for our steps alone
    keep_freed_memory()
    is_cpu = not torch.cuda.is_available()
    if is_cpu:
        torch.set_num_threads(min(2, torch.get_num_threads()))
    pairs = arguments.batch or (64 if is_cpu else 1024)
    overrides = [*(small(arguments.patch) if is_cpu else ["train.compile=true"]), "train.accumulate=1", "train.precision=bf16"]
    config = load(CONFIG, [*overrides, "data.packs_per_batch=1", f"optimizer.warmup_steps={COMPARED}"])
    data = [draw_pairs(config, pairs, seed) for seed in range(arguments.batches)]
    with join_world(config) as world:
        losses = compare(config, data, world)
        rounds = measure(build(config, data, world), pairs, arguments.rounds, world.device)
    report(config, arguments, data, losses, rounds)


def report(config: RunConfig, arguments: argparse.Namespace, data: Sequence[Pairs], losses: list, rounds: dict) -> None:
    """Print losses and table, and write the JSON."""
    is_cpu, console = not torch.cuda.is_available(), Console()
    for number, (mine, theirs) in enumerate(losses):
        console.print(f"step {number}, fp32: loss {mine:.6f}, open_clip's {theirs:.6f}, difference {abs(mine - theirs):.1e}")
    table = Table(title=f"Training steps, median of {arguments.rounds} interleaved rounds")
    unit = "samples per CPU-second" if is_cpu else "samples/s"
    for column in ("", unit, "samples/s by the wall", "times open_clip's"):
        table.add_column(column, justify="left" if not column else "right")
    medians = {name: [statistics.median(values) for values in zip(*found, strict=True)] for name, found in rounds.items()}
    figures = {}
    for name, (rate, wall) in medians.items():
        ratio = rate / medians[PEER][0]
        table.add_row(name, f"{rate:,.1f}", f"{wall:,.1f}", f"{ratio:.2f}")
        figures[name] = {unit: rate, "samples/s by the wall": wall, "ratio": ratio}
    console.print(table)
    lengths = [len(words) + 2 for pairs in data for words in pairs.captions]
    settings = {
        "model": config.model.model_dump(mode="json", exclude_defaults=True),
        "pairs": len(data[0].captions),
        "rounds": arguments.rounds,
        "precision": config.train.precision,
        "compile": config.train.compile,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "caption tokens, marks included": {"mean": statistics.mean(lengths), "max": max(lengths)},
    }
    compared = [{"mmpt": mine, "open_clip": theirs} for mine, theirs in losses]
    packages = ("mmpt", "torch", "open_clip_torch")
    print(record.write(arguments.name, settings, {"losses in fp32": compared, **figures}, packages))


if __name__ == "__main__":
    main()
