from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.config import AugmentConfig, ModelConfig, RunConfig
from mmpt.data.budget import Budget
from mmpt.data.index import PART
from mmpt.data.media.crop import Crop
from mmpt.data.spec import DataSpec, load_spec
from mmpt.types import AUDIO, IMAGE, TEXT, VIDEO, Audio, Image, UserError, Video

SIDES = st.integers(1, 5000)
CLIP = {"fusion": False, "levels": ["tower"]}


@pytest.fixture
def spec(four_data: Path) -> DataSpec:
    return load_spec(four_data / "four.yaml")


@pytest.fixture
def full(four_config: RunConfig) -> ModelConfig:
    """A model that reads everything."""
    return four_config.model


def changed(model: ModelConfig, **fields: object) -> ModelConfig:
    """Sections are changed in part, if they are mappings."""
    tree = model.model_dump()
    for name, value in fields.items():
        tree[name] = tree[name] | value if isinstance(value, dict) else value
    return ModelConfig.model_validate(tree)


def row(
    kind: int, width: int = 0, height: int = 0, rate: int = 0, samples: int = 0, start: float = 0, stop: float = 0
) -> np.ndarray:
    return np.array([(kind, False, 0, width, height, rate, samples, start, stop)], PART)


PARTS = np.concatenate(
    [
        row(TEXT),
        row(IMAGE, 640, 480),
        row(AUDIO, rate=8000, samples=4000),
        row(AUDIO, rate=8000, samples=80_000),
        row(VIDEO, 48, 32, stop=1.0),
        row(VIDEO, 48, 32, start=2.0, stop=2.5),
        row(VIDEO, 48, 32, stop=0.1),
    ]
)


def test_worked_by_hand(full: ModelConfig, spec: DataSpec):
    """Pictures of 32 pixels in patches of 8, of which 2 x 2 are a token; 3 frames at most; 8 log-mel frames a token."""
    tokens, rows = Budget(full, spec).media(PARTS)
    assert tokens.tolist() == [0, 4, 7, 8, 12, 8, 4] and rows.tolist() == [0, 16, 56, 64, 48, 32, 16]


def test_frames_that_are_merged_in_time(full: ModelConfig, spec: DataSpec):
    """Three, two and one frame become two, one and one step; the encoder reads all of them."""
    tokens, rows = Budget(changed(full, video={"merge_frames": 2}), spec).media(PARTS)
    assert tokens[4:].tolist() == [8, 4, 4] and rows[4:].tolist() == [48, 32, 16]


def test_without_fusion_media_take_rows_alone(full: ModelConfig, spec: DataSpec):
    budget = Budget(changed(full, **CLIP), spec)
    tokens, rows = budget.media(PARTS)
    assert not tokens.any() and rows.tolist() == Budget(full, spec).media(PARTS)[1].tolist()
    assert budget.signature != Budget(full, spec).signature


def test_what_the_model_does_not_read_is_left_out(full: ModelConfig, spec: DataSpec):
    for absent, kinds in ((("audio",), {AUDIO}), (("video",), {VIDEO}), (("image", "video"), {IMAGE, VIDEO})):
        model = changed(full, **dict.fromkeys(absent))
        budget = Budget(model, spec)
        tokens, rows = budget.media(PARTS)
        expected = [0 if kind in {TEXT, *kinds} else 1 for kind in PARTS["kind"].tolist()]
        assert (tokens > 0).tolist() == (rows > 0).tolist() == [bool(one) for one in expected]
        assert [budget.reads(kind) for kind in (IMAGE, AUDIO, VIDEO)] == [kind not in kinds for kind in (IMAGE, AUDIO, VIDEO)]
        assert budget.signature != Budget(full, spec).signature
    nothing = Budget(changed(full, image=None, audio=None, video=None), spec)
    assert not np.concatenate(nothing.media(PARTS)).any()


def test_native_pictures_keep_their_shape(full: ModelConfig, spec: DataSpec):
    """A budget of 64 x 64 pixels in units of 16."""
    budget = Budget(changed(full, image={"size": 64, "resize": "native"}), spec)
    assert [budget.frame(Image(data=b"", crc32=0, width=w, height=h)) for w, h in ((64, 64), (16, 32), (128, 32), (5, 5))] == [
        (64, 64),
        (32, 16),
        (32, 128),
        (16, 16),
    ]
    tokens, rows = budget.media(row(IMAGE, 128, 32))
    assert (tokens.tolist(), rows.tolist(), budget.fit(0, AugmentConfig())) == ([16], [64], "stretch")


def test_crops_are_square_whatever_the_picture(full: ModelConfig, spec: DataSpec):
    budget = Budget(changed(full, image={"resize": "crop"}), spec)
    assert budget.frame(Image(data=b"", crc32=0, width=100, height=7)) == (32, 32)
    assert budget.media(row(IMAGE, 100, 7))[1].tolist() == [16]
    assert budget.fit(3, AugmentConfig()) == Crop()
    drawn = budget.fit(3, AugmentConfig(crop=0.5))
    assert drawn == budget.fit(3, AugmentConfig(crop=0.5)) != budget.fit(4, AugmentConfig(crop=0.5))
    assert Budget(full, spec).fit(3, AugmentConfig()) == "pad"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=SIDES,
    height=SIDES,
    samples=st.integers(1, 10**6),
    rate=st.integers(1000, 96_000),
    stop=st.floats(0.01, 100),
    resize=st.sampled_from(["native", "square", "crop"]),
    merge_frames=st.integers(1, 4),
)
def test_the_plan_and_the_decoder_agree(
    full: ModelConfig,
    spec: DataSpec,
    width: int,
    height: int,
    samples: int,
    rate: int,
    stop: float,
    resize: str,
    merge_frames: int,
):
    """What is planned from the index is what one part is decoded to."""
    chosen = changed(full, image={"resize": resize}, video={"merge_frames": merge_frames})
    budget, patch, merge = Budget(chosen, spec), chosen.image.patch, chosen.image.merge
    parts = [row(IMAGE, width, height), row(AUDIO, rate=rate, samples=samples), row(VIDEO, width, height, stop=stop)]
    tokens, rows = budget.media(np.concatenate(parts))
    high, wide = budget.frame(Image(data=b"", crc32=0, width=width, height=height))
    assert high % (patch * merge) == wide % (patch * merge) == 0 and high * wide <= chosen.image.size**2
    assert rows[0] == high * wide // patch**2 == tokens[0] * merge**2
    assert rows[1] == budget.sound(Audio(data=b"", crc32=0, sample_rate=rate, samples=samples)) == tokens[1] * 8 > 0
    clip = Video(data=b"", crc32=0, width=width, height=height, clip=(0.0, stop))
    high, wide = budget.frame(clip)
    frames = len(budget.clip(clip))
    assert rows[2] == frames * high * wide // patch**2
    assert tokens[2] == -(-frames // merge_frames) * high * wide // (patch * merge) ** 2


def test_small_pictures_are_left_out(full: ModelConfig, spec: DataSpec):
    limits = spec.model_copy(update={"image": spec.image.model_copy(update={"min_side": 20})})
    tokens, rows = Budget(full, limits).media(np.concatenate([row(IMAGE, 19, 500), row(IMAGE, 20, 500)]))
    assert tokens.tolist() == [0, 4] and rows.tolist() == [0, 16]


def test_fewer_pixels_than_a_token_are_refused(full: ModelConfig, spec: DataSpec):
    limits = spec.model_copy(update={"image": spec.image.model_copy(update={"max_pixels": 255})})
    with pytest.raises(UserError, match=r"image.max_pixels = 255 is less than one token of 16 x 16"):
        Budget(full, limits)
    Budget(changed(full, image=None, video=None), limits)  # which no picture meets
