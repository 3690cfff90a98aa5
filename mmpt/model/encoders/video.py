"""Clips: frames through the image encoder, each with the time at which it is shown, then neighbours in time averaged."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.config import ImageEncoderConfig, VideoEncoderConfig
from mmpt.model.encoders.image import ImageEncoder
from mmpt.model.encoders.pooling import Encoded, mean_of_items
from mmpt.model.layers import widened
from mmpt.types import MediaBatch

WAVES = 32
PERIODS = (0.1, 10_000.0)  # seconds: the shortest and the longest of the waves that tell the time
TIME_STD = 0.02  # of their weights at the start: as of learned positions elsewhere


class VideoEncoder(nn.Module):
    """The frames' pictures are the image encoder's to read; of its own it has the embedding of time alone."""

    def __init__(
        self, config: VideoEncoderConfig, image: ImageEncoderConfig, *, out_dim: int | None, embedding_dim: int | None
    ) -> None:
        """`out_dim` and `embedding_dim` are the image encoder's, whose pooled vectors are averaged."""
        super().__init__()
        self.merge_frames, self.merge = config.merge_frames, image.merge
        self.time = nn.Linear(2 * WAVES, out_dim) if out_dim else None

    def forward(self, media: MediaBatch, images: ImageEncoder) -> Encoded:
        """Features: ceil(frames / merge_frames) times the rows of one frame for each item. Pooled: the mean of the frames'."""
        frames = media.grid[:, 0]
        item = torch.arange(len(frames), device=frames.device).repeat_interleave(frames, output_size=len(media.times))
        shapes = F.pad(media.grid[item, 1:], (1, 0), value=1)
        seen = images(replace(media, grid=shapes, cu_seqlens=F.pad(shapes.prod(1).cumsum(0), (1, 0))))
        return Encoded(
            features=None if self.time is None else self.features(seen.features, media, shapes.prod(1) // self.merge**2),
            pooled=None if seen.pooled is None else mean_of_items(seen.pooled, frames),
        )

    def features(
        self, seen: Float[Tensor, "N D"], media: MediaBatch, rows_of_frame: Int[Tensor, " F"]
    ) -> Float[Tensor, "rows D"]:
        times = self.time(time_waves(media.times).to(self.time.weight.dtype)).repeat_interleave(
            rows_of_frame, dim=0, output_size=len(seen)
        )
        rows_of_item = media.grid[:, 1] * media.grid[:, 2] // self.merge**2
        return average_frames(seen + times, media.grid[:, 0], rows_of_item, self.merge_frames)

    def blank(self, device: torch.device, images: ImageEncoder) -> MediaBatch:
        """A clip of one frame, the smallest there is, for a batch that has none."""
        return images.blank(device)

    @torch.no_grad()
    def initialize(self) -> None:
        if self.time is not None:
            nn.init.normal_(self.time.weight, std=TIME_STD)
            nn.init.zeros_(self.time.bias)


def time_waves(seconds: Float[Tensor, " F"]) -> Float[Tensor, "F waves"]:
    """Sines and cosines of periods in geometric sequence."""
    shortest, longest = (math.log(period) for period in PERIODS)
    periods = torch.linspace(shortest, longest, WAVES, device=seconds.device).exp()
    angles = seconds[:, None] * (2 * math.pi / periods)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def average_frames(
    x: Float[Tensor, "N D"], frames: Int[Tensor, " M"], rows: Int[Tensor, " M"], count: int
) -> Float[Tensor, "rows D"]:
    """The mean of every `count` frames in a row of an item, of the last ones perhaps of fewer, place by place, in fp32.

    Item m has frames[m] frames of rows[m] rows.
    """
    if count == 1:
        return x
    sizes, averaged = frames * rows, -(-frames // count) * rows  # rows of an item, before and after
    item = torch.arange(len(frames), device=x.device).repeat_interleave(sizes, output_size=len(x))
    local = torch.arange(len(x), device=x.device) - (sizes.cumsum(0) - sizes)[item]
    group, place = local // rows[item] // count, local % rows[item]
    target = (averaged.cumsum(0) - averaged)[item] + group * rows[item] + place
    members = (frames[item] - group * count).clamp(max=count)
    wide = widened(x)
    return wide.new_zeros(int(averaged.sum()), x.shape[1]).index_add(0, target, wide / members[:, None])
