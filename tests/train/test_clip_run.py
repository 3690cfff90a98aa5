"""configs/clip_vit_b32.yaml at a tiny size, on img2dataset's tars, step by step beside open_clip reading the same files."""

from __future__ import annotations

import io
import json
import math
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
from torch import nn

from mmpt.config import RunConfig, load
from mmpt.data.loader import Loader
from mmpt.model.convert import write_checkpoint
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.mesh import join_world
from mmpt.train.loop import train
from mmpt.train.optimizer import make_optimizer
from mmpt.train.step import train_step
from mmpt.types import IMAGE, TEXT

SIDE, PAIRS, STEPS = 32, 96, 5
CONFIG = Path(__file__).parents[2] / "configs" / "clip_vit_b32.yaml"
TINY = [
    f"model.image.size={SIDE}",
    "model.image.patch=8",
    *(f"model.{tower}.{field}" for tower in ("image", "transformer") for field in ("layers=2", "n_heads=2", "ffn_dim=128")),
    "model.image.dim=48",
    "model.transformer.dim=32",
    "model.embedding_dim=24",
    "data.pack_tokens=160",
    "data.pack_media=160",
    "data.packs_per_batch=2",
    "data.window=16",
    "data.workers=0",
    "data.augment.crop=1.0",
    "optimizer.lr=0.002",
    "optimizer.warmup_steps=2",
    f"train.steps={STEPS}",
    "train.precision=fp32",
    "train.eval_every=0",
    "train.log_every=1",
]
SPEC = """\
version: 1
name: img2dataset
format: pairs
shards: {root: ".", pattern: "{00000..00001}.tar"}
split: {train: ":"}
"""
WORDS = ["a photo of", "two dogs", "&amp; a cat", "Sunset", "OVER", "the sea", "in 1987,", "naïve", "painting", "(detail)"]


def pair(number: int) -> dict[str, bytes]:
    """Files of a sample as img2dataset writes them. Captions have 1 to some 90 tokens; pictures any shape."""
    draw = np.random.default_rng(number)
    pixels = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    size = tuple(draw.integers(SIDE - 8, 3 * SIDE, 2).tolist())
    picture = io.BytesIO()
    PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC).save(picture, "JPEG", quality=90)
    length = 40 if number % 31 == 30 else int(draw.integers(0, 8))
    caption = " ".join([f"number {number}", *(WORDS[i] for i in draw.integers(0, len(WORDS), length))])
    return {"jpg": picture.getvalue(), "json": json.dumps({"caption": caption}).encode(), "txt": caption.encode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("img2dataset")
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * PAIRS // 2, (shard + 1) * PAIRS // 2):
                for suffix, data in pair(number).items():
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "spec.yaml").write_text(SPEC)
    return folder


def tiny(folder: Path, *overrides: str) -> RunConfig:
    return load(CONFIG, [*TINY, f"data.spec={folder / 'spec.yaml'}", *overrides])


class Peer:
    """open_clip's model with its loss, its optimizer and its schedule, as its training script makes them, on the same files."""

    def __init__(self, config: RunConfig, checkpoint: Path) -> None:
        self.config = config
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}", precision="fp32")
        self.tokenizer, self.loss = open_clip.get_tokenizer("ViT-B-32"), open_clip.ClipLoss()

        def is_plain(name: str, parameter: nn.Parameter) -> bool:
            return parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))

        named, c = list(self.model.named_parameters()), config.optimizer
        groups = [
            {"params": [p for n, p in named if is_plain(n, p)], "weight_decay": 0.0},
            {"params": [p for n, p in named if not is_plain(n, p)], "weight_decay": c.weight_decay},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps)

    def step(self, number: int, keys: list[str]) -> float:
        c = self.config.optimizer
        if number < c.warmup_steps:
            rate = c.lr * (number + 1) / c.warmup_steps
        else:
            progress = (number - c.warmup_steps) / (STEPS - c.warmup_steps)
            rate = 0.5 * (1 + math.cos(math.pi * progress)) * c.lr
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        files = [pair(int(key)) for key in keys]
        pictures = torch.stack([self.preprocess(PIL.Image.open(io.BytesIO(each["jpg"]))) for each in files])
        captions = self.tokenizer([each["txt"].decode() for each in files])
        loss = self.loss(*self.model(pictures, captions)[:3])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        return loss.item()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_weights_are_open_clips(folder: Path, tmp_path: Path, accumulate: int):
    """With two micro-batches a step they are contrasted with one another: the peer computes both as one batch."""
    config = tiny(folder, f"train.accumulate={accumulate}")
    model = MultimodalModel(config.model).initialize(seed=0)
    write_checkpoint(model, config.model, "open_clip", tmp_path)
    peer = Peer(config, tmp_path)
    optimizer, batches = make_optimizer(model, config.optimizer), iter(Loader(config, 0, 1))
    documents = 0
    with join_world(config) as world:
        for step in range(STEPS):
            taken = list(islice(batches, accumulate))
            keys = [ref.key for batch in taken for ref in batch.provenance]
            assert len(set(keys)) == len(keys) > 8 * accumulate
            figures = train_step(model, optimizer, taken, step, config, world, detailed=False)
            assert figures["loss"] == pytest.approx(peer.step(step, keys), abs=1e-5)
            documents += len(keys)
    assert documents > 50
    trained = tmp_path / "trained"
    trained.mkdir()
    write_checkpoint(model, config.model, "open_clip", trained)
    ours = open_clip.create_model(f"local-dir:{trained}", precision="fp32").state_dict()
    for name, weight in peer.model.state_dict().items():
        if name.endswith("in_proj_bias"):  # softmax does not see a bias of keys: its gradient is rounding, which Adam makes large
            third = len(weight) // 3
            weight[third : 2 * third] = ours[name][third : 2 * third] = 0
        far = (ours[name] - weight).abs()
        assert far.max() <= 2e-4 and (far > 2e-5).double().mean() <= 1e-3, name  # Adam makes rounding large where gradients are 0


def test_a_batch_is_what_open_clip_reads(folder: Path):
    """Captions without padding, cut at 77; pictures in patches, before they are normalised."""
    config = tiny(folder)
    preprocess = open_clip.image_transform(SIDE, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    tokenizer, longest = open_clip.get_tokenizer("ViT-B-32"), 0
    for batch in islice(Loader(config, 0, 1), 5):
        assert batch.slots.modality.tolist() == [TEXT, IMAGE] * batch.documents
        assert batch.slots.pair.tolist() == [number for number in range(batch.documents) for _ in range(2)]
        assert len(batch.images.values) <= 2 * config.data.pack_media
        for number, ref in enumerate(batch.provenance):
            files = pair(int(ref.key))
            tokens = batch.tokens[batch.document_ids == number]
            row = tokenizer([files["txt"].decode()])[0]
            assert tokens.tolist() == row[: row.argmax() + 1].tolist()
            longest = max(longest, len(tokens))
            item = int(batch.slots.item[2 * number + 1])
            patches = batch.images.values[batch.images.cu_seqlens[item] : batch.images.cu_seqlens[item + 1]]
            side = SIDE // 8
            picture = patches.reshape(side, side, 8, 8, 3).permute(4, 0, 2, 1, 3).reshape(3, SIDE, SIDE)
            expected = (preprocess(PIL.Image.open(io.BytesIO(files["jpg"]))) * 255).round().to(torch.uint8)
            assert torch.equal(picture, expected)
    assert longest == 77


@pytest.mark.parametrize("pack_media", ["160", "null"])
def test_batches_fit_the_memory_kept_for_them(folder: Path, pack_media: str):
    """Media take no tokens here: without a bound of their own, as many stand in a pack as short captions do."""
    loader = Loader(tiny(folder, "model.image.patch=4", f"data.pack_media={pack_media}", "data.workers=1"), 0, 1)
    for batch in islice(loader, 8):
        media = sum(tensor.nbytes for tensor in vars(batch.images).values())
        tokens = sum(tensor.nbytes for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor))
        assert media + tokens + sum(tensor.nbytes for tensor in vars(batch.slots).values()) <= loader.batch_bytes - 2**20


def test_random_crops_are_drawn_anew_each_epoch_and_repeat(folder: Path):
    config = tiny(folder, "data.augment.crop=0.1")
    seen: dict[str, list[torch.Tensor]] = {}
    again = iter(Loader(config, 0, 1))
    for batch in islice(Loader(config, 0, 1), 12):
        assert torch.equal(batch.images.values, next(again).images.values)
        items = batch.images.values.split(16)
        for ref, item in zip(batch.provenance, items, strict=True):
            seen.setdefault(ref.key, []).append(item)
    alike = [torch.equal(items[0], items[1]) for items in seen.values() if len(items) > 1]
    assert len(alike) > 20 and sum(alike) < 0.2 * len(alike)  # of a long and narrow picture there is one crop


def test_a_run_trains_from_its_config(folder: Path, tmp_path: Path):
    run = train(tiny(folder, "data.augment.crop=0.9"), runs=tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
