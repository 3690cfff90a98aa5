"""Rotary positions: the angles by which pairs of a head are turned, and how they are stretched to longer contexts.

position_ids (axes, T) --frequencies, sections--> cos, sin (T, 1, head_dim / 2) --mmpt.model.layers.rotate--> queries, keys

Angles are computed in fp64. In fp32 the fastest pair is off by half a radian at position 10 million, and from 2^24 on two
positions in a row are the same number; and a frequency off by its last bit, as devices and libraries are among themselves,
is one radian there.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mmpt.config import RopeScalingConfig


def rotary_angles(
    positions: Int[Tensor, "axes T"],
    head_dim: int,
    theta: float,
    *,
    scaling: RopeScalingConfig | None = None,
    sections: tuple[int, ...] | None = None,
) -> tuple[Float[Tensor, "T 1 half"], Float[Tensor, "T 1 half"]]:
    """Cosine and sine of every pair's angle (RoFormer, arXiv 2104.09864), in fp32: rounded once, from fp64.

    Without `sections` a head's pairs are shared out evenly over the axes, and each axis has a full spectrum of its own. With them
    there is one spectrum over all pairs, of which the first `sections[0]` turn with axis 0, the next `sections[1]` with axis 1,
    and so on (Qwen2-VL, arXiv 2409.12191): where all axes agree this is rotary with one axis.
    """
    pairs = head_dim // 2
    if sections is None:
        frequency, factor = _frequencies(pairs // len(positions), theta, scaling, positions.device)
        angles = rearrange(positions.double()[..., None] * frequency, "axes t f -> t 1 (axes f)")
    else:
        assert sum(sections) == pairs and len(sections) == len(positions), (sections, head_dim, len(positions))
        frequency, factor = _frequencies(pairs, theta, scaling, positions.device)
        per_axis = zip(positions.double(), frequency.split(list(sections)), strict=True)
        angles = torch.cat([axis[:, None] * part for axis, part in per_axis], dim=-1)[:, None]
    return angles.cos().mul_(factor).float(), angles.sin().mul_(factor).float()


def _frequencies(
    pairs: int, theta: float, scaling: RopeScalingConfig | None, device: torch.device
) -> tuple[Float[Tensor, " pairs"], float]:
    """Radians per position of every pair, in fp64, and the factor on cosine and sine."""
    wave = theta ** (torch.arange(pairs, device=device, dtype=torch.float64) / pairs)  # positions to a radian
    if scaling is None:
        return 1.0 / wave, 1.0
    if scaling.kind == "llama3":
        return _llama3(1.0 / wave, scaling), 1.0
    return _yarn(wave, theta, scaling), 0.1 * math.log(scaling.factor) + 1.0


def _llama3(frequency: Float[Tensor, " pairs"], scaling: RopeScalingConfig) -> Float[Tensor, " pairs"]:
    """Long waves are stretched, short ones stay, and those between are mixed (Llama 3.1, arXiv 2407.21783)."""
    turns = scaling.original_positions / (2 * math.pi / frequency)  # within the first training's context
    stay = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    stay = stay.clamp(0, 1)
    return (1 - stay) * frequency / scaling.factor + stay * frequency


def _yarn(wave: Float[Tensor, " pairs"], theta: float, scaling: RopeScalingConfig) -> Float[Tensor, " pairs"]:
    """As llama3, but the mixture is linear in the number of the pair, between whole numbers (YaRN, arXiv 2309.00071)."""
    pairs = len(wave)

    def pair_with(turns: float) -> float:
        return 2 * pairs * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), 2 * pairs - 1)
    number = torch.arange(pairs, device=wave.device, dtype=wave.dtype)
    stay = 1 - ((number - low) / (high - low or 0.001)).clamp(0, 1)
    return 1.0 / (scaling.factor * wave) * (1 - stay) + 1.0 / wave * stay
