"""The whole model: encoders write media features into the token stream, the shared transformer reads it, `<emb>` is pooled.

images --encoder--> features (rows, D)
tokens --embed--> x; x[media_index >= 0] = features[media_index] --transformer--> hidden
hidden[pool_index >= 0] --sum per slot, project, normalise--> embeddings
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.config import ModelConfig
from mmpt.model.attention import AttentionLayout
from mmpt.model.encoders import ImageEncoder
from mmpt.model.transformer import Transformer
from mmpt.types import MediaBatch, ModelOutput, PackedBatch

MAX_LOG_SCALE = math.log(100.0)  # CLIP's bound: cosines are never multiplied by more than 100


class MultimodalModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        """Weights are drawn by `initialize`, so that building on the meta device costs nothing."""
        super().__init__()
        c = config.transformer
        self.config = config
        self.image_encoder = ImageEncoder(config.image, c.dim)
        self.embed_tokens = nn.Embedding(config.vocabulary, c.dim)
        self.transformer = Transformer(
            dim=c.dim,
            layers=c.layers,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            ffn_dim=c.ffn_dim,
            causal=True,
            rope_theta=c.rope_theta,
            norm_eps=c.norm_eps,
        )
        self.embedding_head = nn.Linear(c.dim, config.embedding_dim, bias=False)
        self.log_scale = nn.Parameter(torch.empty(1))  # one element, not none: FSDP shards along the first axis

    @torch.no_grad()
    def initialize(self, seed: int) -> MultimodalModel:
        """Draw all weights: the same seed gives the same weights on every layout."""
        torch.manual_seed(seed)
        self.image_encoder.initialize()
        self.transformer.initialize()
        for weight in (self.embed_tokens.weight, self.embedding_head.weight):
            nn.init.normal_(weight, std=self.config.transformer.dim**-0.5)
        nn.init.constant_(self.log_scale, math.log(self.config.logit_scale_init))
        return self

    def forward(self, batch: PackedBatch) -> ModelOutput:
        assert not len(batch.audios.grid) + len(batch.videos.grid), "there is an encoder for pictures alone"
        x = self.place_media(self.embed_tokens(batch.tokens), batch.images, batch.media_index)
        layout = AttentionLayout.from_document_ids(batch.document_ids)
        hidden = self.transformer(x, batch.position_ids[None], layout)
        return ModelOutput(
            hidden=hidden,
            embeddings=self.pool(hidden, batch.pool_index, len(batch.slots.pair)),
            logit_scale=self.log_scale.float().clamp(0, MAX_LOG_SCALE).exp(),
            # A view, not the parameter itself: FSDP hooks what is returned, once a step, and a parameter would keep its hooks.
            output_weight=self.embed_tokens.weight.view_as(self.embed_tokens.weight),
        )

    def place_media(self, x: Float[Tensor, "T D"], images: MediaBatch, media_index: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Media slots take their features. A batch without pictures encodes one blank patch and drops it:
        every rank then runs the same modules, and so the same collectives."""
        features = self.image_encoder(images if len(images.grid) else self.image_encoder.blank(media_index.device))
        placed = F.embedding(media_index.clamp(min=0), features).to(x.dtype)
        return torch.where((media_index >= 0)[:, None], placed, x)

    def pool(self, hidden: Float[Tensor, "T D"], pool_index: Int[Tensor, " T"], slots: int) -> Float[Tensor, "P E"]:
        """Sum the tokens of each slot, project, bring to unit length in fp32."""
        pooled_tokens = (pool_index >= 0).nonzero().flatten()
        sums = hidden.new_zeros(slots, hidden.shape[1])
        sums = sums.index_add(0, pool_index[pooled_tokens], hidden.index_select(0, pooled_tokens))
        return F.normalize(self.embedding_head(sums).float(), dim=-1)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters by top-level part, and their total. Works on the meta device."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    own = {name: p.numel() for name, p in model.named_parameters(recurse=False)}
    return {**counts, **own, "total": sum(p.numel() for p in model.parameters())}
