"""The feed-forward against those of Hugging Face transformers and open_clip on the same weights."""

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mmpt.model.feed_forward import FeedForward


def assert_same(ours: nn.Module, theirs: nn.Module, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Outputs and the gradients of the input and of every pair of (our parameter, theirs)."""
    x = torch.randn(7, 12, dtype=torch.float64)
    upstream = torch.randn(7, 12, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        copy = x.clone().requires_grad_()
        out = module(copy)
        out.backward(upstream)
        found.append((out, copy.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-12)
    assert len(pairs) == len(list(ours.parameters()))


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_equals_llamas(bias: bool):
    config = LlamaConfig(hidden_size=12, num_attention_heads=2, intermediate_size=20, mlp_bias=bias)
    ours, theirs = FeedForward(12, 20, activation="swiglu", bias=bias).double(), LlamaMLP(config).double()
    kinds = ["weight", "bias"] if bias else ["weight"]
    layers = [(ours.gate, theirs.gate_proj), (ours.up, theirs.up_proj), (ours.down, theirs.down_proj)]
    pairs = [(getattr(mine, kind), getattr(other, kind)) for mine, other in layers for kind in kinds]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    assert_same(ours, theirs, pairs)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_gelu_equals_clips(activation: str):
    theirs = nn.Sequential(
        nn.Linear(12, 20), QuickGELU() if activation == "quick_gelu" else nn.GELU(), nn.Linear(20, 12)
    ).double()
    ours = FeedForward(12, 20, activation=activation, bias=True).double()
    ours.up.load_state_dict(theirs[0].state_dict())
    ours.down.load_state_dict(theirs[2].state_dict())
    assert_same(ours, theirs, list(zip(ours.parameters(), theirs.parameters(), strict=True)))
