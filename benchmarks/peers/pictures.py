"""The benchmark's 2,000 pictures with captions: four tars as img2dataset writes them, the same bytes from the same seed.

    seed, number --picture--> RGB 256 x 256 --JPEG, quality 85--> shard-00000.tar ... (k.jpg, k.txt, k.json)

No photograph comes with this project, so the pictures are made: fields whose amplitude falls as 1/frequency, as that of
photographs does, in correlated colors; a few shapes with sharp edges; grain. Their JPEGs have 10 to 25 KB, as those of
photographs of this size have.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Float, UInt8

SIDE = 256  # pixels
SHARDS, SAMPLES = 4, 2_000
QUALITY = 85
WORDS = ("a", "the", "two", "red", "blue", "old", "small", "house", "river", "dog", "boat", "field", "of", "on", "near", "under")


def write_shards(folder: Path, samples: int = SAMPLES) -> list[Path]:
    """The tars, written where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    per_shard = samples // SHARDS
    tars = [folder / f"shard-{shard:05d}.tar" for shard in range(SHARDS)]
    for shard, tar in enumerate(tars):
        if not tar.exists():
            aside = tar.with_suffix(".part")
            with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as archive:
                for number in range(shard * per_shard, (shard + 1) * per_shard):
                    _add_sample(archive, number)
            aside.rename(tar)
    return tars


def _add_sample(archive: tarfile.TarFile, number: int) -> None:
    """img2dataset's three members: the picture, its caption, and what is known about both."""
    key, jpeg, caption = f"{number:09d}", encode(picture(number)), words(number)
    about = {
        "url": f"https://example.org/{key}.jpg",
        "caption": caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": SIDE,
        "height": SIDE,
        "original_width": 2 * SIDE,
        "original_height": 2 * SIDE,
        "exif": "{}",
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }
    for suffix, data in (("jpg", jpeg), ("json", json.dumps(about).encode()), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def picture(number: int) -> UInt8[np.ndarray, "side side 3"]:
    """Picture `number`, RGB."""
    random = np.random.default_rng((3, number))
    light, *tints = (_field(random) for _ in range(3))
    mixing = random.normal(0, 0.35, (2, 3))  # the colors of a photograph go together
    rgb = 128 + 45 * (light[..., None] + np.stack(tints, -1) @ mixing)
    canvas = PIL.Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
    draw = PIL.ImageDraw.Draw(canvas)
    for _ in range(random.integers(3, 9)):
        x, y, width, height = random.integers(0, SIDE, 2).tolist() + random.integers(10, 90, 2).tolist()
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + width, y + height), fill=tuple(random.integers(0, 256, 3).tolist()))
    grain = random.normal(0, random.uniform(0, 3), (SIDE, SIDE, 1))
    return (np.asarray(canvas) + grain).clip(0, 255).astype(np.uint8)


def _field(random: np.random.Generator) -> Float[np.ndarray, "side side"]:
    """A smooth random field of mean 0 and deviation 1, its spectrum falling as 1/frequency."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(random.normal(size=(SIDE, SIDE))) / frequency ** random.uniform(1.2, 1.9)
    field = np.fft.irfft2(spectrum, (SIDE, SIDE))
    return field / field.std()


def encode(pixels: UInt8[np.ndarray, "side side 3"]) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def words(number: int) -> str:
    random = np.random.default_rng((4, number))
    return " ".join(random.choice(WORDS, random.integers(5, 20)))
