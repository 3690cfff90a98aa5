"""Llama against transformers' on the same weights: logits, loss, every gradient; packed documents against single ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from references import (
    assert_all_near,
    assert_near,
    assert_same_bytes,
    built,
    file_tensors,
    our_gradients,
    packed,
    randomized,
    rows_of,
    shrunk,
    their_gradients,
)
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mmpt.config import ModelConfig
from mmpt.model.convert import write_checkpoint
from mmpt.model.convert.llama import LLAMA
from mmpt.model.convert.rules import to_ours, to_theirs

TINY = (
    "vocabulary=97",
    "transformer.dim=32",
    "transformer.layers=2",
    "transformer.n_heads=4",
    "transformer.n_kv_heads=2",
    "transformer.ffn_dim=48",
)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
ROPE = {"rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn"}
VARIANTS = {
    "3.1": ((), {"rope_parameters": LLAMA3}),
    "tied, biases": (("tie_embeddings=true", "transformer.bias=true"),
                     {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "YaRN": (("transformer.rope_scaling={kind: yarn, factor: 8, original_positions: 64}",), {"rope_parameters": YARN}),
    "2": (("transformer.rope_scaling=null", "transformer.n_kv_heads=4"),
          {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
}  # fmt: skip

generator = torch.Generator().manual_seed(3)
PACKS = [[torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths] for lengths in ((5, 70, 1), (31, 12), (64,))]


@pytest.fixture(params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> tuple[ModelConfig, LlamaForCausalLM]:
    overrides, fields = VARIANTS[request.param]
    scaled = () if "rope_scaling" in " ".join(overrides) else ("transformer.rope_scaling.original_positions=64",)
    config = shrunk("llama_3_1_8b", (*TINY, "transformer.rope_theta=500", *scaled, *overrides))
    return config, randomized(LlamaForCausalLM(LlamaConfig(**SIZES | fields)))


def test_logits_loss_and_every_gradient(pair, tmp_path: Path):
    config, theirs = pair
    file_tensors(theirs, tmp_path)
    ours = built(config, model={"hf": str(tmp_path)})
    batch = packed(PACKS)
    output = ours(batch)
    logits = output.output_hidden @ output.output_weight.T
    expected = [theirs(torch.tensor([document])).logits[0] for pack in PACKS for document in pack]
    for found, wanted in zip(rows_of(batch, logits), expected, strict=True):
        assert_near(found, wanted, "logits")
    loss = F.cross_entropy(logits, batch.labels)
    documents = [torch.tensor(document) for pack in PACKS for document in pack]
    losses = [
        F.cross_entropy(rows[:-1], document[1:], reduction="sum") for rows, document in zip(expected, documents, strict=True)
    ]
    their_loss = torch.stack(losses).sum() / sum(len(document) - 1 for document in documents)
    assert_near(loss, their_loss, "loss")
    loss.backward()
    their_loss.backward()
    assert_all_near(our_gradients(ours, LLAMA), their_gradients(theirs, tmp_path))


def test_files_come_back_to_the_byte(pair, tmp_path: Path):
    """Theirs into ours and back, and ours, written, read by transformers, and written by it."""
    config, theirs = pair
    (tmp_path / "out").mkdir()
    tensors = file_tensors(theirs, tmp_path / "in")
    rules = LLAMA.rules(config)
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert_same_bytes(to_theirs(rules, to_ours(rules, halves)), halves)
    ours = built(config, transformer={"hf": str(tmp_path / "in")})
    write_checkpoint(ours, config, "hf", tmp_path / "out", {"max_position_embeddings": 4096})
    assert_same_bytes(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    read = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same_bytes(file_tensors(read, tmp_path / "again"), tensors)
    document = torch.tensor([PACKS[0][1]])
    with torch.no_grad():
        assert_near(read(document).logits, theirs(document).logits, "logits", 1e-6)


def test_a_model_of_more_modalities_begins_as_a_llama(tmp_path: Path):
    """Media see themselves, and rotary positions have three axes: neither changes what becomes of a text."""
    theirs = randomized(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)))
    file_tensors(theirs, tmp_path)
    more = (
        "transformer.rope_theta=500",
        "transformer.rope_scaling.original_positions=64",
        "transformer.mask=media",
        "transformer.rope_sections=[2,1,1]",
        "levels=[backbone]",
        "image={size: 16, patch: 8, dim: 16, layers: 1, n_heads: 1, ffn_dim: 16}",
    )
    ours = built(shrunk("llama_3_1_8b", (*TINY, *more)), transformer={"hf": str(tmp_path)})
    batch = packed(PACKS)
    output = ours(replace(batch, position_ids=batch.position_ids.expand(3, -1)))
    logits = rows_of(batch, output.output_hidden @ output.output_weight.T)
    documents = [document for pack in PACKS for document in pack]
    for found, document in zip(logits, documents, strict=True):
        assert_near(found, theirs(torch.tensor([document])).logits[0], "logits")
