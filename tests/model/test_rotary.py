"""Rotary angles against those of Hugging Face transformers, as far as their fp32 goes; beyond: test_long_positions.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2VLTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from mmpt.config import RopeScalingConfig
from mmpt.model.rotary import rotary_angles

THEIR_ROUNDING = 2.0**-21
"""Radians by which their angles are off for each radian of them: frequency and product are rounded to fp32."""
FAR = torch.cat([torch.arange(50), torch.tensor([1_000, 8_191, 8_192, 100_001, 131_071])])

LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "none": (500_000.0, {"rope_type": "default"}),
    "llama 3.1": (500_000.0, {"rope_type": "llama3", **LLAMA3}),
    "llama 3.2": (500_000.0, {"rope_type": "llama3", **LLAMA3, "factor": 32.0}),
    "yarn": (10_000.0, {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}),
    "yarn, other bounds": (
        1_000_000.0,
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32768, "beta_fast": 64.0, "beta_slow": 2.0},
    ),
    "yarn, no room between the bounds": (
        10_000.0,
        {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 40, "beta_fast": 32.0, "beta_slow": 31.0},
    ),
}


def scaling_of(parameters: dict) -> RopeScalingConfig | None:
    renamed = {"rope_type": "kind", "original_max_position_embeddings": "original_positions"}
    plain = {renamed.get(key, key): value for key, value in parameters.items()}
    return None if plain["kind"] == "default" else RopeScalingConfig(**plain)


def assert_halves_equal(
    ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor], angles: torch.Tensor
) -> None:
    """Theirs are (1, T, head_dim) with both halves the same; `angles` (T, head_dim / 2) say how far off they may be."""
    allowed = 1e-6 + THEIR_ROUNDING * angles.repeat(1, 2)
    for mine, other in zip(ours, theirs, strict=True):
        assert ((mine.repeat(1, 1, 2)[:, 0] - other[0]).abs() <= allowed).all()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", SCALINGS)
def test_equal_transformers(kind: str, head_dim: int):
    theta, parameters = SCALINGS[kind]
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    reference = LlamaRotaryEmbedding(config)
    theirs = reference(torch.zeros(1), FAR[None])
    ours = rotary_angles(FAR[None], head_dim, theta, scaling=scaling_of(parameters))
    assert_halves_equal(ours, theirs, FAR[:, None] * reference.inv_freq)


@given(
    theta=st.sampled_from([1e3, 1e4, 5e5, 1e7]),
    factor=st.floats(1.5, 64),
    original=st.sampled_from([64, 2048, 8192]),
    kind=st.sampled_from(["llama3", "yarn"]),
    head_dim=st.sampled_from([8, 40, 96]),
)
@settings(max_examples=60, deadline=None)
def test_equal_transformers_over_all_settings(theta, factor, original, kind, head_dim):
    parameters = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {"beta_fast": 32.0, "beta_slow": 1.0}
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=int(factor * original) + 1,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    frequency, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    cos, sin = rotary_angles(torch.tensor([[0, 1]]), head_dim, theta, scaling=scaling_of(parameters))
    torch.testing.assert_close(cos[0, 0], torch.full_like(frequency, attention_factor))
    torch.testing.assert_close(cos[1, 0], frequency.cos() * attention_factor, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin[1, 0], frequency.sin() * attention_factor, rtol=5e-6, atol=1e-10)


@pytest.mark.parametrize("scaled", ["none", "yarn"])
def test_sections_equal_qwen2_vl(scaled: str):
    theta, parameters = SCALINGS[scaled]
    sections = (16, 24, 24)
    config = Qwen2VLTextConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": theta, "mrope_section": list(sections), **parameters},
    )
    positions = torch.stack([FAR, FAR.flip(0), FAR.roll(7)])
    reference = Qwen2VLRotaryEmbedding(config)
    theirs = reference(torch.zeros(1), positions[:, None])
    ours = rotary_angles(positions, 128, theta, scaling=scaling_of(parameters), sections=sections)
    axis = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor(sections))
    assert_halves_equal(ours, theirs, positions[axis].T * reference.inv_freq)


def test_sections_of_equal_axes_are_plain_rotary_bit_for_bit():
    one = rotary_angles(FAR[None], 32, 1e4)
    three = rotary_angles(FAR.expand(3, -1), 32, 1e4, sections=(4, 6, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_axes_without_sections_have_full_spectra_of_their_own():
    """Row 3, column 5, a head of 8: angles 3, 3 / 10, 5, 5 / 10 for theta 100."""
    cos, sin = rotary_angles(torch.tensor([[3], [5]]), 8, 100.0)
    expected = torch.tensor([3.0, 0.3, 5.0, 0.5])
    torch.testing.assert_close(cos[0, 0], expected.cos())
    torch.testing.assert_close(sin[0, 0], expected.sin())
