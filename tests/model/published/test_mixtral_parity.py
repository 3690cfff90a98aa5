"""Mixtral against transformers' on the same weights: logits, routing, its auxiliary loss layer by layer, every gradient."""

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
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mmpt.config import ModelConfig
from mmpt.model.convert import write_checkpoint
from mmpt.model.convert.llama import MIXTRAL
from mmpt.model.convert.rules import to_ours, to_theirs

LAYERS, EXPERTS, TOP_K, BALANCE = 2, 4, 2, 0.3
CONFIG = (
    "vocabulary=97",
    "transformer.dim=32",
    f"transformer.layers={LAYERS}",
    "transformer.n_heads=4",
    "transformer.n_kv_heads=2",
    "transformer.ffn_dim=48",
    f"transformer.experts.count={EXPERTS}",
)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
}

generator = torch.Generator().manual_seed(4)
PACKS = [[torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths] for lengths in ((9, 30), (2, 17, 8))]


@pytest.fixture(params=[None, 6], ids=["all", "window"])
def pair(request: pytest.FixtureRequest) -> tuple[ModelConfig, MixtralForCausalLM]:
    config = shrunk("mixtral_8x22b", (*CONFIG, f"transformer.window={request.param or 'null'}"))
    return config, randomized(MixtralForCausalLM(MixtralConfig(**SIZES, sliding_window=request.param)))


def test_logits_routing_losses_and_every_gradient(pair, tmp_path: Path):
    config, theirs = pair
    file_tensors(theirs, tmp_path)
    ours = built(config, model={"hf": str(tmp_path)})
    batch = packed(PACKS)
    output = ours(batch)
    logits = output.output_hidden @ output.output_weight.T
    expected = [[theirs(torch.tensor([document]), output_router_logits=True) for document in pack] for pack in PACKS]
    flat = [found for pack in expected for found in pack]
    for found, wanted in zip(rows_of(batch, logits), flat, strict=True):
        assert_near(found, wanted.logits[0], "logits")
    balance = 0.0
    for layer, routing in enumerate(output.routing):
        for number, pack in enumerate(expected):
            scores = torch.cat([found.router_logits[layer] for found in pack])
            wanted = load_balancing_loss_func((scores,), EXPERTS, TOP_K)
            assert_near(routing.balance[number], wanted, f"balance of layer {layer}")
            balance = balance + wanted
        chosen = torch.cat([found.router_logits[layer] for found in flat]).topk(TOP_K).indices
        assert routing.load.tolist() == chosen.flatten().bincount(minlength=EXPERTS).tolist()
    loss = F.cross_entropy(logits, batch.labels) + BALANCE * sum(routing.balance.sum() for routing in output.routing)
    documents = [torch.tensor(document) for pack in PACKS for document in pack]
    losses = [F.cross_entropy(f.logits[0, :-1], d[1:], reduction="sum") for f, d in zip(flat, documents, strict=True)]
    their_loss = torch.stack(losses).sum() / sum(len(document) - 1 for document in documents) + BALANCE * balance
    assert_near(loss, their_loss, "loss")
    loss.backward()
    their_loss.backward()
    assert_all_near(our_gradients(ours, MIXTRAL), their_gradients(theirs, tmp_path))


def test_files_come_back_to_the_byte(pair, tmp_path: Path):
    """The layout of published files, in which every expert stands by itself: read, written, and read by transformers."""
    config, theirs = pair
    (tmp_path / "out").mkdir()
    tensors = file_tensors(theirs, tmp_path / "in")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in tensors
    rules = MIXTRAL.rules(config)
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert_same_bytes(to_theirs(rules, to_ours(rules, halves)), halves)
    ours = built(config, transformer={"hf": str(tmp_path / "in")})
    write_checkpoint(ours, config, "hf", tmp_path / "out")
    assert_same_bytes(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    read = MixtralForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same_bytes(file_tensors(read, tmp_path / "again"), tensors)
    document = torch.tensor([PACKS[0][1]])
    with torch.no_grad():
        assert_near(read(document).logits, theirs(document).logits, "logits", 1e-6)
