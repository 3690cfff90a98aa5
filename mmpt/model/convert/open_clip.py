"""CLIP's two towers, as open_clip's checkpoints have them (arXiv 2103.00020).

The image tower becomes the image encoder, the text tower the shared transformer, the projections and the scale the tower level.
"""

from __future__ import annotations

import math
import re
from typing import Any

from mmpt.config import BlocksConfig, ImageEncoderConfig, ModelConfig
from mmpt.model.convert.architecture import Architecture, Part, of_layers, qkv_rules
from mmpt.model.convert.rules import OneRow, Patches, Rule, Scalar, Transposed, same, with_bias
from mmpt.model.convert.settings import Setting, Theirs
from mmpt.model.encoders.pooling import POOL_HEADS

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""What open_clip takes where a config says nothing."""

IN_BOTH = {
    "norm": "layer",
    "norm_placement": "pre",
    "bias": True,
    "qk_norm": False,
    "positions": "learned",
}
COMMON = {
    "fusion": False,
    "levels": ("tower",),
    "pool": "last",
    "tie_embeddings": True,
    "token_types": 0,
    "embedding_norm": False,
    "head": "linear",
    "audio": None,
    "video": None,
    "transformer.mask": "causal",
    "transformer.window": None,
    "transformer.experts": None,
    "image.stem": "linear",
    "image.stem_bias": False,
    "image.class_token": True,
}
READ = {
    "": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "preprocess_cfg", "init_logit_scale", "init_logit_bias"},
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "pool_type"}
    | {"norm_kwargs", "attentional_pool", "attn_pooler_queries", "attn_pooler_heads"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "pool_type"},
}
WITHOUT_EFFECT = {
    "": {"custom_text"},  # other names of the same weights
    "vision_cfg": {"patch_dropout", "output_tokens"},
    "text_cfg": {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "eos_id", "output_tokens"},
}
HARMLESS = {"pos_embed_type": "learnable", "proj_type": "linear", "block_type": "default"}
"""Of further keys, the values that ask for nothing: these, or none, or false."""


def settings(theirs: Theirs) -> dict[str, Setting]:
    """Of a `model_cfg` with open_clip's defaults, and of the `preprocess_cfg` in it."""
    vision, text, preprocess = (theirs.section(key) for key in ("vision_cfg", "text_cfg", "preprocess_cfg"))
    for section, name in ((theirs, ""), (vision, "vision_cfg"), (text, "text_cfg")):
        _refuse_unknown(section, READ[name] | WITHOUT_EFFECT[name])
    if text("pool_type", "argmax") not in ("argmax", "eos"):
        raise text.refusal("pool_type", "argmax or eos")
    activation = Setting("quick_gelu" if theirs("quick_gelu", False) else "gelu", "quick_gelu")
    width, head_width = vision.count("width", 768), vision.count("head_width", 64)
    towers = {
        "image": _tower(vision, width, heads=width // head_width, key="vision_cfg.width / head_width"),
        "transformer": _tower(text, text.count("width", 512), heads=text.count("heads", 8), key="text_cfg.heads"),
    }
    return {
        **{path: Setting(value, "CLIP's") for path, value in COMMON.items()},
        **{f"{part}.{name}": setting for part, tower in towers.items() for name, setting in tower.items()},
        "image.activation": activation,
        "transformer.activation": activation,
        "embedding_dim": Setting(theirs.count("embed_dim", 512), "embed_dim"),
        "vocabulary": Setting(text.count("vocab_size", 49_408), "text_cfg.vocab_size"),
        "transformer.max_positions": Setting(text.count("context_length", 77), "text_cfg.context_length"),
        "image.size": Setting(vision.count("image_size", 224), "vision_cfg.image_size"),
        "image.patch": Setting(vision.count("patch_size", 16), "vision_cfg.patch_size"),
        "image.stem_norm": Setting(not vision("no_ln_pre", False), "vision_cfg.no_ln_pre"),
        "image.pool": _pool(vision, theirs.count("embed_dim", 512)),
        "image.mean": Setting(preprocess.numbers("mean", OPENAI_MEAN), "preprocess_cfg.mean"),
        "image.std": Setting(preprocess.numbers("std", OPENAI_STD), "preprocess_cfg.std"),
    }


def _tower(theirs: Theirs, width: int, *, heads: int, key: str) -> dict[str, Setting]:
    kwargs = theirs.section("norm_kwargs")
    _refuse_unknown(kwargs, {"eps"})
    return {
        **{name: Setting(value, "CLIP's") for name, value in IN_BOTH.items()},
        "dim": Setting(width, "width"),
        "layers": Setting(theirs.count("layers", 12), "layers"),
        "n_heads": Setting(heads, key),
        "n_kv_heads": Setting(heads, key),
        "ffn_dim": Setting(int(width * theirs.number("mlp_ratio", 4.0)), "width * mlp_ratio"),
        "norm_eps": Setting(kwargs.number("eps", 1e-5), "norm_kwargs.eps"),
    }


def _pool(vision: Theirs, embed_dim: int) -> Setting:
    """Class and mean read the class token or all others; attention is one query of open_clip's pooler, the first."""
    kind = vision("pool_type", "tok")
    if not vision("attentional_pool", False):
        return Setting({"tok": "class", "avg": "mean"}.get(str(kind), kind), "vision_cfg.pool_type")
    wanted = {"attentional_pool": True, "pool_type": "tok", "attn_pooler_queries": 1, "attn_pooler_heads": pool_heads(embed_dim)}
    defaults = {"pool_type": "tok", "attn_pooler_queries": 256, "attn_pooler_heads": 8}
    for key, value in wanted.items():
        if vision(key, defaults.get(key)) != value:
            raise vision.refusal(key, str(value))
    return Setting("attention", "vision_cfg.attentional_pool")


def pool_heads(embedding_dim: int) -> int:
    """Of the attention pool: as many as ours has."""
    return math.gcd(POOL_HEADS, embedding_dim)


def _refuse_unknown(theirs: Theirs, known: set[str]) -> None:
    for key, value in theirs.plain.items():
        if key not in known and value is not None and value is not False and value != HARMLESS.get(key):
            raise theirs.refusal(key, HARMLESS.get(key, "left out"))


def describe(config: ModelConfig) -> dict[str, Any]:
    """Of a config with an image encoder. `eos_id` is for the caller to add where the last token is not the largest."""
    image, text = config.image or ImageEncoderConfig(), config.transformer
    attention = {
        "attentional_pool": True,
        "attn_pooler_queries": 1,
        "attn_pooler_heads": pool_heads(config.embedding_dim),
    }
    vision = {
        "image_size": image.size,
        "patch_size": image.patch,
        "head_width": image.head_dim,
        "no_ln_pre": not image.stem_norm,
        "pool_type": "avg" if image.pool == "mean" else "tok",
        **(attention if image.pool == "attention" else {}),
        **_blocks(image),
    }
    return {
        "embed_dim": config.embedding_dim,
        "quick_gelu": image.activation == "quick_gelu",
        **({} if config.logit_bias_init is None else {"init_logit_bias": config.logit_bias_init}),
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text.max_positions or 1,
            "vocab_size": config.vocabulary,
            "heads": text.n_heads,
            **_blocks(text),
        },
        "preprocess_cfg": {"mean": list(image.mean), "std": list(image.std)},
    }


def _blocks(config: BlocksConfig) -> dict[str, Any]:
    ratio = config.ffn_dim / config.dim
    if int(config.dim * ratio) != config.ffn_dim:  # rounded down by open_clip
        ratio = (config.ffn_dim + 0.5) / config.dim
    return {
        "width": config.dim,
        "layers": config.layers,
        "mlp_ratio": ratio,
        **({} if config.norm_eps == 1e-5 else {"norm_kwargs": {"eps": config.norm_eps}}),
    }


def _layers(config: BlocksConfig) -> tuple[Rule, ...]:
    modules = {
        "attention_norm": "ln_1",
        "attention.out": "attn.out_proj",
        "ffn_norm": "ln_2",
        "ffn.up": "mlp.c_fc",
        "ffn.down": "mlp.c_proj",
    }
    qkv = qkv_rules(config, {kind: (f"attn.in_proj_{kind}",) for kind in ("weight", "bias")})
    return of_layers(config, (*with_bias(modules), *qkv), "transformer.blocks.{}.", "transformer.resblocks.{}.")


def _image(config: ModelConfig) -> tuple[Rule, ...]:
    c = config.image
    norms = {"transformer.norm": "attn_pool.ln_k" if c.pool == "attention" else "ln_post"}
    if c.stem_norm:
        norms["stem_norm"] = "ln_pre"
    rules = (
        Rule(ours=("stem.project.weight",), theirs=("conv1.weight",), form=Patches(c.patch)),
        *same({"class_token": "class_embedding", "positions": "positional_embedding"}),
        *with_bias(norms),
        *_layers(c),
    )
    return tuple(rule.within("image_encoder.", "visual.") for rule in rules)


def _text(config: ModelConfig) -> tuple[Rule, ...]:
    return (
        *same({"embed_tokens.weight": "token_embedding.weight", "embed_positions.weight": "positional_embedding"}),
        *with_bias({"transformer.norm": "ln_final"}),
        *_layers(config.transformer),
    )


def _towers(config: ModelConfig) -> tuple[Rule, ...]:
    scalars = {"log_scale.tower": "logit_scale"}
    if config.logit_bias_init is not None:
        scalars["logit_bias.tower"] = "logit_bias"
    matrices = {"text_head.weight": "text_projection", "image_encoder.head.weight": "visual.proj"}
    pool = _attention_pool(config) if config.image.pool == "attention" else ()
    return (
        *(Rule(ours=(ours,), theirs=(theirs,), form=Transposed()) for ours, theirs in matrices.items()),
        *(Rule(ours=(ours,), theirs=(theirs,), form=Scalar()) for ours, theirs in scalars.items()),
        *(rule.within("image_encoder.pool.", "visual.") for rule in pool),
    )


def _attention_pool(config: ModelConfig) -> tuple[Rule, ...]:
    """torch's multi-head attention keeps the three matrices together where they have one shape, and apart elsewhere."""
    rows = (config.embedding_dim,) * 3
    weights = tuple(f"{name}.weight" for name in "qkv")
    if config.image.dim == config.embedding_dim:
        matrices = (Rule(ours=weights, theirs=("attn_pool.attn.in_proj_weight",), our_rows=rows),)
    else:
        matrices = same({f"{name}.weight": f"attn_pool.attn.{name}_proj_weight" for name in "qkv"})
    return (
        Rule(ours=("query",), theirs=("attn_pool.query",), form=OneRow()),
        *with_bias({"query_norm": "attn_pool.ln_q", "out": "attn_pool.attn.out_proj", "norm": "ln_post"}),
        *matrices,
        Rule(ours=tuple(f"{name}.bias" for name in "qkv"), theirs=("attn_pool.attn.in_proj_bias",), our_rows=rows),
    )


OPEN_CLIP = Architecture(
    name="CLIP",
    settings=settings,
    describe=describe,
    parts={
        "image": Part(
            into="image_encoder",
            has=lambda config: config.image is not None,
            fields=("image.",),
            rules=_image,
            scope=re.compile(r"visual\.(?!proj$|attn_pool\.|ln_post\.)"),
        ),
        "transformer": Part(
            into="transformer",
            has=lambda config: True,
            fields=("vocabulary", "token_types", "embedding_norm", "transformer."),
            rules=_text,
            scope=re.compile(r"(?!visual\.|logit_|text_projection)"),
        ),
        "towers": Part(
            into="projections and scale of the tower level",
            has=lambda config: config.image is not None and "tower" in config.levels,
            fields=("embedding_dim", "pool"),
            rules=_towers,
            scope=re.compile(r"visual\.(proj$|attn_pool\.|ln_post\.)|logit_|text_projection"),
        ),
    },
    # Of weights saved under DistributedDataParallel, and of models with `custom_text`.
    renames=((re.compile(r"^module\."), ""), (re.compile(r"^text\."), "")),
    ignored=re.compile(r"^attn_mask$"),
)
