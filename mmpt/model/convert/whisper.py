"""Whisper's encoder, as Hugging Face's checkpoints have it (arXiv 2212.04356). Its decoder has no place in a model of ours."""

from __future__ import annotations

import re

import torch
from jaxtyping import Float
from torch import Tensor

from mmpt.config import ModelConfig
from mmpt.model.convert.architecture import Architecture, Part, of_layers, qkv_rules
from mmpt.model.convert.rules import Rule, with_bias
from mmpt.model.convert.settings import ACTIVATIONS, Setting, Theirs
from mmpt.model.encoders.audio import sinusoids

COMMON = {
    "audio.positions": "sinusoidal",
    "audio.norm": "layer",
    "audio.norm_placement": "pre",
    "audio.norm_eps": 1e-5,
    "audio.bias": True,
    "audio.qk_norm": False,
}


def settings(theirs: Theirs) -> dict[str, Setting]:
    """Of a WhisperModel's encoder, with transformers' defaults."""
    if theirs("scale_embedding", False):
        raise theirs.refusal("scale_embedding", "false")
    heads, activation = theirs.count("encoder_attention_heads", 6), theirs("activation_function", "gelu")
    return {
        **{path: Setting(value, "Whisper's") for path, value in COMMON.items()},
        "audio.mel_bins": Setting(theirs.count("num_mel_bins", 80), "num_mel_bins"),
        "audio.dim": Setting(theirs.count("d_model", 384), "d_model"),
        "audio.layers": Setting(theirs.count("encoder_layers", 4), "encoder_layers"),
        "audio.n_heads": Setting(heads, "encoder_attention_heads"),
        "audio.n_kv_heads": Setting(heads, "encoder_attention_heads"),
        "audio.ffn_dim": Setting(theirs.count("encoder_ffn_dim", 1536), "encoder_ffn_dim"),
        "audio.activation": Setting(ACTIVATIONS.get(str(activation), activation), "activation_function"),
    }


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    layers = {
        "attention_norm": "self_attn_layer_norm",
        "attention.out": "self_attn.out_proj",
        "ffn_norm": "final_layer_norm",
        "ffn.up": "fc1",
        "ffn.down": "fc2",
    }
    qkv = {
        "weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
        "bias": ("self_attn.q_proj.bias", None, "self_attn.v_proj.bias"),
    }
    layer = (*with_bias(layers), *qkv_rules(config.audio, qkv))
    whole = {"conv1": "conv1", "conv2": "conv2", "transformer.norm": "layer_norm"}
    return tuple(
        rule.within("audio_encoder.", "encoder.")
        for rule in (*with_bias(whole), *of_layers(config.audio, layer, "transformer.blocks.{}.", "layers.{}."))
    )


def _positions(rows: int, dim: int) -> Float[Tensor, "rows dim"]:
    return sinusoids(torch.arange(rows), dim)


WHISPER = Architecture(
    name="Whisper",
    settings=settings,
    describe=None,
    parts={
        "audio": Part(
            into="audio_encoder",
            has=lambda config: config.audio is not None,
            fields=("audio.",),
            rules=_rules,
            scope=re.compile(r"encoder\."),
        )
    },
    renames=((re.compile(r"^model\."), ""),),
    computed={"encoder.embed_positions.weight": _positions},
)
