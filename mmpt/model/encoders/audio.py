"""Whisper's encoder (arXiv 2212.04356) over packed log-mel frames: sounds of any lengths, end to end, without padding.

log-mel frames (N, mel_bins) --conv, conv of stride 2, positions--> (N / 2, dim) --blocks--> states
states --mean of neighbours, project--> features (rows, D);  states --pool, head--> pooled (M, E)

What the names are in Hugging Face's WhisperEncoder: conv1 and conv2 are the same; transformer.blocks.{i}.attention_norm,
.ffn_norm, .ffn.up, .ffn.down and .attention.out are layers.{i}.self_attn_layer_norm, .final_layer_norm, .fc1, .fc2 and
.self_attn.out_proj; .attention.qkv is self_attn's q_proj, k_proj (which has no bias there: 0) and v_proj; transformer.norm is
layer_norm. embed_positions.weight is no parameter here: it is `sinusoids`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpt.config import AudioEncoderConfig
from mmpt.model.attention import AttentionLayout
from mmpt.model.encoders.pooling import AttentionPool, Encoded, initialize_linear, mean_of_items
from mmpt.model.layers import widened
from mmpt.model.rotary import rotary_angles
from mmpt.model.transformer import Transformer
from mmpt.types import MediaBatch

ROPE_THETA = 10_000.0


class AudioEncoder(nn.Module):
    """Two convolutions, the second of stride 2, and blocks; `frames_per_token` log-mel frames become one feature row."""

    def __init__(self, config: AudioEncoderConfig, *, out_dim: int | None, embedding_dim: int | None) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.mel_bins, config.dim, 3, padding=1)
        self.conv2 = nn.Conv1d(config.dim, config.dim, 3, stride=2, padding=1)
        self.transformer = Transformer(config)
        self.project = nn.Linear(config.dim, out_dim) if out_dim else None
        attention = config.pool == "attention" and embedding_dim is not None
        self.pool = AttentionPool(config, embedding_dim) if attention else None
        self.head = nn.Linear(embedding_dim if attention else config.dim, embedding_dim, bias=False) if embedding_dim else None

    def forward(self, media: MediaBatch) -> Encoded:
        """Features: frames / frames_per_token rows an item. Every item has a whole number of tokens."""
        x = self.encode(media)
        lengths = media.cu_seqlens.diff() // 2
        pooled = features = None
        if self.project is not None:
            features = self.project(x.unflatten(0, (-1, self.config.frames_per_token // 2)).mean(1))
        if self.head is not None:
            pooled = self.head(mean_of_items(x, lengths) if self.pool is None else self.pool(x, lengths))
        return Encoded(features=features, pooled=pooled)

    def encode(self, media: MediaBatch) -> Float[Tensor, "states dim"]:
        """The states behind the last norm, one for two frames."""
        x = F.gelu(convolve(media.values.to(self.conv1.weight.dtype), self.conv1, media.cu_seqlens))
        x = widened(F.gelu(convolve(x, self.conv2, media.cu_seqlens)))  # blocks add to it in fp32, under autocast as well
        cu_seqlens = media.cu_seqlens // 2
        lengths = cu_seqlens.diff()
        places = torch.arange(len(x), device=x.device) - cu_seqlens[:-1].repeat_interleave(lengths, output_size=len(x))
        rotary = None
        if self.config.positions == "rotary":
            rotary = rotary_angles(places[None], self.config.head_dim, ROPE_THETA)
        else:
            x = x + sinusoids(places, self.config.dim)
        states, _ = self.transformer(x, AttentionLayout.from_lengths(lengths, causal=False), rotary)
        return states

    def blank(self, device: torch.device) -> MediaBatch:
        """The shortest sound there is, for a batch that has none."""
        frames = self.config.frames_per_token
        return MediaBatch(
            values=torch.zeros(frames, self.config.mel_bins, device=device),
            cu_seqlens=torch.tensor([0, frames], device=device),
            grid=torch.tensor([[frames, 1, 1]], device=device),
            times=torch.zeros(frames, device=device),
        )

    @torch.no_grad()
    def initialize(self) -> None:
        self.transformer.initialize()
        for layer in filter(None, (self.conv1, self.conv2, self.project, self.head)):
            initialize_linear(layer)
        if self.pool is not None:
            self.pool.initialize()


def convolve(
    x: Float[Tensor, "N channels"], conv: nn.Conv1d, cu_seqlens: Int[Tensor, "M_plus_1"]
) -> Float[Tensor, "rows out_channels"]:
    """A convolution of width 3 over each item by itself, with a border of zeros, as one matrix product over all of them.

    Items have even lengths, so that with stride 2 item m's rows are cu_seqlens[m] / 2 up to cu_seqlens[m + 1] / 2.
    """
    stride = conv.stride[0]
    middle = torch.arange(0, len(x), stride, device=x.device)
    begins = torch.zeros(len(x) + 1, dtype=torch.bool, device=x.device).index_fill_(0, cu_seqlens, True)
    zero = len(x)  # the row of zeros that is added
    before = torch.where(begins[middle], zero, middle - 1)
    after = torch.where(begins[middle + 1], zero, middle + 1)
    taps = torch.stack([before, middle, after], dim=1).flatten()
    windows = F.pad(x, (0, 0, 0, 1)).index_select(0, taps).unflatten(0, (-1, 3)).flatten(1)
    return F.linear(windows, conv.weight.transpose(1, 2).flatten(1), conv.bias)


def sinusoids(positions: Int[Tensor, " T"], dim: int) -> Float[Tensor, "T dim"]:
    """Whisper's: sines, then cosines, with periods from 2 pi to 20,000 pi."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=positions.device))
    angles = positions[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], dim=1)
