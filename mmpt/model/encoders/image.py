"""A ViT over packed patches: pictures of any shapes, end to end, without padding.

patches (N, values) --stem, positions--> (N, dim) --class tokens, norm, blocks--> states
states of patches --merge neighbours, project--> features (rows, D);  states --pool, head--> pooled (M, E)

What the names are in open_clip's `visual`: stem.project.weight is conv1.weight, its axes (dim, color, row, column) permuted to
(dim, row, column, color) and flattened; class_token is class_embedding; positions is positional_embedding; stem_norm is ln_pre;
transformer.norm is ln_post; head.weight is proj, transposed. Those of an attention pool: see mmpt.model.encoders.pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmpt.config import ImageEncoderConfig
from mmpt.model.attention import AttentionLayout
from mmpt.model.encoders.grids import ClassRows, Places, merge_neighbours
from mmpt.model.encoders.pooling import AttentionPool, Encoded, initialize_linear, mean_of_items
from mmpt.model.encoders.stems import ConvStem, LinearStem, normalize
from mmpt.model.layers import make_norm, widened
from mmpt.model.rotary import rotary_angles
from mmpt.model.transformer import Transformer
from mmpt.types import MediaBatch

ROPE_THETA = 100.0  # a picture is tens of patches wide, not thousands of tokens long


class ImageEncoder(nn.Module):
    """Pictures at their own shapes; `merge` x `merge` neighbours become one feature row.

    CLIP's ViT (arXiv 2103.00020) is one with learned positions, a class token, a norm before the blocks and the class pool.
    A picture's class token stands before its patches, and never becomes a feature.
    """

    def __init__(self, config: ImageEncoderConfig, *, out_dim: int | None, embedding_dim: int | None) -> None:
        """Without `out_dim` there are no features, without `embedding_dim` no pooled vectors."""
        super().__init__()
        self.config = config
        self.stem = ConvStem(config) if config.stem == "conv" else LinearStem(config)
        self.class_token = nn.Parameter(torch.empty(config.dim)) if config.class_token else None
        rows = config.patches_per_side**2 + config.class_token
        self.positions = nn.Parameter(torch.empty(rows, config.dim)) if config.positions == "learned" else None
        self.stem_norm = make_norm(config.norm, config.dim, config.norm_eps) if config.stem_norm else None
        self.transformer = Transformer(config)
        self.project = nn.Linear(config.merge**2 * config.dim, out_dim) if out_dim else None
        self.pool = AttentionPool(config, embedding_dim) if embedding_dim and config.pool == "attention" else None
        pooled_dim = embedding_dim if self.pool else config.dim
        self.head = nn.Linear(pooled_dim, embedding_dim, bias=False) if embedding_dim else None

    def forward(self, media: MediaBatch) -> Encoded:
        """Features: item after item, raster order within an item, one row for each square of patches."""
        places = Places.of(media.grid, media.cu_seqlens, len(media.values))
        classes = None if self.class_token is None else places.class_first()
        x = self.embed(media, places)
        if classes is not None:
            x = classes.insert(self.class_row().expand(classes.items, -1), x)
        x = x if self.stem_norm is None else self.stem_norm(x)
        layout = AttentionLayout.from_lengths(media.cu_seqlens.diff() + self.config.class_token, causal=False)
        x, _ = self.transformer(x, layout, self.rotary(places, classes))
        return Encoded(features=self.features(x, places, classes), pooled=self.pooled(x, places, classes))

    def embed(self, media: MediaBatch, places: Places) -> Float[Tensor, "N dim"]:
        pixels = normalize(media.values, self.config).to(self.stem.project.weight.dtype)
        x = widened(self.stem(pixels, media.grid))  # blocks add to it in fp32, under autocast as well
        if self.positions is None:
            return x
        shapes, shape_of_item = media.grid[:, 1:].unique(dim=0, return_inverse=True)
        tables = [self.position_table(height, width) for height, width in shapes.tolist()]
        if len(tables) == 1:
            return (x.unflatten(0, (-1, len(tables[0]))) + tables[0]).flatten(0, 1)
        sizes = shapes.prod(1)
        start = (sizes.cumsum(0) - sizes)[shape_of_item]
        return x + torch.cat(tables).index_select(0, start[places.item] + places.within_frame())

    def position_table(self, height: int, width: int) -> Float[Tensor, "patches dim"]:
        """Of the patches of a frame; of another shape than the table's interpolated (bicubic, antialiased; as open_clip's)."""
        table, side = self.positions[self.config.class_token :], self.config.patches_per_side
        if (height, width) == (side, side):
            return table
        square = rearrange(widened(table), "(h w) d -> 1 d h w", h=side)
        resized = F.interpolate(square, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        return rearrange(resized, "1 d h w -> (h w) d")

    def class_row(self) -> Float[Tensor, " dim"]:
        return self.class_token if self.positions is None else self.class_token + self.positions[0]

    def rotary(self, places: Places, classes: ClassRows | None) -> tuple[Tensor, Tensor] | None:
        """Of rows and columns; a class token is not turned."""
        if self.positions is not None:
            return None
        positions = places.positions()
        if classes is not None:
            positions = classes.insert(positions.new_zeros(classes.items, 2), positions.T).T
        return rotary_angles(positions, self.config.head_dim, ROPE_THETA)

    def features(self, x: Float[Tensor, "rows dim"], places: Places, classes: ClassRows | None) -> Tensor | None:
        if self.project is None:
            return None
        patches = x if classes is None else classes.patches(x)
        return self.project(merge_neighbours(patches, places, self.config.merge))

    def pooled(self, x: Float[Tensor, "rows dim"], places: Places, classes: ClassRows | None) -> Tensor | None:
        if self.head is None:
            return None
        lengths = places.cu_seqlens.diff()
        if self.pool is not None:
            return self.head(self.pool(x, lengths + self.config.class_token))
        if self.config.pool == "class":
            return self.head(classes.tokens(x))
        return self.head(mean_of_items(x if classes is None else classes.patches(x), lengths))

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
        for part in filter(None, (self.stem, self.transformer, self.pool)):
            part.initialize()
        for learned in (self.class_token, self.positions):
            if learned is not None:
                nn.init.normal_(learned, std=self.config.dim**-0.5)
        if self.stem_norm is not None:
            self.stem_norm.reset_parameters()
        for linear in filter(None, (self.project, self.head)):
            initialize_linear(linear)
