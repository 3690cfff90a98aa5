"""Llama and Mixtral, as Hugging Face's checkpoints have them.

Names are those of published files. Inside of transformers 5 a Mixtral's experts are stacked, under other names; its
`from_pretrained` and `save_pretrained` go by those of the files.
"""

from __future__ import annotations

import re
from itertools import product
from typing import Any

from mmpt.config import ModelConfig, TransformerConfig
from mmpt.model.convert.architecture import Architecture, Part, of_layers, qkv_rules
from mmpt.model.convert.rules import Experts, Rule, same
from mmpt.model.convert.settings import ACTIVATIONS, Setting, Theirs

COMMON = {
    "embedding_norm": False,
    "token_types": 0,
    "head": "linear",
    "levels": (),
    "image": None,
    "audio": None,
    "video": None,
    "transformer.mask": "causal",
    "transformer.positions": "rotary",
    "transformer.max_positions": None,
    "transformer.rope_sections": None,
    "transformer.norm": "rms",
    "transformer.norm_placement": "pre",
    "transformer.qk_norm": False,
}
SCALING = {
    "llama3": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # where they are not given
WITHOUT_EFFECT = {
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
    "partial_rotary_factor": 1.0,
}
"""What else can change rotary positions there, at the value that changes nothing."""


def llama_settings(theirs: Theirs) -> dict[str, Setting]:
    """Of a LlamaForCausalLM, with transformers' defaults."""
    attention, feed_forward = (bool(theirs(key, False)) for key in ("attention_bias", "mlp_bias"))
    bias = attention if attention == feed_forward else (attention, feed_forward)
    return {
        **_settings(theirs, "Llama", ffn_dim=11_008, kv_heads=None, eps=1e-6, theta=10_000.0),
        "transformer.bias": Setting(bias, "attention_bias, mlp_bias"),
        "transformer.window": Setting(None, "Llama has none"),
        "transformer.experts": Setting(None, "Llama has none"),
    }


def mixtral_settings(theirs: Theirs) -> dict[str, Setting]:
    """Of a MixtralForCausalLM, with transformers' defaults."""
    return {
        **_settings(theirs, "Mixtral", ffn_dim=14_336, kv_heads=8, eps=1e-5, theta=1_000_000.0),
        "transformer.bias": Setting(False, "Mixtral has none"),
        "transformer.window": Setting(theirs("sliding_window", None), "sliding_window"),
        "transformer.experts.count": Setting(theirs.count("num_local_experts", 8), "num_local_experts"),
        "transformer.experts.top_k": Setting(theirs.count("num_experts_per_tok", 2), "num_experts_per_tok"),
        "transformer.experts.shared": Setting(0, "Mixtral has none"),
        "transformer.experts.balance": Setting("auxiliary", "Mixtral's way of routing"),
    }


def _settings(theirs: Theirs, name: str, *, ffn_dim: int, kv_heads: int | None, eps: float, theta: float) -> dict[str, Setting]:
    dim, heads = theirs.count("hidden_size", 4096), theirs.count("num_attention_heads", 32)
    as_many = theirs("num_key_value_heads", kv_heads) is None
    kv_heads = heads if as_many else theirs.count("num_key_value_heads", kv_heads or heads)
    head_dim = dim // heads if theirs("head_dim", None) is None else theirs.count("head_dim", 1)
    if head_dim * heads != dim:
        raise theirs.refusal("head_dim", f"hidden_size / num_attention_heads, {dim / heads:g}")
    activation = theirs("hidden_act", "silu")
    return {
        **{path: Setting(value, f"{name}'s") for path, value in COMMON.items()},
        "vocabulary": Setting(theirs.count("vocab_size", 32_000), "vocab_size"),
        "tie_embeddings": Setting(theirs("tie_word_embeddings", False), "tie_word_embeddings"),
        "transformer.dim": Setting(dim, "hidden_size"),
        "transformer.layers": Setting(theirs.count("num_hidden_layers", 32), "num_hidden_layers"),
        "transformer.n_heads": Setting(heads, "num_attention_heads"),
        "transformer.n_kv_heads": Setting(kv_heads, "num_key_value_heads"),
        "transformer.ffn_dim": Setting(theirs.count("intermediate_size", ffn_dim), "intermediate_size"),
        "transformer.activation": Setting("swiglu" if activation == "silu" else activation, "hidden_act"),
        "transformer.norm_eps": Setting(theirs.number("rms_norm_eps", eps), "rms_norm_eps"),
        **_rotary_settings(theirs, theta),
    }


def _rotary_settings(theirs: Theirs, theta: float) -> dict[str, Setting]:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as before transformers 5."""
    key = "rope_parameters" if theirs("rope_parameters", None) else "rope_scaling"
    rope = theirs.section(key)
    for section, (name, harmless) in product((rope, theirs), WITHOUT_EFFECT.items()):
        if section(name, None) not in (None, harmless):
            raise section.refusal(name, str(harmless))
    found_theta = rope.number("rope_theta", theirs.number("rope_theta", theta))
    kind = rope("rope_type", rope("type", "default"))
    settings = {"transformer.rope_theta": Setting(found_theta, "rope_theta")}
    if kind == "default":
        return {**settings, "transformer.rope_scaling": Setting(None, key)}
    settings["transformer.rope_scaling.kind"] = Setting(kind, f"{key}.rope_type")
    for ours, name in SCALING.get(kind, {}).items():
        # Where a checkpoint does not say, its own length is meant.
        default = theirs.number("max_position_embeddings", 0) if ours == "original_positions" else YARN_BETAS.get(ours, 0.0)
        settings[f"transformer.rope_scaling.{ours}"] = Setting(rope.number(name, default), f"{key}.{name}")
    return settings


def describe_llama(config: ModelConfig) -> dict[str, Any]:
    bias = config.transformer.bias
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_description(config),
        "attention_bias": bias,
        "mlp_bias": bias,
    }


def describe_mixtral(config: ModelConfig) -> dict[str, Any]:
    experts = config.transformer.experts
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_description(config),
        "sliding_window": config.transformer.window,
        "num_local_experts": experts.count if experts else 1,
        "num_experts_per_tok": experts.top_k if experts else 1,
    }


def _description(config: ModelConfig) -> dict[str, Any]:
    """Rotary positions are told in the older form, which all versions read."""
    c = config.transformer
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    scaling = c.rope_scaling and {
        "rope_type": c.rope_scaling.kind,
        **{theirs: getattr(c.rope_scaling, ours) for ours, theirs in SCALING[c.rope_scaling.kind].items()},
    }
    return {
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_size": c.dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_dim,
        "hidden_act": names[c.activation],
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "attention_dropout": 0.0,
    }


def _kinds(config: TransformerConfig) -> tuple[str, ...]:
    return ("weight", "bias") if config.bias else ("weight",)


def _attention(config: TransformerConfig) -> tuple[Rule, ...]:
    kinds = _kinds(config)
    return (
        *same({"attention_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}),
        *qkv_rules(config, {kind: tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv") for kind in kinds}),
        *same({f"attention.out.{kind}": f"self_attn.o_proj.{kind}" for kind in kinds}),
    )


def _feed_forward(config: TransformerConfig) -> tuple[Rule, ...]:
    return same({f"ffn.{name}.{kind}": f"mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in _kinds(config)})


def _experts(config: TransformerConfig) -> tuple[Rule, ...]:
    """Of every expert w1 is the gate, w3 the value, and w2 the way back."""
    count = config.experts.count
    name = "block_sparse_moe.experts.{}.{}.weight"
    return (
        *same({"ffn.router.weight": "block_sparse_moe.gate.weight"}),
        Rule(
            ours=("ffn.gate_up",),
            theirs=tuple(name.format(expert, matrix) for expert in range(count) for matrix in ("w1", "w3")),
            form=Experts(count),
            their_rows=(config.ffn_dim,) * (2 * count),
        ),
        Rule(
            ours=("ffn.down",),
            theirs=tuple(name.format(expert, "w2") for expert in range(count)),
            form=Experts(count),
            their_rows=(config.dim,) * count,
        ),
    )


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    c = config.transformer
    layer = (*_attention(c), *(_experts(c) if c.experts else _feed_forward(c)))
    whole = {"embed_tokens.weight": "model.embed_tokens.weight", "transformer.norm.weight": "model.norm.weight"}
    untied = {} if config.tie_embeddings else {"output.weight": "lm_head.weight"}
    return (*same(whole | untied), *of_layers(c, layer, "transformer.blocks.{}.", "model.layers.{}."))


TRANSFORMER = Part(
    into="transformer",
    has=lambda config: True,
    fields=("vocabulary", "tie_embeddings", "token_types", "embedding_norm", "transformer."),
    rules=_rules,
    scope=re.compile(""),
)
WITHOUT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$")
REPEATED = {"lm_head.weight": "model.embed_tokens.weight"}

LLAMA = Architecture(
    name="Llama",
    settings=llama_settings,
    describe=describe_llama,
    parts={"transformer": TRANSFORMER},
    ignored=WITHOUT_WEIGHTS,
    repeated=REPEATED,
)
MIXTRAL = Architecture(
    name="Mixtral",
    settings=mixtral_settings,
    describe=describe_mixtral,
    parts={"transformer": TRANSFORMER},
    ignored=WITHOUT_WEIGHTS,
    repeated=REPEATED,
)
