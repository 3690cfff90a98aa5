"""From the pixels of patches to vectors."""

from __future__ import annotations

from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mmpt.config import ImageEncoderConfig
from mmpt.model.attention import Reorder
from mmpt.model.encoders.pooling import initialize_linear
from mmpt.model.layers import RMSNorm


def normalize(patches: UInt8[Tensor, "N values"], config: ImageEncoderConfig) -> Float[Tensor, "N values"]:
    """(x / 255 - mean) / std for each color, in one pass: values of a patch stand in (row, column, channel) order."""
    mean, std = torch.tensor([config.mean, config.std], device=patches.device).repeat(1, config.patch**2)
    return torch.addcmul(-mean / std, patches.float(), 1 / (255 * std))


class LinearStem(nn.Module):
    """One projection per patch (ViT, arXiv 2010.11929)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.project = nn.Linear(3 * config.patch**2, config.dim, bias=config.stem_bias)

    def forward(self, patches: Float[Tensor, "N values"], grid: Int[Tensor, "M 3"]) -> Float[Tensor, "N dim"]:
        return self.project(patches)

    def initialize(self) -> None:
        initialize_linear(self.project)


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 over the whole picture, so that patches share their borders (arXiv 2106.14881)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        layers: list[nn.Module] = []
        for channels, out_channels in pairwise((3, *config.stem_dims)):
            layers += [nn.Conv2d(channels, out_channels, 3, stride=2, padding=1), nn.GELU()]
        self.convs = nn.Sequential(*layers[:-1])
        self.norm = RMSNorm(config.stem_dims[-1], 1e-6)
        self.project = nn.Linear(config.stem_dims[-1], config.dim)

    def forward(self, patches: Float[Tensor, "N values"], grid: Int[Tensor, "M 3"]) -> Float[Tensor, "N dim"]:
        """Pictures of one shape go through the convolutions together."""
        shapes, which = grid[:, 1:].unique(dim=0, return_inverse=True)
        if len(shapes) == 1:
            return self._convolve(patches, *shapes[0].tolist())
        shape_of_patch = which.repeat_interleave(grid.prod(1))
        order = shape_of_patch.argsort(stable=True)
        groups = patches[order].split(shape_of_patch.bincount().tolist())
        rows = torch.cat([self._convolve(group, *shape) for group, shape in zip(groups, shapes.tolist(), strict=True)])
        return Reorder.apply(rows, order.argsort(), order)

    def _convolve(self, patches: Float[Tensor, "n values"], h: int, w: int) -> Float[Tensor, "n dim"]:
        pictures = rearrange(patches, "(m h w) (p q c) -> m c (h p) (w q)", h=h, w=w, p=self.patch, q=self.patch)
        x = self.convs(pictures.contiguous(memory_format=torch.channels_last))
        return self.project(self.norm(rearrange(x, "m c h w -> (m h w) c")))

    def initialize(self) -> None:
        for module in (*self.convs, self.project):
            if not isinstance(module, nn.GELU):
                initialize_linear(module)
        self.norm.reset_parameters()
