"""Encoders: packed media of one modality -> features in the width of the shared transformer.

patches (N, values) --stem--> (N, dim) --transformer within each item--> merge neighbours --project--> (rows, D)
"""

from __future__ import annotations

from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mmpt.config import ImageEncoderConfig
from mmpt.model.attention import AttentionLayout, Reorder
from mmpt.model.layers import RMSNorm
from mmpt.model.transformer import Transformer
from mmpt.types import MediaBatch


class LinearStem(nn.Module):
    """One projection per patch (ViT, arXiv 2010.11929)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.project = nn.Linear(3 * config.patch**2, config.dim)

    def forward(self, patches: Float[Tensor, "N values"], grid: Int[Tensor, "M 3"]) -> Float[Tensor, "N dim"]:
        return self.project(patches)


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
        shapes = [tuple(shape) for shape in grid.tolist()]
        if len(set(shapes)) == 1:
            return self._convolve(patches, shapes[0])
        items = patches.split(grid.prod(1).tolist())
        features: list[Tensor] = list(items)
        for shape in set(shapes):
            members = [i for i, other in enumerate(shapes) if other == shape]
            rows = self._convolve(torch.cat([items[i] for i in members]), shape)
            for i, item in zip(members, rows.chunk(len(members)), strict=True):
                features[i] = item
        return torch.cat(features)

    def _convolve(self, patches: Float[Tensor, "n values"], shape: tuple[int, int, int]) -> Float[Tensor, "n dim"]:
        t, h, w = shape
        pictures = rearrange(patches, "(m t h w) (p q c) -> (m t) c (h p) (w q)", t=t, h=h, w=w, p=self.patch, q=self.patch)
        x = self.convs(pictures.contiguous(memory_format=torch.channels_last))
        return self.project(self.norm(rearrange(x, "mt c h w -> (mt h w) c")))


class ImageEncoder(nn.Module):
    """ViT over packed patches with two-axis rotary positions.

    `merge` x `merge` neighbours become one feature row of width `out_dim`.
    """

    def __init__(self, config: ImageEncoderConfig, out_dim: int) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvStem(config) if config.stem == "conv" else LinearStem(config)
        self.transformer = Transformer(
            dim=config.dim,
            layers=config.layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_heads,
            ffn_dim=config.ffn_dim,
            causal=False,
            rope_theta=100.0,  # a picture is tens of patches wide, not thousands of tokens long
        )
        self.project = nn.Linear(config.merge**2 * config.dim, out_dim)

    def forward(self, media: MediaBatch) -> Float[Tensor, "rows D"]:
        """Rows of all items in order, raster order within an item, `tokens_per_image` each."""
        x = self.stem(normalize(media.values), media.grid)
        layout = AttentionLayout.from_lengths(media.cu_seqlens.diff())
        x = self.transformer(x, grid_positions(media.grid), layout)
        return self.project(merge_neighbours(x, media.grid, self.config.merge))

    def blank(self, device: torch.device) -> MediaBatch:
        """The smallest picture there is, for a batch that has none."""
        side = self.config.merge
        return MediaBatch(
            values=torch.zeros(side**2, 3 * self.config.patch**2, dtype=torch.uint8, device=device),
            cu_seqlens=torch.tensor([0, side**2], device=device),
            grid=torch.tensor([[1, side, side]], device=device),
            times=torch.zeros(1, device=device),
        )

    @torch.no_grad()
    def initialize(self) -> None:
        self.transformer.initialize()
        for module in (*self.stem.modules(), self.project):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)


def normalize(patches: UInt8[Tensor, "N values"]) -> Float[Tensor, "N values"]:
    """0..255 -> -1..1."""
    return patches.float() / 127.5 - 1


def grid_positions(grid: Int[Tensor, "M 3"]) -> Int[Tensor, "2 N"]:
    """Row and column of every patch within its item, items end to end."""
    positions = []
    for t, h, w in grid.tolist():
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        positions.append(torch.stack([rows, columns]).flatten(1).repeat(1, t))
    return torch.cat(positions, dim=1).to(grid.device)


def merge_neighbours(x: Float[Tensor, "N dim"], grid: Int[Tensor, "M 3"], side: int) -> Float[Tensor, "rows merged"]:
    """Concatenate the features of every `side` x `side` square of an item's patches."""
    if side == 1:
        return x
    index, start = [], 0
    for t, h, w in grid.tolist():
        patches = torch.arange(start, start + t * h * w)
        index.append(rearrange(patches, "(t h a w b) -> (t h w) (a b)", t=t, a=side, b=side, w=w // side))
        start += t * h * w
    order = torch.cat(index).to(x.device)
    flat = order.flatten()
    return Reorder.apply(x, flat, flat.argsort()).unflatten(0, order.shape).flatten(1)
