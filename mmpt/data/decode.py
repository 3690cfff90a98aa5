"""One encoded part to what its encoder reads.

Image, Video --pixels--> RGBA of the planned size --finish_pictures, many at once--> Item of patches
Audio --sound--> Item of log-mel frames
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from mmpt.config import AugmentConfig
from mmpt.data.budget import Budget
from mmpt.data.collate import Item
from mmpt.data.documents import MAX_MEDIA_BYTES
from mmpt.data.faults import BadMedia
from mmpt.data.media.audio import HOP, SAMPLE_RATE, decode_audio, log_mel
from mmpt.data.media.images import augment, decode_image, patchify
from mmpt.data.media.video import Claim, decode_video
from mmpt.data.segments import MODALITY
from mmpt.types import Audio, Image, Video

UNCHANGED = AugmentConfig()
SLACK = 0.2  # seconds that a sound may be shorter than its document says: codecs differ in what they cut off


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Frames of a picture (one) or a clip, premultiplied RGBA, cropped but not otherwise augmented yet."""

    frames: UInt8[Tensor, "F 4 H W"]
    times: Sequence[float]  # seconds into the file, one a frame
    seed: int  # of the augmentation, which is the same for all frames


def check_bytes(part: Image | Audio | Video) -> None:
    """Raises BadMedia where the bytes are not those that were indexed, or too many."""
    if len(part.data) > (most := MAX_MEDIA_BYTES[MODALITY[type(part)]]):
        raise BadMedia("limit", f"{len(part.data):,} bytes, more than the {most:,} that are read")
    if zlib.crc32(part.data) != part.crc32:
        raise BadMedia("crc", "its bytes have changed since it was indexed")


def pixels(part: Image | Video, budget: Budget, seed: int, augmentation: AugmentConfig = UNCHANGED) -> Pixels:
    """Decode to the planned size; a random crop is drawn for `seed`. Raises BadMedia."""
    check_bytes(part)
    height, width = budget.frame(part)
    fit = budget.fit(seed, augmentation)
    if isinstance(part, Image):
        return Pixels(frames=decode_image(part.data, height, width, fit=fit)[None], times=(0.0,), seed=seed)
    claim = Claim(part.width, part.height, part.clip[1])
    frames, times = decode_video(part.data, budget.clip(part), height, width, fit=fit, claim=claim)
    return Pixels(frames=frames, times=times, seed=seed)


def sound(part: Audio, budget: Budget) -> Item:
    """The log-mel of the planned number of frames. Raises BadMedia."""
    check_bytes(part)
    frames = budget.sound(part)
    seconds = frames * HOP / SAMPLE_RATE
    seconds = min(seconds, part.samples / part.sample_rate)
    wave = decode_audio(part.data, start=part.start, seconds=seconds)
    if len(wave) < (seconds - SLACK) * SAMPLE_RATE:
        raise BadMedia("size", f"{len(wave) / SAMPLE_RATE:.2f} seconds, where {seconds:.2f} were promised")
    mel = log_mel(wave, frames, budget.model.audio.mel_bins)
    times = part.start + torch.arange(frames, dtype=torch.float64) * (HOP / SAMPLE_RATE)
    return Item(values=mel, grid=(frames, 1, 1), times=times.tolist())


def finish_pictures(chosen: Sequence[Pixels], patch: int, augmentation: AugmentConfig) -> list[Item]:
    """Augment and cut into patches, all pictures of one size at once: each result depends on its own seed alone."""
    items: list[Item | None] = [None] * len(chosen)
    for size in dict.fromkeys(each.frames.shape[2:] for each in chosen):
        members = [i for i, each in enumerate(chosen) if each.frames.shape[2:] == size]
        frames = torch.cat([chosen[i].frames for i in members])
        seeds = torch.tensor([chosen[i].seed for i in members for _ in chosen[i].times], dtype=torch.int64)
        height, width = size[0] // patch, size[1] // patch
        patches = patchify(augment(frames, seeds, augmentation), patch)
        counts = [len(chosen[i].times) * height * width for i in members]
        for i, values in zip(members, patches.split(counts), strict=True):
            items[i] = Item(values=values, grid=(len(chosen[i].times), height, width), times=chosen[i].times)
    return [item for item in items if item is not None]
