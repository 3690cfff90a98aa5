"""Small configs: the one that was given, with its structure and without its widths, and one of each model family.

RunConfig --shrink--> the same kinds of layers, heads and losses, two blocks of some 32 wide
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmpt.config import BlocksConfig, ModelConfig, RunConfig, parse
from mmpt.verify.mixes import VOCABULARY

PACK_TOKENS = 240  # eight packs are shared evenly by 2, 3, 4, 5, 6 and 8 ranks
HEAD_DIM = 8
BLOCKS = {"dim": 32, "layers": 2, "n_heads": 4, "ffn_dim": 48}
PLAIN = {"qk_norm": False, "bias": True, "norm": "layer", "activation": "gelu"}
IMAGE = {**BLOCKS, "size": 24, "patch": 4, "merge": 2}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Llama": {
        "model": {
            "tie_embeddings": False,
            "levels": [],
            "transformer": {
                **BLOCKS, "dim": 64, "n_heads": 8, "n_kv_heads": 4, "qk_norm": False,
                "rope_scaling": {"kind": "llama3", "factor": 8, "original_positions": 16},
            },
        },
        "objectives": {"next_token": {"z_loss": 1e-3}},
    },
    "Mixtral": {
        "model": {
            "levels": [],
            "transformer": {**BLOCKS, "n_kv_heads": 2, "qk_norm": False, "experts": {"count": 4, "top_k": 2}},
        },
    },
    "BERT": {
        "model": {
            "token_types": 2,
            "embedding_norm": True,
            "head": "bert",
            "levels": [],
            "transformer": {
                **BLOCKS, **PLAIN, "mask": "bidirectional", "positions": "learned", "max_positions": PACK_TOKENS,
                "norm_placement": "post",
            },
        },
    },
    "CLIP": {
        "model": {
            "fusion": False,
            "levels": ["tower"],
            "image": {
                **IMAGE, **PLAIN, "merge": 1, "resize": "crop", "stem_bias": False, "positions": "learned", "class_token": True,
                "stem_norm": True, "pool": "class",
            },
            "transformer": {**BLOCKS, **PLAIN, "positions": "learned", "max_positions": PACK_TOKENS},
        },
        "objectives": {"next_token": {"weight": 0.0}},
    },
    "four modalities": {
        "model": {
            "levels": ["backbone", "tower"],
            "pool": "mean",
            "logit_bias_init": -4.0,
            "image": {**IMAGE, "resize": "native", "stem": "conv", "stem_dims": [8, 16], "pool": "attention"},
            "audio": {**BLOCKS, "layers": 1, "frames_per_token": 4},
            "video": {"merge_frames": 2},
            "transformer": {
                **BLOCKS, "mask": "media", "rope_sections": [2, 1, 1],
                "experts": {"count": 4, "top_k": 2, "shared": 1, "balance": "bias"},
            },
        },
        "objectives": {"contrastive": {"tower": {"loss": "sigmoid"}, "exchange": "ring"}},
    },
}  # fmt: skip
"""Beside the given config: what a run's config says where it is not as below. Together they have every kind of layer and loss."""

# Some gradients are 0 but for rounding, which AdamW's first step would make as large as any other's: a large eps holds it down.
COMMON = {
    "data": {"spec": "made up", "tokenizer": "made up", "pack_tokens": PACK_TOKENS},
    "optimizer": {"lr": 1e-2, "eps": 1e-3, "warmup_steps": 0, "clip_norm": 0.5},
    "train": {"steps": 1, "precision": "fp32"},
}


def families(config: RunConfig) -> dict[str, RunConfig]:
    """By name: `config` itself, made small, then one of each family that has another name."""
    others = {name: _run(name, tree) for name, tree in FAMILIES.items() if name != config.name}
    return {config.name: shrink(config), **others}


def _run(name: str, tree: Mapping[str, Any]) -> RunConfig:
    model = {"vocabulary": VOCABULARY, "embedding_dim": 16, **tree["model"]}
    return parse({**COMMON, **tree, "name": "family", "model": model}, where=name)


def shrink(config: RunConfig) -> RunConfig:
    """A run of the same structure: kinds of layers, ratio of heads, masks, levels and losses stay, sizes go.

    Weights are drawn, so published ones are not looked for; there is no teacher.
    """
    objectives = config.objectives.model_dump() | {"distillation": None}
    recompute = {"recompute": config.train.recompute}
    tree = {"model": _model(config.model), "objectives": objectives, "train": COMMON["train"] | recompute}
    return parse({**COMMON, **tree, "name": config.name}, where=f"{config.name}, made small")


def _model(model: ModelConfig) -> dict[str, Any]:
    tree = model.model_dump() | {"vocabulary": VOCABULARY, "embedding_dim": 16, "init": None}
    tree["transformer"] |= _blocks(model.transformer) | _places(model)
    if image := model.image:
        patch, merge = 4, min(image.merge, 2)
        tree["image"] |= {**_blocks(image), "patch": patch, "merge": merge, "size": 2 * patch * merge}
        tree["image"] |= {"stem_dims": [8, 16] if image.stem == "conv" else []}
    if model.audio:
        tree["audio"] |= _blocks(model.audio) | {"frames_per_token": min(model.audio.frames_per_token, 4)}
    if model.video:
        tree["video"] = {"size": None, "merge_frames": min(model.video.merge_frames, 2)}
    return tree


def _blocks(blocks: BlocksConfig) -> dict[str, Any]:
    """Up to four heads of keys, and up to two of queries for each."""
    keys, each = min(blocks.kv_heads, 4), min(blocks.n_heads // blocks.kv_heads, 2)
    heads, width = keys * each, keys * each * HEAD_DIM
    sizes = {"dim": width, "layers": min(blocks.layers, 2), "n_heads": heads, "n_kv_heads": keys, "ffn_dim": 2 * width}
    return {**sizes, "init": None}


def _places(model: ModelConfig) -> dict[str, Any]:
    """What else is counted in tokens, pairs of a head or experts."""
    transformer, tree = model.transformer, {}
    if transformer.window:
        tree["window"] = min(transformer.window, PACK_TOKENS // 8)
    if transformer.max_positions:
        tree["max_positions"] = PACK_TOKENS
    if transformer.rope_sections:
        tree["rope_sections"] = [2, 1, 1]
    if scaling := transformer.rope_scaling:
        tree["rope_scaling"] = scaling.model_dump() | {"original_positions": PACK_TOKENS // 8}
    if experts := transformer.experts:
        count = min(experts.count, 4)
        few = {"count": count, "top_k": min(experts.top_k, count), "shared": min(experts.shared, 1)}
        tree["experts"] = experts.model_dump() | few
    return tree
