"""The whole model: encoders write media features into the token stream, the shared transformer reads it, `<emb>` is pooled.

images, sounds, clips --encoders--> features (rows, D), and one vector (E) an item for the tower's contrast
tokens --embed--> x; x[media_index >= 0] = features[media_index] --transformer--> hidden
hidden[pool_index >= 0] --mean per slot, project, normalise--> embeddings

Llama, Mixtral and BERT are configs of it without encoders; CLIP is one whose encoder's features stay outside (`fusion: false`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.config import ModelConfig
from mmpt.model.encoders import AudioEncoder, Encoded, ImageEncoder, VideoEncoder
from mmpt.model.experts import Origin
from mmpt.model.layers import make_norm, widened
from mmpt.model.rotary import rotary_angles
from mmpt.model.sentence import BertHead
from mmpt.model.sequence import WholeSequence
from mmpt.model.transformer import Transformer
from mmpt.types import AUDIO, IMAGE, MODALITIES, NOTHING, TEXT, VIDEO, Embeddings, ModelOutput, PackedBatch

MAX_LOG_SCALE = math.log(100.0)  # CLIP's bound: cosines are never multiplied by more than 100
POSITION_STD = 0.02  # of learned positions and token types at the start, as BERT and GPT-2


class MultimodalModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        """Weights are drawn by `initialize`, so that building on the meta device costs nothing."""
        super().__init__()
        c, dim = config.transformer, config.transformer.dim
        self.config = config
        self.sequence = WholeSequence()
        widths = {
            "out_dim": dim if config.fusion else None,
            "embedding_dim": config.embedding_dim if "tower" in config.levels else None,
        }
        self.image_encoder = ImageEncoder(config.image, **widths) if config.image else None
        self.audio_encoder = AudioEncoder(config.audio, **widths) if config.audio else None
        self.video_encoder = VideoEncoder(config.video, config.image, **widths) if config.video else None
        self.embed_tokens = nn.Embedding(config.vocabulary, dim)
        self.embed_positions = nn.Embedding(c.max_positions, dim) if c.max_positions else None
        self.embed_types = nn.Embedding(config.token_types, dim) if config.token_types else None
        self.embedding_norm = make_norm(c.norm, dim, c.norm_eps) if config.embedding_norm else None
        self.transformer = Transformer(c, experts=c.experts)
        self.head = BertHead(dim, config.vocabulary, c.norm_eps) if config.head == "bert" else None
        self.output = None if config.tie_embeddings else nn.Linear(dim, config.vocabulary, bias=False)
        self.embedding_head = nn.Linear(dim, config.embedding_dim, bias=False) if "backbone" in config.levels else None
        self.text_head = nn.Linear(dim, config.embedding_dim, bias=False) if "tower" in config.levels else None
        # One element, not none: FSDP shards along the first axis.
        self.log_scale = nn.ParameterDict({level: nn.Parameter(torch.empty(1)) for level in config.levels})
        with_bias = config.levels if config.logit_bias_init is not None else ()
        self.logit_bias = nn.ParameterDict({level: nn.Parameter(torch.empty(1)) for level in with_bias})
        self._freeze()

    def _freeze(self) -> None:
        """What stays as it is: a frozen encoder but for its ways out, a frozen transformer with its embeddings and output."""
        c = self.config
        text = (self.embed_tokens, self.embed_positions, self.embed_types, self.embedding_norm, self.transformer, self.head)
        frozen = [*text, self.output] if c.transformer.frozen else []
        for config, encoder in ((c.image, self.image_encoder), (c.audio, self.audio_encoder)):
            frozen += [encoder] if config and config.frozen else []
        for part in filter(None, frozen):
            part.requires_grad_(False)
        for encoder in filter(None, (self.image_encoder, self.audio_encoder)):
            for way_out in filter(None, (encoder.project, encoder.pool, encoder.head)):
                way_out.requires_grad_(True)

    @torch.no_grad()
    def initialize(self, seed: int) -> MultimodalModel:
        """Draw all weights: the same seed gives the same weights on every layout."""
        torch.manual_seed(seed)
        for part in (self.image_encoder, self.transformer, self.audio_encoder, self.video_encoder, self.head):
            if part is not None:
                part.initialize()
        for part in filter(None, (self.embed_tokens, self.embedding_head, self.text_head, self.output)):
            nn.init.normal_(part.weight, std=self.config.transformer.dim**-0.5)
        for part in filter(None, (self.embed_positions, self.embed_types)):
            nn.init.normal_(part.weight, std=POSITION_STD)
        if self.embedding_norm is not None:
            self.embedding_norm.reset_parameters()
        for scale in self.log_scale.values():
            nn.init.constant_(scale, math.log(self.config.logit_scale_init))
        for bias in self.logit_bias.values():
            nn.init.constant_(bias, self.config.logit_bias_init)
        return self

    def forward(self, batch: PackedBatch) -> ModelOutput:
        c = self.config.transformer
        encoded = self.encode(batch)
        x = self.place_media(self.embed(batch), encoded, batch)
        layout = self.sequence.layout(batch, causal=c.mask != "bidirectional", window=c.window, spans=c.mask == "media")
        hidden, routing = self.transformer(x, layout, self.rotary(batch), self.origin(batch) if c.experts else None)
        weight = (self.output or self.embed_tokens).weight
        return ModelOutput(
            hidden=hidden,
            output_hidden=self.head.transform(hidden) if self.head else hidden,
            # A view, not the parameter itself: FSDP hooks what is returned, once a step, and a parameter would keep its hooks.
            output_weight=weight.view_as(weight),
            output_bias=self.head.bias.view_as(self.head.bias) if self.head else None,
            sentence_logits=self.head.sentence_logits(hidden, batch.segments.first) if self.head else None,
            embeddings=self.embeddings(hidden, encoded, batch),
            routing=routing,
        )

    def embed(self, batch: PackedBatch) -> Float[Tensor, "T D"]:
        x = self.embed_tokens(batch.tokens)
        if self.embed_types is not None:
            x = x + self.embed_types(batch.token_types)
        if self.embed_positions is not None:
            x = x + self.embed_positions(batch.position_ids[0])
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def encode(self, batch: PackedBatch) -> dict[int, Encoded]:
        """What the encoders make of each modality: those that the batch has first, in the order in which `media_index` counts.

        An encoder without media reads the smallest there is, whose features stand last and are never looked at: every rank
        then runs the same modules, and so the same collectives, and every parameter has a gradient.
        """
        present, absent = {}, {}
        for modality, media in batch.media.items():
            encoder = {IMAGE: self.image_encoder, AUDIO: self.audio_encoder, VIDEO: self.video_encoder}[modality]
            assert encoder is not None or not len(media.grid), f"{MODALITIES[modality]}s without an encoder for them"
            if encoder is not None:
                shared = (self.image_encoder,) if modality == VIDEO else ()
                into = present if len(media.grid) else absent
                into[modality] = encoder(media if len(media.grid) else encoder.blank(batch.tokens.device, *shared), *shared)
        return present | absent

    def place_media(self, x: Float[Tensor, "T D"], encoded: dict[int, Encoded], batch: PackedBatch) -> Float[Tensor, "T D"]:
        """Media slots take their features."""
        if not encoded or not self.config.fusion:
            return x
        features = self.sequence.features(torch.cat([found.features for found in encoded.values()]), batch)
        if not len(features):  # none is shown here, and yet their graph is to be kept: every rank goes the same way back
            return x + features.sum()
        placed = F.embedding(batch.media_index.clamp(min=0), features).to(x.dtype)
        return torch.where((batch.media_index >= 0)[:, None], placed, x)

    def rotary(self, batch: PackedBatch) -> tuple[Tensor, Tensor] | None:
        c = self.config.transformer
        if c.positions != "rotary":
            return None
        positions = self.sequence.positions(batch.position_ids)
        return rotary_angles(positions, c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling, sections=c.rope_sections)

    def origin(self, batch: PackedBatch) -> Origin:
        packs = torch.cat([batch.segments.pack, batch.segments.pack.new_full((1,), NOTHING)])  # of padding, which is -1
        return Origin(packs[batch.document_ids], batch.packs, self.sequence.add_up)

    def embeddings(self, hidden: Float[Tensor, "T D"], encoded: dict[int, Encoded], batch: PackedBatch) -> dict[str, Embeddings]:
        """Of every level of the config, for all slots of the batch."""
        if not self.config.levels:
            return {}
        pooled = self.pool(hidden, batch)
        vectors = {}
        if self.embedding_head is not None:
            vectors["backbone"] = widened(self.embedding_head(pooled))
        if self.text_head is not None:
            vectors["tower"] = self._of_towers(widened(self.text_head(pooled)), encoded, batch)
        return {level: self._unit_length(level, rows) for level, rows in vectors.items()}

    def _of_towers(self, texts: Float[Tensor, "P E"], encoded: dict[int, Encoded], batch: PackedBatch) -> Float[Tensor, "P E"]:
        """A text's from the transformer, a medium's from its encoder."""
        if not encoded:
            return texts
        rows, row = self.sequence.items(encoded, batch)
        if not len(rows):
            return texts + rows.sum()
        return torch.where((batch.slots.modality == TEXT)[:, None], texts, F.embedding(row, rows))

    def _unit_length(self, level: str, rows: Float[Tensor, "P E"]) -> Embeddings:
        return Embeddings(
            vectors=F.normalize(rows, dim=-1),
            norms=rows.detach().norm(dim=-1),
            scale=widened(self.log_scale[level]).exp(),
            bias=widened(self.logit_bias[level]).view(1) if level in self.logit_bias else None,
        )

    def pool(self, hidden: Float[Tensor, "T D"], batch: PackedBatch) -> Float[Tensor, "P D"]:
        """The mean of the tokens of each slot; zeros for one without tokens."""
        rows, slot = self.sequence.pooled(hidden, batch)
        slots = len(batch.slots.pair)
        sums = rows.new_zeros(slots, rows.shape[1]).index_add(0, slot, rows)
        counts = torch.bincount(slot, minlength=slots).clamp(min=1)
        return sums / counts[:, None]

    @torch.no_grad()
    def after_step(self, loads: Int[Tensor, "layers experts"] | None) -> None:
        """What an optimizer step leaves to do: scales back within their bounds, where a gradient would not bring them, and
        routing biases by the step's loads, over all ranks."""
        for scale in self.log_scale.values():
            scale.clamp_(0, MAX_LOG_SCALE)
        c = self.config.transformer
        if loads is not None and c.experts.balance == "bias" and not c.frozen:
            self.transformer.rebalance(loads)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters by top-level part, and their total. Works on the meta device."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    own = {name: p.numel() for name, p in model.named_parameters(recurse=False)}
    return {**counts, **own, "total": sum(p.numel() for p in model.parameters())}
