"""Rotary angles where contexts are long: right to fp32's last bits at 10 million positions, which fp32 itself is far from."""

import math
from pathlib import Path

import pytest
import torch

from mmpt.config import ModelConfig, RopeScalingConfig, load
from mmpt.model.layers import rotate
from mmpt.model.rotary import rotary_angles

CONFIGS = Path(__file__).parent.parent.parent / "configs"
FAR = [131_071, 2**20 - 1, 2**24, 2**24 + 1, 10_485_759, 2**31 - 1]
SCALINGS = {
    "none": None,
    "llama3": RopeScalingConfig(kind="llama3", factor=128.0, original_positions=8192),
    "yarn": RopeScalingConfig(kind="yarn", factor=1280.0, original_positions=8192, beta_fast=4.0),
}
HEAD, THETA = 128, 500_000.0
PAIRS = HEAD // 2


def frequency(pair: int, scaling: RopeScalingConfig | None) -> float:
    """Radians per position, one pair at a time, by the papers' formulas."""
    plain = THETA ** (-pair / PAIRS)
    if scaling is None:
        return plain
    turns = scaling.original_positions * plain / (2 * math.pi)
    if scaling.kind == "llama3":
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        fast, slow = (
            PAIRS * math.log(scaling.original_positions / (2 * math.pi * beta)) / math.log(THETA)
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        kept = 1 - (pair - math.floor(fast)) / (math.ceil(slow) - math.floor(fast))
    kept = min(max(kept, 0.0), 1.0)
    return plain * kept + plain / scaling.factor * (1 - kept)


@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_are_those_of_fp64(kind: str):
    scaling = SCALINGS[kind]
    cos, sin = rotary_angles(torch.tensor([FAR]), HEAD, THETA, scaling=scaling)
    factor = 0.1 * math.log(scaling.factor) + 1 if kind == "yarn" else 1.0
    for row, position in enumerate(FAR):
        for pair in range(PAIRS):
            angle = position * frequency(pair, scaling)
            assert cos[row, 0, pair].item() == pytest.approx(factor * math.cos(angle), abs=3e-7)
            assert sin[row, 0, pair].item() == pytest.approx(factor * math.sin(angle), abs=3e-7)


def test_fp32_would_be_far_off():
    """What the fastest pairs would be turned by: why the angles are computed in fp64."""
    positions = torch.tensor([FAR])
    cos, _ = rotary_angles(positions, HEAD, THETA)
    slow = THETA ** (torch.arange(PAIRS, dtype=torch.float32) / PAIRS)
    rounded = (positions[0].float()[:, None] / slow).cos()
    assert (rounded - cos[:, 0]).abs().amax(dim=1)[4] > 0.1  # at 10 million


def test_sections_turn_each_by_its_axis():
    positions = torch.tensor([[10_485_759], [2**24 + 1], [131_071]])
    cos, _ = rotary_angles(positions, HEAD, THETA, sections=(16, 24, 24))
    axis = [0] * 16 + [1] * 24 + [2] * 24
    for pair in range(PAIRS):
        angle = positions[axis[pair], 0].item() * frequency(pair, None)
        assert cos[0, 0, pair].item() == pytest.approx(math.cos(angle), abs=1e-7)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("distance", [0, 1, 100, 1_000_000])
def test_scores_depend_on_the_distance_alone(kind: str, distance: int):
    """A query at 10 million sees a key as one at the beginning does."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, HEAD, dtype=torch.float64, generator=generator) for _ in range(2))
    scores = []
    for start in (0, 10_000_000, 2**24 + 1):
        positions = torch.tensor([[start, start + distance]])
        cos, sin = rotary_angles(positions, HEAD, THETA, scaling=SCALINGS[kind])
        both = rotate(torch.cat([k, q]), cos.double(), sin.double())[:, 0]
        scores.append((both[0] @ both[1]).item())
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)


def test_neighbours_beyond_2_to_the_24_are_told_apart():
    cos, sin = rotary_angles(torch.tensor([[2**24, 2**24 + 1]]), HEAD, THETA)
    turned = torch.atan2(sin, cos)[:, 0, 0].diff().remainder(2 * math.pi)
    torch.testing.assert_close(turned, torch.ones(1), rtol=0, atol=1e-6)  # the fastest pair: one radian a position


@pytest.mark.parametrize(("name", "context"), [("long_1m", 2**20), ("long_10m", 10 * 2**20)])
def test_shipped_long_configs_reach_their_context(name: str, context: int):
    """A pair that made less than a turn in the first training turns no further in the long one; what turned often stays."""
    run = load(CONFIGS / f"{name}.yaml")
    assert run.data.pack_tokens == context
    assert stretched_within_reach(run.model, context)


def stretched_within_reach(model: ModelConfig, context: int) -> bool:
    t = model.transformer
    first = torch.tensor([[1]])
    sin = rotary_angles(first, t.head_dim, t.rope_theta, scaling=t.rope_scaling)[1][0, 0]
    factor = 0.1 * math.log(t.rope_scaling.factor) + 1 if t.rope_scaling.kind == "yarn" else 1.0
    after = (sin / factor).asin()  # radians per position
    before = rotary_angles(first, t.head_dim, t.rope_theta)[1][0, 0].asin()
    turns_before = before * t.rope_scaling.original_positions / (2 * math.pi)
    turns_after = after * context / (2 * math.pi)
    slow, fast = turns_before < t.rope_scaling.beta_slow, turns_before > 2 * t.rope_scaling.beta_fast
    assert slow.any() and fast.any()
    return bool((turns_after[slow] <= turns_before[slow] * 1.001).all() and (after[fast] / before[fast] - 1).abs().max() < 1e-4)
