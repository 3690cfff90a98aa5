"""Training samples per second, and per CPU-second, of a run's model beside open_clip's CLIP with towers of like width and depth.

    python benchmarks/training.py [--config configs/demo.yaml] [--rounds 9]

Same pictures, same captions, same batch, same precision, same optimizer; whole steps (forward, losses, backward, clip, update),
batches in memory. mmpt's step computes both losses, next-token and contrastive; the peer's ClipLoss alone. The peer pads
captions to 77, its default, and for a fair second row to the longest caption of the data. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import open_clip
import record
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table

from mmpt.config import RunConfig, load
from mmpt.data.loader import Loader
from mmpt.model.multimodal import MultimodalModel, parameter_counts
from mmpt.parallel.mesh import World, join_world
from mmpt.train.machine import keep_freed_memory, make_repeatable
from mmpt.train.optimizer import make_optimizer
from mmpt.train.step import autocast, train_step
from mmpt.types import NOTHING, PackedBatch

WARM_UP = 2
Step = Callable[[int], None]


def ours(config: RunConfig, batches: list[PackedBatch], world: World) -> tuple[Step, int]:
    """A whole training step of mmpt on batch i, and the model's parameters."""
    model = MultimodalModel(config.model).initialize(seed=0)
    optimizer = make_optimizer(model, config.optimizer)

    def step(i: int) -> None:
        train_step(model, optimizer, [batches[i]], i, config, world, detailed=False)

    return step, parameter_counts(model)["total"]


def open_clips(config: RunConfig, batches: list[PackedBatch], context: int) -> tuple[Step, int]:
    """The same of open_clip: its CLIP and its ClipLoss, captions padded to `context`."""
    image, text = config.model.image, config.model.transformer
    vision = {"image_size": image.size, "patch_size": image.patch, "width": image.dim, "layers": image.layers}
    words = {"context_length": context, "vocab_size": config.model.vocabulary, "width": text.dim, "layers": text.layers}
    model = open_clip.CLIP(
        embed_dim=config.model.embedding_dim,
        vision_cfg={**vision, "head_width": image.dim // image.n_heads},
        text_cfg={**words, "heads": text.n_heads},
    )
    loss_of, optimizer = open_clip.ClipLoss(), make_optimizer(model, config.optimizer)
    pairs = [(pictures(batch, config), captions(batch, context, config.model.vocabulary)) for batch in batches]

    def step(i: int) -> None:
        with autocast(config, torch.device("cpu")):
            image_features, text_features, scale = model(*pairs[i])
            loss = loss_of(image_features, text_features, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in model.parameters())


def pictures(batch: PackedBatch, config: RunConfig) -> torch.Tensor:
    """The batch's pictures as (pictures, 3, size, size), normalised as mmpt does."""
    side, patch = config.model.image.patches_per_side, config.model.image.patch
    shape = {"h": side, "w": side, "p": patch, "q": patch}
    return rearrange(batch.images.values.float() / 127.5 - 1, "(m h w) (p q c) -> m c (h p) (w q)", **shape)


def captions(batch: PackedBatch, context: int, vocabulary: int) -> torch.Tensor:
    """The batch's caption segments, padded with 0. open_clip pools at the largest id, so the last token, <emb>, becomes it."""
    rows = []
    for segment in caption_segments(batch):
        tokens = segment[:context].clone()
        tokens[-1] = vocabulary - 1
        rows.append(torch.nn.functional.pad(tokens, (0, context - len(tokens))))
    return torch.stack(rows)


def caption_segments(batch: PackedBatch) -> list[torch.Tensor]:
    """Tokens of the segments that show no picture."""
    with_picture = set(batch.document_ids[batch.media_index != NOTHING].tolist())
    numbers = range(int(batch.document_ids.max()) + 1)
    return [batch.tokens[batch.document_ids == number] for number in numbers if number not in with_picture]


def measure(steps: dict[str, Step], samples: list[int], rounds: int) -> Iterator[tuple[str, float, float]]:
    """(name, samples per second, samples per CPU-second) for every round and name, in turns."""
    for step in steps.values():
        for i in range(WARM_UP):
            step(i)
    for i in range(WARM_UP, WARM_UP + rounds):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step(i)
            yield name, samples[i] / (time.perf_counter() - wall), samples[i] / (time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    config = load(arguments.config, ["data.workers=0"])
    make_repeatable()
    keep_freed_memory()
    batches = list(islice(Loader(config, rank=0, world_size=1), WARM_UP + arguments.rounds))
    longest = max(len(caption) for batch in batches for caption in caption_segments(batch))
    with join_world(config) as world:
        built = {
            "mmpt, both losses": ours(config, batches, world),
            "open_clip, captions padded to 77": open_clips(config, batches, 77),
            f"open_clip, padded to the longest, {longest}": open_clips(config, batches, longest),
        }
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in built}
        steps = {name: step for name, (step, _) in built.items()}
        for name, *figures in measure(steps, [batch.documents for batch in batches], arguments.rounds):
            rounds[name].append(tuple(figures))
    report(config, arguments.rounds, batches, built, rounds)


def report(config: RunConfig, count: int, batches: list[PackedBatch], built: dict, rounds: dict) -> None:
    """Print the table and write the JSON."""
    table = Table(title=f"Training steps, median of {count} interleaved rounds")
    for column in ("", "parameters", "samples/s", "per CPU-second", "times open_clip's"):
        table.add_column(column, justify="left" if not column else "right")
    peer = statistics.median(wall for wall, _ in rounds["open_clip, captions padded to 77"])
    figures = {}
    for name, (_, parameters) in built.items():
        wall, cpu = (statistics.median(values) for values in zip(*rounds[name], strict=True))
        table.add_row(name, f"{parameters:,}", f"{wall:.0f}", f"{cpu:.0f}", f"{wall / peer:.2f}")
        figures[name] = {
            "parameters": parameters,
            "samples_per_second": wall,
            "samples_per_cpu_second": cpu,
            "ratio": wall / peer,
        }
    Console().print(table)
    settings = {
        "model": config.model.model_dump(mode="json"),
        "precision": config.train.precision,
        "documents_per_batch": statistics.mean(b.documents for b in batches),
        "rounds": count,
    }
    print(record.write("training", settings, figures, ("mmpt", "torch", "open_clip_torch", "timm")))


if __name__ == "__main__":
    main()
