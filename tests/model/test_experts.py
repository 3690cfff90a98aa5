"""Mixtures of experts against Mixtral's and DeepSeek-V3's in Hugging Face transformers, on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from mmpt.config import ExpertsConfig
from mmpt.model import experts as module
from mmpt.model.experts import Experts, Origin, grouped_linear
from mmpt.types import NOTHING

DIM, HIDDEN = 16, 24


def origin_of(tokens: int, packs: int = 1, valid: torch.Tensor | None = None, order: torch.Tensor | None = None) -> Origin:
    """Of packs of equal length; what is not valid is padding."""
    pack = torch.arange(tokens) // (tokens // packs)
    pack = pack if valid is None else torch.where(valid, pack, NOTHING)
    return Origin(pack if order is None else pack[order], packs, lambda counts: counts)


def make(dtype: torch.dtype = torch.float32, activation: str = "swiglu", **config) -> Experts:
    torch.manual_seed(0)
    experts = Experts(DIM, HIDDEN, ExpertsConfig(**config), activation=activation, bias=False)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return experts.to(dtype)


def assert_same_as(ours: Experts, theirs: torch.nn.Module, pairs: dict[str, list[torch.Tensor]], tokens: int = 50) -> None:
    """Outputs, and the gradients of the input and of all parameters; `pairs` has theirs for each of ours."""
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            rows = parameter.flatten(0, -2).split([len(other.flatten(0, -2)) for other in pairs[name]])
            for other, part in zip(pairs[name], rows, strict=True):
                other.copy_(part.view(other.shape))
    x = torch.randn(tokens, DIM, dtype=ours.down.dtype)
    upstream = torch.randn_like(x)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, load, _ = ours(mine, origin_of(tokens))
    expected = theirs(other[None])[0]
    out.backward(upstream)
    expected.backward(upstream)
    assert int(load.sum()) == tokens * ours.config.top_k
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    for name, parameter in ours.named_parameters():
        gradient = torch.cat([other.grad.flatten(0, -2) for other in pairs[name]])
        torch.testing.assert_close(parameter.grad.flatten(0, -2), gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "top_k"), [(4, 2), (8, 3), (3, 1), (2, 2)])
def test_equals_mixtral(count: int, top_k: int, dtype: torch.dtype):
    config = MixtralConfig(
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_local_experts=count,
        num_experts_per_tok=top_k,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    ours, theirs = make(dtype, count=count, top_k=top_k), MixtralSparseMoeBlock(config).to(dtype)
    experts = theirs.experts
    pairs = {"router.weight": [theirs.gate.weight], "gate_up": [experts.gate_up_proj], "down": [experts.down_proj]}
    assert_same_as(ours, theirs, pairs)


def test_equals_deepseek_v3():
    """Sigmoid scores, a choice that biases move, and shared experts."""
    config = DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
    )
    ours, theirs = make(count=6, top_k=2, shared=2, balance="bias"), DeepseekV3MoE(config)
    ours.bias.copy_(torch.linspace(-0.3, 0.3, 6))
    theirs.gate.e_score_correction_bias.copy_(ours.bias)
    shared = theirs.shared_experts
    pairs = {
        "router.weight": [theirs.gate.weight],
        "gate_up": [theirs.experts.gate_up_proj],
        "down": [theirs.experts.down_proj],
        "shared.gate.weight": [shared.gate_proj.weight],
        "shared.up.weight": [shared.up_proj.weight],
        "shared.down.weight": [shared.down_proj.weight],
    }
    assert_same_as(ours, theirs, pairs)


@given(
    packs=st.integers(1, 4), length=st.integers(1, 12), count=st.integers(2, 6), top_k=st.integers(1, 2), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_the_auxiliary_loss_of_each_pack_equals_mixtrals(packs, length, count, top_k, seed):
    """Also where tokens stand in another order than in the batch, and with padding; with the router's gradient."""
    ours = make(torch.float64, count=count, top_k=top_k)
    generator = torch.Generator().manual_seed(seed)
    total = packs * length
    x = torch.randn(total, DIM, dtype=torch.float64, generator=generator)
    valid = torch.rand(total, generator=generator) < 0.8
    order = torch.randperm(total, generator=generator)
    _, load, balance = ours(x[order], origin_of(total, packs, valid, order))
    weight = ours.router.weight
    expected = torch.zeros(packs, dtype=torch.float64)
    for pack in range(packs):
        rows = slice(pack * length, (pack + 1) * length)
        if valid[rows].any():
            logits = F.linear(x[rows], weight)
            expected[pack] = load_balancing_loss_func((logits,), count, top_k, valid[rows][None])
    torch.testing.assert_close(balance, expected, rtol=1e-6, atol=1e-6)
    assert int(load.sum()) == top_k * int(valid.sum())
    if valid.any():
        upstream = torch.randn(packs, dtype=torch.float64, generator=generator)
        (mine,) = torch.autograd.grad(balance, weight, upstream)
        (theirs,) = torch.autograd.grad(expected, weight, upstream)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_no_token_is_dropped_when_all_choose_one_expert():
    ours = make(count=4, top_k=1)
    x = torch.randn(30, DIM).abs()
    with torch.no_grad():
        ours.router.weight.zero_()[2] = 1.0
    out, load, _ = ours(x, origin_of(30))
    gate, up = F.linear(x, ours.gate_up[2]).chunk(2, dim=-1)
    torch.testing.assert_close(out, F.linear(F.silu(gate) * up, ours.down[2]))
    assert load.tolist() == [0, 0, 30, 0]
    out.sum().backward()
    for gradient in (ours.gate_up.grad, ours.down.grad):
        used = gradient.abs().amax((1, 2)) > 0
        assert used.tolist() == [False, False, True, False]


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "quick_gelu"])
def test_bf16_autocast_is_near_fp32_and_routes_in_fp32(activation: str):
    ours = make(count=4, top_k=2, activation=activation)
    x = torch.randn(64, DIM)
    out, load, balance = ours(x, origin_of(64))
    with torch.autocast("cpu", torch.bfloat16):
        narrow, narrow_load, narrow_balance = ours(x, origin_of(64))
    assert narrow.dtype == torch.bfloat16 and narrow_balance.dtype == torch.float32
    assert torch.equal(load, narrow_load) and torch.equal(balance, narrow_balance)
    torch.testing.assert_close(narrow.float(), out, rtol=0.05, atol=0.05)
    narrow.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "out"), [(16, 24), (8, 16)])
def test_the_grouped_kernel_equals_the_loop(dtype: torch.dtype, dim: int, out: int, monkeypatch: pytest.MonkeyPatch):
    counts = torch.tensor([3, 0, 5, 0, 1, 0])
    rows = torch.randn(9, dim).to(dtype).requires_grad_()
    weight = torch.randn(6, out, dim).to(dtype).requires_grad_()
    upstream = torch.randn(9, out).to(dtype)
    assert module._has_grouped_kernel(rows, weight) and not module._has_grouped_kernel(rows.double(), weight)
    kernel = grouped_linear(rows, weight, counts)
    gradients = torch.autograd.grad(kernel, (rows, weight), upstream)
    monkeypatch.setattr(module, "_has_grouped_kernel", lambda *_: False)
    loop = grouped_linear(rows, weight, counts)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(kernel, loop, **tolerance)
    for mine, other in zip(gradients, torch.autograd.grad(loop, (rows, weight), upstream), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
    assert (gradients[1][1] == 0).all()


def test_odd_widths_work_without_the_kernel():
    rows, weight = torch.randn(4, 5), torch.randn(2, 7, 5)
    assert not module._has_grouped_kernel(rows, weight)
    torch.testing.assert_close(grouped_linear(rows, weight, torch.tensor([1, 3]))[1:], rows[1:] @ weight[1].T)


def test_rebalancing_on_literal_numbers():
    """Mean load 4: above it the bias falls by the rate, below it rises, at it stays."""
    ours = make(count=4, top_k=1, balance="bias", bias_rate=0.5)
    ours.bias.zero_()
    ours.rebalance(torch.tensor([9, 4, 3, 0]))
    assert ours.bias.tolist() == [-0.5, 0.0, 0.5, 0.5]


def test_biases_even_out_a_skewed_router():
    ours = make(count=4, top_k=1, balance="bias", bias_rate=0.02)
    ours.bias.zero_()
    x = torch.randn(256, DIM)
    x[:, 0] = 3.0
    with torch.no_grad():
        ours.router.weight[1, 0] += 0.6
    loads = []
    for _ in range(60):
        _, load, balance = ours(x, origin_of(256))
        assert balance is None
        ours.rebalance(load)
        loads.append(load)
    assert loads[0].max() > 150 and loads[-1].max() < 90
