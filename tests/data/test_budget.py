from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.config import ModelConfig, RunConfig
from mmpt.data.budget import Budget
from mmpt.data.index import PART
from mmpt.data.spec import DataSpec, load_spec
from mmpt.types import AUDIO, IMAGE, TEXT, VIDEO, Audio, Image, UserError, Video

SIDES = st.integers(1, 5000)
SOUNDS = {"samples": st.integers(1, 10**6), "rate": st.integers(1000, 96_000)}


@pytest.fixture
def spec(four_data: Path) -> DataSpec:
    return load_spec(four_data / "four.yaml")


def model(config: RunConfig, **image: object) -> ModelConfig:
    return ModelConfig.model_validate(config.model.model_dump() | {"image": config.model.image.model_dump() | image})


def row(
    kind: int, width: int = 0, height: int = 0, rate: int = 0, samples: int = 0, start: float = 0, stop: float = 0
) -> np.ndarray:
    return np.array([(kind, False, 0, width, height, rate, samples, start, stop)], PART)


def test_worked_by_hand(tiny_config: RunConfig, spec: DataSpec):
    """Pictures of 32 pixels in patches of 8, of which 2 x 2 are a token; 3 frames at most; 8 log-mel frames a token."""
    budget = Budget(tiny_config.model, spec)
    parts = [row(TEXT), row(IMAGE, 640, 480), row(AUDIO, rate=8000, samples=4000), row(AUDIO, rate=8000, samples=80_000)]
    parts += [row(VIDEO, 48, 32, stop=1.0), row(VIDEO, 48, 32, start=2.0, stop=2.5), row(VIDEO, 48, 32, stop=0.1)]
    tokens, rows = budget.media(np.concatenate(parts))
    assert tokens.tolist() == [0, 4, 7, 8, 12, 8, 4] and rows.tolist() == [0, 16, 56, 64, 48, 32, 16]


def test_native_pictures_keep_their_shape(tiny_config: RunConfig, spec: DataSpec):
    """A budget of 64 x 64 pixels in units of 16."""
    budget = Budget(model(tiny_config, size=64, resize="native"), spec)
    assert [budget.frame(Image(data=b"", crc32=0, width=w, height=h)) for w, h in ((64, 64), (16, 32), (128, 32), (5, 5))] == [
        (64, 64),
        (32, 16),
        (32, 128),
        (16, 16),
    ]
    tokens, rows = budget.media(row(IMAGE, 128, 32))
    assert (tokens.tolist(), rows.tolist(), budget.fit) == ([16], [64], "stretch")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=SIDES,
    height=SIDES,
    samples=st.integers(1, 10**6),
    rate=st.integers(1000, 96_000),
    stop=st.floats(0.01, 100),
    native=st.booleans(),
)
def test_the_plan_and_the_decoder_agree(
    tiny_config: RunConfig, spec: DataSpec, width: int, height: int, samples: int, rate: int, stop: float, native: bool
):
    """What is planned from the index is what one part is decoded to."""
    chosen = model(tiny_config, resize="native" if native else "square")
    budget, patch, merge = Budget(chosen, spec), chosen.image.patch, chosen.image.merge
    parts = [row(IMAGE, width, height), row(AUDIO, rate=rate, samples=samples), row(VIDEO, width, height, stop=stop)]
    tokens, rows = budget.media(np.concatenate(parts))
    high, wide = budget.frame(Image(data=b"", crc32=0, width=width, height=height))
    assert high % (patch * merge) == wide % (patch * merge) == 0 and high * wide <= chosen.image.size**2
    assert rows[0] == high * wide // patch**2 == tokens[0] * merge**2
    assert rows[1] == budget.sound(Audio(data=b"", crc32=0, sample_rate=rate, samples=samples)) == tokens[1] * 8 > 0
    clip = Video(data=b"", crc32=0, width=width, height=height, clip=(0.0, stop))
    high, wide = budget.frame(clip)
    assert rows[2] == len(budget.clip(clip)) * high * wide // patch**2 == tokens[2] * merge**2


def test_small_pictures_are_left_out(tiny_config: RunConfig, spec: DataSpec):
    limits = spec.model_copy(update={"image": spec.image.model_copy(update={"min_side": 20})})
    tokens, rows = Budget(tiny_config.model, limits).media(np.concatenate([row(IMAGE, 19, 500), row(IMAGE, 20, 500)]))
    assert tokens.tolist() == [0, 4] and rows.tolist() == [0, 16]


def test_fewer_pixels_than_a_token_are_refused(tiny_config: RunConfig, spec: DataSpec):
    limits = spec.model_copy(update={"image": spec.image.model_copy(update={"max_pixels": 255})})
    with pytest.raises(UserError, match=r"image.max_pixels = 255 is less than one token of 16 x 16"):
        Budget(tiny_config.model, limits)
