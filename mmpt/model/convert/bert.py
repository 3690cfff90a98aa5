"""BERT with both of its heads, as Hugging Face's BertForPreTraining has it (arXiv 1810.04805)."""

from __future__ import annotations

import re
from typing import Any

from mmpt.config import ModelConfig
from mmpt.model.convert.architecture import Architecture, Part, of_layers, qkv_rules
from mmpt.model.convert.rules import Rule, same, with_bias
from mmpt.model.convert.settings import ACTIVATIONS, Setting, Theirs

COMMON = {
    "tie_embeddings": True,
    "embedding_norm": True,
    "head": "bert",
    "levels": (),
    "image": None,
    "audio": None,
    "video": None,
    "transformer.mask": "bidirectional",
    "transformer.window": None,
    "transformer.positions": "learned",
    "transformer.experts": None,
    "transformer.norm": "layer",
    "transformer.norm_placement": "post",
    "transformer.bias": True,
    "transformer.qk_norm": False,
}
MUST_BE = {
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}


def settings(theirs: Theirs) -> dict[str, Setting]:
    """Of a BertForPreTraining, with transformers' defaults."""
    for key, wanted in MUST_BE.items():
        if theirs(key, wanted) != wanted:
            raise theirs.refusal(key, str(wanted))
    heads, activation = theirs.count("num_attention_heads", 12), theirs("hidden_act", "gelu")
    return {
        **{path: Setting(value, "BERT's") for path, value in COMMON.items()},
        "vocabulary": Setting(theirs.count("vocab_size", 30_522), "vocab_size"),
        "token_types": Setting(theirs.count("type_vocab_size", 2), "type_vocab_size"),
        "transformer.max_positions": Setting(theirs.count("max_position_embeddings", 512), "max_position_embeddings"),
        "transformer.dim": Setting(theirs.count("hidden_size", 768), "hidden_size"),
        "transformer.layers": Setting(theirs.count("num_hidden_layers", 12), "num_hidden_layers"),
        "transformer.n_heads": Setting(heads, "num_attention_heads"),
        "transformer.n_kv_heads": Setting(heads, "num_attention_heads"),
        "transformer.ffn_dim": Setting(theirs.count("intermediate_size", 3072), "intermediate_size"),
        "transformer.activation": Setting(ACTIVATIONS.get(str(activation), activation), "hidden_act"),
        "transformer.norm_eps": Setting(theirs.number("layer_norm_eps", 1e-12), "layer_norm_eps"),
    }


def describe(config: ModelConfig) -> dict[str, Any]:
    c = config.transformer
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "vocab_size": config.vocabulary,
        "type_vocab_size": max(config.token_types, 1),
        "max_position_embeddings": c.max_positions or 1,
        "hidden_size": c.dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.n_heads,
        "intermediate_size": c.ffn_dim,
        "hidden_act": names[c.activation],
        "layer_norm_eps": c.norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True,
    }


def _body(config: ModelConfig) -> tuple[Rule, ...]:
    c = config.transformer
    names = ("query", "key", "value")
    qkv = qkv_rules(c, {kind: tuple(f"attention.self.{name}.{kind}" for name in names) for kind in ("weight", "bias")})
    others = {
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }
    embeddings = {
        "embed_tokens.weight": "bert.embeddings.word_embeddings.weight",
        "embed_positions.weight": "bert.embeddings.position_embeddings.weight",
        "embed_types.weight": "bert.embeddings.token_type_embeddings.weight",
    }
    return (
        *same(embeddings),
        *with_bias({"embedding_norm": "bert.embeddings.LayerNorm"}),
        *of_layers(c, (*qkv, *with_bias(others)), "transformer.blocks.{}.", "bert.encoder.layer.{}."),
    )


def _head(config: ModelConfig) -> tuple[Rule, ...]:
    layers = {
        "head.pooler": "bert.pooler.dense",
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.classifier": "cls.seq_relationship",
    }
    return (*same({"head.bias": "cls.predictions.bias"}), *with_bias(layers))


BERT = Architecture(
    name="BERT",
    settings=settings,
    describe=describe,
    parts={
        "transformer": Part(
            into="transformer",
            has=lambda config: True,
            fields=("vocabulary", "tie_embeddings", "token_types", "embedding_norm", "transformer."),
            rules=_body,
            scope=re.compile(r"bert\.(?!pooler\.)"),
        ),
        "head": Part(
            into="head",
            has=lambda config: config.head == "bert",
            fields=("head",),
            rules=_head,
            scope=re.compile(r"cls\.|bert\.pooler\."),
        ),
    },
    # bert-base's own files spell the norms' weights as TensorFlow did.
    renames=((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias")),
    ignored=re.compile(r"\.position_ids$"),
    repeated={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)
