"""The configs of configs/models/: parameter counts as published, and no field that a library could understand otherwise."""

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from references import CONFIGS, shrunk
from transformers import (
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    WhisperConfig,
)

from mmpt.config import AudioEncoderConfig, ImageEncoderConfig, ModelConfig, TransformerConfig, load
from mmpt.model.convert.architecture import Architecture
from mmpt.model.convert.bert import BERT
from mmpt.model.convert.export import describe_exactly
from mmpt.model.convert.initialize import HUGGING_FACE
from mmpt.model.convert.llama import LLAMA, MIXTRAL
from mmpt.model.convert.open_clip import OPEN_CLIP
from mmpt.model.convert.settings import Theirs, differences
from mmpt.model.convert.whisper import WHISPER
from mmpt.model.multimodal import MultimodalModel, parameter_counts
from mmpt.types import UserError

LLAMA_3_1 = {
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
OF_8B = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
OF_405B = {"hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126, "num_attention_heads": 128}
OF_8X22B = {
    "vocab_size": 32_000,
    "hidden_size": 6144,
    "intermediate_size": 16_384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "max_position_embeddings": 65_536,
}
PUBLISHED = {
    "clip_vit_b32": (151_277_313, lambda: CLIP(**open_clip.get_model_config("ViT-B-32"))),
    "clip_vit_l14": (427_616_513, lambda: CLIP(**open_clip.get_model_config("ViT-L-14"))),
    "bert_base": (110_106_428, lambda: BertForPreTraining(BertConfig())),
    "llama_3_1_8b": (8_030_261_248, lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_3_1, **OF_8B))),
    "llama_3_1_405b": (405_853_388_800, lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_3_1, **OF_405B))),
    "mixtral_8x22b": (140_620_634_112, lambda: MixtralForCausalLM(MixtralConfig(**OF_8X22B))),
}


def parameters(config: ModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        return parameter_counts(MultimodalModel(config))


def test_every_config_is_counted_here():
    assert {path.stem for path in (CONFIGS / "models").glob("*.yaml")} == {*PUBLISHED, "base_1b"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str):
    count, build = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build().parameters()) == count
    assert parameters(shrunk(name, ()))["total"] == count


def test_the_model_of_four_modalities_has_about_a_billion():
    counts = parameters(shrunk("base_1b", ()))
    assert 0.95e9 < counts["total"] < 1.1e9
    assert all(counts[f"{name}_encoder"] for name in ("image", "audio", "video"))


def test_the_run_of_that_model():
    config = load(CONFIGS / "base_1b.yaml", ["model.transformer.layers=3"])
    assert config.model == shrunk("base_1b", ["transformer.layers=3"])


ARCHITECTURES = {
    "clip_vit_b32": (OPEN_CLIP, lambda: open_clip.get_model_config("ViT-B-32")),
    "clip_vit_l14": (OPEN_CLIP, lambda: open_clip.get_model_config("ViT-L-14")),
    "bert_base": (BERT, lambda: BertConfig().to_dict()),
    "llama_3_1_8b": (LLAMA, lambda: LlamaConfig(**LLAMA_3_1, **OF_8B).to_dict()),
    "llama_3_1_405b": (LLAMA, lambda: LlamaConfig(**LLAMA_3_1, **OF_405B).to_dict()),
    "mixtral_8x22b": (MIXTRAL, lambda: MixtralConfig(**OF_8X22B).to_dict()),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_field_is_what_the_library_says(name: str):
    architecture, described = ARCHITECTURES[name]
    config = shrunk(name, ())
    assert differences(config, architecture.settings(Theirs(name, described()))) == []
    assert describe_exactly(architecture, config)


@pytest.mark.parametrize(
    ("architecture", "library"),
    [(LLAMA, LlamaConfig), (MIXTRAL, MixtralConfig), (BERT, BertConfig), (WHISPER, WhisperConfig)],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", "")),
)
def test_what_a_config_leaves_out_has_the_librarys_default(architecture: Architecture, library: type):
    left_out, written_out = (architecture.settings(Theirs("", plain)) for plain in ({}, library().to_dict()))
    assert {path: setting.value for path, setting in left_out.items()} == {path: s.value for path, s in written_out.items()}


def test_what_open_clips_config_leaves_out():
    """By the tower that its defaults make."""
    with torch.device("meta"):
        theirs = CLIP(embed_dim=512, vision_cfg={}, text_cfg={})
    wanted = {path: setting.value for path, setting in OPEN_CLIP.settings(Theirs("", {})).items()}
    block = theirs.visual.transformer.resblocks[0]
    assert len(theirs.visual.transformer.resblocks) == wanted["image.layers"]
    assert (block.attn.num_heads, block.attn.embed_dim) == (wanted["image.n_heads"], wanted["image.dim"])
    assert (block.mlp.c_fc.out_features, block.ln_1.eps) == (wanted["image.ffn_dim"], wanted["image.norm_eps"])
    assert (theirs.visual.image_size[0], theirs.visual.patch_size[0]) == (wanted["image.size"], wanted["image.patch"])
    text = theirs.transformer.resblocks[0]
    assert (text.attn.num_heads, text.attn.embed_dim) == (wanted["transformer.n_heads"], wanted["transformer.dim"])
    assert (theirs.context_length, theirs.vocab_size) == (wanted["transformer.max_positions"], wanted["vocabulary"])
    assert isinstance(block.mlp.gelu, torch.nn.GELU) and wanted["image.activation"] == "gelu"
    preprocess = open_clip.transform.PreprocessCfg()
    assert (preprocess.mean, preprocess.std) == (wanted["image.mean"], wanted["image.std"])


IN_TRAINING = {"frozen", "init"}
WITHOUT_EFFECT = {
    LLAMA: {"fusion", "embedding_dim", "pool", "logit_scale_init", "logit_bias_init"},  # there are no levels, and no media
    BERT: {"fusion", "embedding_dim", "pool", "logit_scale_init", "logit_bias_init"}
    | {f"transformer.{name}" for name in ("rope_theta", "rope_scaling", "rope_sections")},
    OPEN_CLIP: {"logit_scale_init", "logit_bias_init", "image.resize", "image.merge", "image.stem_dims"}
    | {f"transformer.{name}" for name in ("rope_theta", "rope_scaling", "rope_sections")},
    WHISPER: {"audio.frames_per_token", "audio.pool"},  # of what stands behind the encoder
}
WITHOUT_EFFECT[MIXTRAL] = WITHOUT_EFFECT[LLAMA] | {"transformer.experts.bias_rate"}
SECTIONS = {
    LLAMA: {"": ModelConfig, "transformer.": TransformerConfig},
    MIXTRAL: {"": ModelConfig, "transformer.": TransformerConfig},
    BERT: {"": ModelConfig, "transformer.": TransformerConfig},
    OPEN_CLIP: {"": ModelConfig, "transformer.": TransformerConfig, "image.": ImageEncoderConfig},
    WHISPER: {"audio.": AudioEncoderConfig},
}


@pytest.mark.parametrize("architecture", SECTIONS, ids=lambda architecture: architecture.name)
def test_no_field_of_ours_is_forgotten(architecture: Architecture):
    """Every field is compared, or named here as one that changes no number: a new one must be thought about."""
    compared = architecture.settings(Theirs("", {}))
    for prefix, section in SECTIONS[architecture].items():
        for field in section.model_fields:
            path = prefix + field
            told = path in compared or any(name.startswith(f"{path}.") for name in compared)
            free = field in IN_TRAINING or path in WITHOUT_EFFECT[architecture]
            assert told != free, path


TREES = {
    "llama_3_1_8b": {
        "hidden_act": ("gelu", "transformer.activation is 'swiglu' here, and 'gelu' there (hidden_act)"),
        "rms_norm_eps": (1e-6, "transformer.norm_eps is 1e-05 here, and 1e-06 there (rms_norm_eps)"),
        "attention_bias": (True, "transformer.bias is False here, and [True, False] there (attention_bias, mlp_bias)"),
        "num_key_value_heads": (None, "transformer.n_kv_heads is 8 here, and 32 there (num_key_value_heads)"),
        "tie_word_embeddings": (True, "tie_embeddings is False here, and True there (tie_word_embeddings)"),
    },
    "bert_base": {
        "hidden_act": ("gelu_new", "transformer.activation is 'gelu' here, and 'gelu_new' there (hidden_act)"),
        "layer_norm_eps": (1e-5, "transformer.norm_eps is 1e-12 here, and 1e-05 there (layer_norm_eps)"),
        "num_attention_heads": (8, "transformer.n_heads is 12 here, and 8 there (num_attention_heads)"),
    },
    "mixtral_8x22b": {
        "num_attention_heads": (24, "transformer.n_heads is 48 here, and 24 there (num_attention_heads)"),
        "sliding_window": (4096, "transformer.window is none here, and 4096 there (sliding_window)"),
        "num_experts_per_tok": (1, "transformer.experts.top_k is 2 here, and 1 there (num_experts_per_tok)"),
    },
    "clip_vit_b32": {
        "quick_gelu": (True, "image.activation is 'gelu' here, and 'quick_gelu' there (quick_gelu)"),
        "text_cfg.heads": (4, "transformer.n_heads is 8 here, and 4 there (text_cfg.heads)"),
        "vision_cfg.head_width": (32, "image.n_heads is 12 here, and 24 there (vision_cfg.width / head_width)"),
        "preprocess_cfg.mean": ([0.5, 0.5, 0.5], "image.mean is "),
    },
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, changes in TREES.items() for key in changes])
def test_what_no_shape_shows_is_compared(name: str, key: str):
    architecture, described = ARCHITECTURES[name]
    value, line = TREES[name][key]
    found = differences(shrunk(name, ()), architecture.settings(Theirs("x", changed(described(), key, value))))
    assert found and found[0].startswith(line)


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("llama_3_1_8b", "rope_parameters.partial_rotary_factor", 0.5, "rope_parameters.partial_rotary_factor is 0.5"),
        ("llama_3_1_8b", "head_dim", 64, "head_dim is 64, and here it is to be hidden_size / num_attention_heads, 128"),
        ("llama_3_1_8b", "hidden_size", "4096", "hidden_size is '4096', and here it is to be a number"),
        ("llama_3_1_8b", "num_attention_heads", -1, "num_attention_heads is -1, and here it is to be a whole number"),
        ("llama_3_1_8b", "rope_parameters", [1], "rope_parameters is [1], and here it is to be an object"),
        ("bert_base", "is_decoder", True, "is_decoder is True, and here it is to be False"),
        ("bert_base", "position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("clip_vit_b32", "vision_cfg.ls_init_value", 1e-4, "vision_cfg.ls_init_value is 0.0001, and here it is to be left out"),
        ("clip_vit_b32", "vision_cfg.attentional_pool", True, "vision_cfg.attn_pooler_queries is none, and here it is to be 1"),
        ("clip_vit_b32", "text_cfg.pool_type", "last", "text_cfg.pool_type is 'last', and here it is to be argmax or eos"),
        ("clip_vit_b32", "text_cfg.no_causal_mask", True, "text_cfg.no_causal_mask is True"),
        ("clip_vit_b32", "multimodal_cfg", {"width": 512}, "multimodal_cfg is {'width': 512}"),
    ],
)
def test_what_ours_lacks_is_refused(name: str, key: str, value: object, said: str):
    architecture, described = ARCHITECTURES[name]
    with pytest.raises(UserError) as refused:
        architecture.settings(Theirs("config.json", changed(described(), key, value)))
    assert str(refused.value).startswith(f"config.json: {said}")


def changed(plain: dict, key: str, value: object) -> dict:
    above, _, last = key.rpartition(".")
    section = plain.setdefault(above, {}) if above else plain
    section[last] = value
    return plain


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("llama_3_1_8b", "transformer.qk_norm=true", "this model is no Llama: transformer.qk_norm is True here, and False there"),
        ("llama_3_1_8b", "levels=[backbone]", "this model is no Llama: levels is ['backbone'] here, and [] there"),
        ("mixtral_8x22b", "transformer.experts.balance=bias", "this model is no Mixtral: transformer.experts.balance is 'bias'"),
        ("bert_base", "transformer.norm_placement=pre", "this model is no BERT: transformer.norm_placement is 'pre'"),
        ("clip_vit_b32", "fusion=true", "this model is no CLIP: fusion is True here, and False there"),
        ("clip_vit_b32", "image.activation=quick_gelu", "this model is no CLIP: transformer.activation is 'gelu'"),
    ],
)
def test_other_models_are_not_exported(name: str, override: str, said: str):
    with pytest.raises(UserError) as refused:
        describe_exactly(ARCHITECTURES[name][0], shrunk(name, [override]))
    assert str(refused.value).startswith(said)


def test_all_architectures_are_tried():
    assert {*HUGGING_FACE.values(), OPEN_CLIP} == set(SECTIONS)
