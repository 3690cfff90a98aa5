"""Resizing, for those systems that leave it to their users."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
from jaxtyping import UInt8
from run_peer import SIDE
from torch import Tensor
from torchvision.transforms.v2.functional import resize


def stretched(image: PIL.Image.Image) -> UInt8[Tensor, "3 side side"]:
    """A PIL picture, RGB, resized by PIL."""
    return torch.from_numpy(np.array(image.resize((SIDE, SIDE), PIL.Image.Resampling.BILINEAR))).permute(2, 0, 1)


def stretched_tensor(image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 side side"]:
    """A decoded tensor, resized by torchvision."""
    return resize(image, [SIDE, SIDE], antialias=True)
