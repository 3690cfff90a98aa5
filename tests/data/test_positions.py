from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.positions import Grid, positions

IMAGE, VIDEO = 1, 2  # as transformers numbers them

grids = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
segments = st.lists(st.integers(0, 4) | grids, min_size=1, max_size=6)
"""Words in a row, and media."""


def placed(parts: list[int | Grid], axes: int = 3) -> np.ndarray:
    start, media = 0, {}
    for part in parts:
        if isinstance(part, int):
            start += part
        else:
            media[start] = part
            start += int(np.prod(part))
    return positions(start, axes, media)


def test_a_picture_between_two_texts():
    """Two words, a picture of 2 x 3 tokens, two words: behind it all axes go on at 2 + 3."""
    assert placed([2, (1, 2, 3), 2]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_a_clip_longer_than_it_is_wide():
    """One above the largest so far, which here is the time's: 1 + 3."""
    assert placed([1, (3, 1, 2), 1]).tolist() == [
        [0, 1, 1, 2, 2, 3, 3, 4],
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 2, 1, 2, 1, 2, 4],
    ]


def test_a_sound_that_stands_first():
    assert placed([(3, 1, 1), 2]).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 3, 4], [0, 0, 0, 3, 4]]


@pytest.mark.parametrize("axes", [1, 3])
def test_a_text_is_the_same_on_every_axis(axes: int):
    assert placed([4], axes).tolist() == [[0, 1, 2, 3]] * axes
    assert positions(0, axes, {}).shape == (axes, 0)


def test_on_one_axis_media_are_as_text():
    assert placed([1, (1, 2, 2), 1], axes=1).tolist() == [[0, 1, 2, 3, 4, 5]]


@settings(deadline=None)
@given(segments)
def test_every_token_has_a_place_that_no_other_has(parts: list[int | Grid]):
    found = placed(parts)
    assert len({tuple(column) for column in found.T.tolist()}) == found.shape[1]
    assert found.min(initial=0) >= 0


@settings(deadline=None)
@given(segments, st.integers(1, 2))
def test_the_same_as_in_transformers(parts: list[int | Grid], merge: int):
    """Where a clip is no longer than it is high or wide: there it goes on behind the largest side, we behind all three."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    parts = [(min(part[0], max(part[1:])), *part[1:]) if isinstance(part, tuple) else part for part in parts]
    # It cannot tell neighbors apart, so a word stands before every medium.
    parts = [one for part in parts for one in ([1, part] if isinstance(part, tuple) else [part])]
    media = [part for part in parts if isinstance(part, tuple)]
    kinds, patches = [], {IMAGE: [], VIDEO: []}
    for part in parts:
        kind = 0 if isinstance(part, int) else IMAGE if part[0] == 1 else VIDEO
        kinds += [kind] * int(np.prod(part))
        if kind:
            patches[kind].append([part[0], part[1] * merge, part[2] * merge])
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge))
    model = SimpleNamespace(config=config, get_vision_position_ids=partial(Qwen2VLModel.get_vision_position_ids, None))
    shown = {"image_grid_thw": torch.tensor(patches[IMAGE]), "video_grid_thw": torch.tensor(patches[VIDEO])}
    tokens = torch.zeros(1, len(kinds), dtype=torch.int64)
    if tokens.numel():
        expected, _ = Qwen2VLModel.get_rope_index(model, tokens, torch.tensor([kinds], dtype=torch.int32), **shown)
        assert placed(parts).tolist() == expected[:, 0].tolist()
    assert len(media) == len(patches[IMAGE]) + len(patches[VIDEO])
