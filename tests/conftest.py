"""A small corpus and a tiny run over it, for every test that needs data on disk."""

from __future__ import annotations

import io
import random
import zlib
from pathlib import Path

import av
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import soundfile
import torch
import yaml

from mmpt.config import RunConfig, parse
from mmpt.data.shards import ShardWriter
from mmpt.data.tokens import Tokenizer

COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("disc", "box", "bar")
SPEC = """\
version: 1
name: tiny
format: interleaved
shards: {root: ".", pattern: "tiny-{00000..00003}.tar"}
split: {train: "0:3", val: "3:4"}
"""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(shape: str, color: str, side: int = 40, kind: str = "PNG") -> bytes:
    """An encoded picture of a shape; transparent around it, if `kind` can be."""
    image = PIL.Image.new("RGBA", (side, side), (0, 0, 0, 0))
    corners = (side // 5, side // (3 if shape == "bar" else 6), side * 4 // 5, side * (4 if shape == "bar" else 5) // 6)
    draw = PIL.ImageDraw.Draw(image)
    (draw.ellipse if shape == "disc" else draw.rectangle)(corners, fill=color)
    buffer = io.BytesIO()
    (image if kind != "JPEG" else image.convert("RGB")).save(buffer, kind)
    return buffer.getvalue()


def image_part(file: str, data: bytes) -> dict:
    return {"type": "image", "file": file, "wh": list(PIL.Image.open(io.BytesIO(data)).size), "crc32": zlib.crc32(data)}


def tiny_document(number: int) -> tuple[dict, dict[str, bytes]]:
    """Document `number` of the tiny corpus: mostly a picture and its name, sometimes another order or kind."""
    draw = random.Random(number)
    shape, color = draw.choice(SHAPES), draw.choice(COLORS)
    first = picture(shape, color, side=30 + number, kind="JPEG" if number % 7 == 3 else "PNG")
    second = picture(draw.choice(SHAPES), draw.choice(COLORS))
    name = {"type": "text", "text": f"a {color} {shape} number {number}", "predict": number % 5 != 4}
    shown, other = image_part("000.png", first), image_part("002.png", second)
    story = {"type": "text", "text": "then " * (number % 9) + "another"}
    parts = {0: [shown, name], 1: [name, shown], 2: [shown, name, other, story], 3: [name], 4: [shown]}[
        number % 11 if number % 11 in (1, 2, 3, 4) else 0
    ]
    files = {part["file"]: data for part, data in ((shown, first), (other, second)) if part in parts}
    return {"v": 1, "id": f"tiny{number:03d}", "parts": parts, "meta": {"license": "CC0-1.0"}}, files


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.yaml`, four shards of twelve documents (three train, one val), and `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = []
    with ShardWriter(folder, "tiny", samples_per_shard=12) as writer:
        for number in range(48):
            document, files = tiny_document(number)
            texts += [part["text"] for part in document["parts"] if part["type"] == "text"]
            writer.write(document["id"], document, files)
    (folder / "tiny.yaml").write_text(SPEC)
    Tokenizer.train(texts, vocabulary=300).save(folder / "tokenizer.json")
    return folder


FOUR = """\
version: 1
name: four
format: interleaved
shards: {root: ".", pattern: "four-{00000..00001}.tar"}
split: {train: ":"}
audio: {max_seconds: 0.6}
video: {fps: 4, max_frames: 3}
"""


def tone(number: int, seconds: float = 0.5, rate: int = 8000) -> bytes:
    """A WAV file of one pitch."""
    buffer = io.BytesIO()
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * (200 + 40 * number) * time), rate, format="WAV")
    return buffer.getvalue()


def clip(number: int, frames: int = 10, fps: int = 10, track: bool = False) -> bytes:
    """An MP4 file (h264) of a plain color that grows brighter; with a tone (AAC) if it has a `track`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono") if track else None
        for frame in range(frames):
            pixels = np.full((32, 48, 3), (20 * frame + 5 * number) % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        if sound:
            wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16000 * frames // fps) / 16000)
            heard = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], format="fltp", layout="mono")
            heard.sample_rate = 16000
            container.mux(sound.encode(heard))
            container.mux(sound.encode(None))
    return buffer.getvalue()


def four_document(number: int) -> tuple[dict, dict[str, bytes]]:
    """Document `number` of the corpus of four modalities: two to four parts."""
    shown, heard, seen = picture("box", COLORS[number % 6]), tone(number), clip(number)
    sound = {"type": "audio", "file": "001.wav", "sample_rate": 8000, "samples": 4000, "crc32": zlib.crc32(heard)}
    video = {"type": "video", "file": "002.mp4", "wh": [48, 32], "fps": 10, "frames": 10, "clip": [0, 1]}
    text, image = {"type": "text", "text": f"number {number} in four ways"}, image_part("000.png", shown)
    chosen = [[image, text], [sound, text], [text, video], [text, image, sound, video]][number % 4]
    files = {"000.png": shown, "001.wav": heard, "002.mp4": seen}
    used = {part["file"] for part in chosen if "file" in part}
    return {"v": 1, "id": f"four{number:02d}", "parts": chosen}, {name: data for name, data in files.items() if name in used}


@pytest.fixture(scope="session")
def four_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `four.yaml`: two shards of eight documents with pictures, sounds, clips and texts."""
    folder = tmp_path_factory.mktemp("four")
    with ShardWriter(folder, "four", samples_per_shard=8) as writer:
        for number in range(16):
            document, files = four_document(number)
            writer.write(document["id"], document, files)
    (folder / "four.yaml").write_text(FOUR)
    return folder


@pytest.fixture
def four_config(tiny_config: RunConfig, four_data: Path, tiny_data: Path, tmp_path: Path) -> RunConfig:
    """A config whose data is a mixture of both corpora, and whose model reads all four modalities."""
    mixture = {
        "version": 1,
        "name": "both",
        "mixture": [
            {"spec": str(four_data / "four.yaml"), "weight": 2.0},
            {"spec": str(tiny_data / "tiny.yaml"), "weight": 1.0},
        ],
    }
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(mixture))
    tree = tiny_config.model_dump()
    tree["data"]["spec"] = str(tmp_path / "both.yaml")
    tree["model"] |= {"audio": {"dim": 32, "layers": 1, "n_heads": 2, "ffn_dim": 64}, "video": {}}
    return parse(tree, where="four_config")


@pytest.fixture(scope="session")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return Tokenizer.load(tiny_data / "tokenizer.json")


@pytest.fixture
def tiny_config(tiny_data: Path) -> RunConfig:
    """A run that takes well under a second a step: two layers of width 32, pictures of 4 tokens."""
    image = {"size": 32, "patch": 8, "merge": 2, "dim": 32, "layers": 1, "n_heads": 2, "ffn_dim": 64}
    transformer = {"dim": 32, "layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 64}
    tree = {
        "name": "tiny",
        "model": {"vocabulary": 300, "embedding_dim": 16, "image": image, "transformer": transformer},
        "data": {
            "spec": str(tiny_data / "tiny.yaml"),
            "tokenizer": str(tiny_data / "tokenizer.json"),
            "pack_tokens": 128,
            "packs_per_batch": 4,
            "window": 20,
            "workers": 0,
        },
        "train": {"steps": 4, "precision": "fp32", "log_every": 1, "checkpoint_every": 2},
    }
    return parse(tree, where="tiny_config")
