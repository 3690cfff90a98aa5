"""Clips: frames as pictures, the time of each, and neighbours in time averaged, against a loop over items and frames."""

import math

import pytest
import torch
from media_batches import assert_close, gradients, pack, pictures
from torch import Tensor, nn

from mmpt.config import ImageEncoderConfig, VideoEncoderConfig
from mmpt.model.encoders import Encoded, ImageEncoder, VideoEncoder
from mmpt.model.encoders.video import time_waves

IMAGE = {"dim": 24, "layers": 1, "n_heads": 2, "ffn_dim": 32, "patch": 4, "size": 16}
SHAPES = [(5, 2, 4), (1, 4, 2), (4, 2, 4), (3, 2, 2)]
SECONDS = [0.0, 0.5, 1.0, 1.5, 2.0, 7.0, 0.25, 3.0, 60.0, 61.0, 10.0, 10.1, 3600.0]


class Both(nn.Module):
    """A video encoder with the image encoder that it reads frames through."""

    def __init__(self, *, merge_frames: int, out_dim: int | None = 20, embedding_dim: int | None = 8, **changes) -> None:
        super().__init__()
        torch.manual_seed(0)
        image = ImageEncoderConfig(**{**IMAGE, **changes})
        widths = {"out_dim": out_dim, "embedding_dim": embedding_dim}
        self.images = ImageEncoder(image, **widths)
        self.video = VideoEncoder(VideoEncoderConfig(merge_frames=merge_frames), image, **widths)
        self.images.initialize()
        self.video.initialize()

    def forward(self, items: list[Tensor], shapes: list, seconds: list[float]) -> Encoded:
        return self.video(pack(items, shapes, seconds), self.images)


def by_hand(both: Both, items: list[Tensor], merge_frames: int) -> dict[str, Tensor]:
    """Every frame by itself; then every item, group of frames and row."""
    features, pooled, seconds = [], [], iter(SECONDS)
    for item, (t, h, w) in zip(items, SHAPES, strict=True):
        frames = [both.images(pack([frame], [(1, h, w)])) for frame in item.chunk(t)]
        timed = [frame.features + both.video.time(time_waves(torch.tensor([next(seconds)]))) for frame in frames]
        for start in range(0, t, merge_frames):
            group = timed[start : start + merge_frames]
            features.append(sum(group) / len(group))
        pooled.append(sum(frame.pooled for frame in frames) / t)
    return {"features": torch.cat(features), "pooled": torch.cat(pooled)}


@pytest.mark.parametrize("merge_frames", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"merge": 2, "class_token": True, "positions": "learned", "pool": "class"}])
def test_is_the_loop_over_frames(merge_frames: int, changes: dict):
    """Features, pooled vectors and every gradient; the last group of frames may be shorter."""
    both = Both(merge_frames=merge_frames, **changes)
    items = pictures(SHAPES, 4)
    found, expected = vars(both(items, SHAPES, SECONDS)), by_hand(both, items, merge_frames)
    square = both.images.config.merge**2
    assert len(found["features"]) == sum(math.ceil(t / merge_frames) * h * w // square for t, h, w in SHAPES)
    assert_close(found, expected, 1e-6)
    weigh = {name: torch.randn(x.shape) for name, x in expected.items()}

    def loss(result: dict[str, Tensor]) -> Tensor:
        return sum((result[name] * weigh[name]).sum() for name in weigh)

    assert_close(gradients(both, loss(found)), gradients(both, loss(expected)))


def test_a_clip_does_not_move_the_others():
    both = Both(merge_frames=2)
    items = pictures(SHAPES, 4)
    rows = [math.ceil(t / 2) * h * w for t, h, w in SHAPES]
    with torch.no_grad():
        before = both(items, SHAPES, SECONDS)
        for changed in range(len(items)):
            after = both([255 - x if i == changed else x for i, x in enumerate(items)], SHAPES, SECONDS)
            for i, (old, new) in enumerate(zip(before.features.split(rows), after.features.split(rows), strict=True)):
                assert torch.equal(old, new) == (i != changed)
            assert (before.pooled != after.pooled).any(1).tolist() == [i == changed for i in range(len(items))]


def test_time_moves_the_features_of_its_frame_alone():
    both = Both(merge_frames=1)
    items = pictures(SHAPES, 4)
    later = [seconds + (number == 2) for number, seconds in enumerate(SECONDS)]
    before, after = both(items, SHAPES, SECONDS), both(items, SHAPES, later)
    moved = (before.features != after.features).any(1)
    assert moved.nonzero().flatten().tolist() == list(range(16, 24))  # the third frame of the first clip, eight rows each
    assert torch.equal(before.pooled, after.pooled)


def test_times_are_told_apart():
    """A thirtieth of a second, at the start of a file and an hour into it."""
    for start in (0.0, 3600.0):
        first, second = time_waves(torch.tensor([start, start + 1 / 30]))
        assert (first - second).norm() > 0.5


def test_the_blank_clip_reaches_every_parameter():
    both = Both(merge_frames=2, merge=2)
    found = both.video(both.video.blank(torch.device("cpu"), both.images), both.images)
    assert found.features.shape == (1, 20) and found.pooled.shape == (1, 8)
    gradients(both, found.features.sum() + found.pooled.sum())


def test_parts_of_clips_that_nobody_reads_are_left_out():
    items = pictures(SHAPES, 4)
    towers = Both(merge_frames=2, out_dim=None)
    assert not list(towers.video.parameters())
    towers.video.initialize()
    assert towers(items, SHAPES, SECONDS).features is None and towers(items, SHAPES, SECONDS).pooled.shape == (4, 8)
    features = Both(merge_frames=2, embedding_dim=None)(items, SHAPES, SECONDS)
    assert features.pooled is None and len(features.features) == 3 * 8 + 8 + 2 * 8 + 2 * 4


def test_clips_in_bf16_without_gradients():
    both = Both(merge_frames=2)
    items = pictures(SHAPES, 4)
    with torch.no_grad():
        exact = both(items, SHAPES, SECONDS).features
        with torch.autocast("cpu", torch.bfloat16):
            rough = both(items, SHAPES, SECONDS).features
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)
