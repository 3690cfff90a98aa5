"""Hand-written gradients against autograd's own, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transformer import QuickGELU
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mmpt.model.layers import LayerNorm, RMSNorm, gelu, make_norm, quick_gelu, rms_norm, rotate, swiglu
from mmpt.model.rotary import rotary_angles


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_same_gradients(ours, reference, *inputs) -> None:
    upstream = torch.randn_like(reference(*inputs))
    for mine, theirs in zip(
        torch.autograd.grad(ours(*inputs), inputs, upstream),
        torch.autograd.grad(reference(*inputs), inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@given(rows=st.integers(1, 5), dim=st.integers(1, 9), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_rms_norm_is_torchs(rows, dim, seed):
    x, weight = randn(rows, dim, seed=seed), randn(dim, seed=seed + 1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (dim,), weight, 1e-6))
    assert_same_gradients(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, (dim,), w, 1e-6), x, weight)


def test_rms_norm_with_a_weight_per_head():
    x, weight = randn(5, 3, 4), randn(3, 4, seed=1)
    assert_same_gradients(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, (4,), None, 1e-6) * w, x, weight)


def test_rms_norm_of_bf16_computes_in_fp32():
    x, weight = randn(6, 8).detach().bfloat16().requires_grad_(), randn(8, seed=1).detach().float()
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.rms_norm(x.float(), (8,), weight, 1e-6))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.dtype == torch.bfloat16


def test_layer_norm_is_torchs_and_computes_in_fp32():
    ours, theirs = LayerNorm(12, 1e-5), torch.nn.LayerNorm(12, eps=1e-5)
    with torch.no_grad():
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(parameter.normal_())
    x = randn(5, 12).detach().float().requires_grad_()
    assert_same_gradients(ours, theirs, x)
    narrow = x.detach().bfloat16()
    assert ours(narrow).dtype == torch.float32
    torch.testing.assert_close(ours(narrow), theirs(narrow.float()))


def test_make_norm_starts_as_the_plain_norm():
    x = torch.randn(3, 8)
    assert isinstance(make_norm("rms", 8, 1e-6), RMSNorm)
    torch.testing.assert_close(make_norm("rms", 8, 1e-6)(x), F.rms_norm(x, (8,), eps=1e-6))
    torch.testing.assert_close(make_norm("layer", 8, 1e-6)(x), F.layer_norm(x, (8,), eps=1e-6))


def test_gelu_is_torchs_exact_one():
    x = randn(5, 12)
    assert_same_gradients(gelu, torch.nn.GELU(), x)
    torch.testing.assert_close(gelu(x), x * torch.special.ndtr(x))


def test_quick_gelu_is_open_clips():
    x = (5 * randn(50, 12)).detach().requires_grad_()
    torch.testing.assert_close(quick_gelu(x), QuickGELU()(x))
    assert_same_gradients(quick_gelu, QuickGELU(), x)


def test_quick_gelu_of_bf16_is_as_near_as_bf16_can_be():
    x = (3 * randn(500, 8)).detach().bfloat16().requires_grad_()
    out = quick_gelu(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    wide = x.detach().double().requires_grad_()
    exact = QuickGELU()(wide)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), wide)
    assert out.dtype == gradient.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2e-2, atol=1e-2)


def test_swiglu_is_the_formula():
    def formula(x):
        gate, up = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    x = randn(5, 12)
    torch.testing.assert_close(swiglu(x), formula(x))
    assert_same_gradients(swiglu, formula, x)


def test_swiglu_of_two_tensors_is_that_of_their_halves():
    gate, up = randn(5, 6), randn(5, 6, seed=1)
    whole = torch.cat([gate, up], dim=-1)
    assert torch.equal(swiglu(gate, up), swiglu(whole))
    assert_same_gradients(swiglu, lambda gate, up: swiglu(torch.cat([gate, up], dim=-1)), gate, up)


@pytest.mark.parametrize("axes", [1, 2])
def test_rotation_is_complex_multiplication(axes):
    """Pair i of a head, taken as a complex number, turns by position * theta ** (-i / pairs); two axes share the pairs out."""
    positions = torch.tensor([[0, 1, 5], [7, 0, 2]])[:axes]
    cos, sin = (part.double() for part in rotary_angles(positions, head_dim=8, theta=100.0))
    x = randn(3, 2, 8)

    def reference(x):
        per_axis = 4 // axes
        frequency = 100.0 ** -(torch.arange(per_axis) / per_axis)
        angles = torch.cat([axis[:, None] * frequency for axis in positions.float()], dim=1)
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex128)
        return torch.cat([turned.real, turned.imag], dim=-1)

    torch.testing.assert_close(rotate(x, cos, sin), reference(x), rtol=1e-6, atol=1e-6)
    assert_same_gradients(lambda x: rotate(x, cos, sin), lambda x: _pairs_by_hand(x, cos, sin), x)


def test_rotation_is_hugging_faces():
    """Its pairs are x[i] and x[i + half]; cosine and sine stand twice in its angles."""
    q, k = randn(6, 4, 8), randn(6, 2, 8, seed=1)
    cos, sin = (part.double() for part in rotary_angles(torch.arange(6)[None], 8, 1e4))
    doubled = (cos[:, 0].repeat(1, 2), sin[:, 0].repeat(1, 2))
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *(x[None] for x in doubled))
    for mine, other in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(rotate(mine, cos, sin), other[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_rotation_passes_gradcheck_and_widens_bf16():
    x, angles = randn(3, 2, 6), randn(3, 1, 3, seed=1).detach()
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), x)
    narrow = x.detach().bfloat16().requires_grad_()
    cos, sin = angles.cos().float(), angles.sin().float()
    turned = rotate(narrow, cos, sin)
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned, rotate(narrow.float(), cos, sin))
    (gradient,) = torch.autograd.grad(turned.sum(), narrow)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("layer", ["rms_norm", "rotate", "swiglu", "swiglu of two", "quick_gelu"])
def test_what_a_compiler_is_given_is_the_same(layer: str, monkeypatch: pytest.MonkeyPatch):
    weight, angles = randn(8, seed=1), randn(3, 1, 4, seed=2).detach()
    call = {
        "rms_norm": lambda x: rms_norm(x, weight, 1e-6),
        "rotate": lambda x: rotate(x, angles.cos(), angles.sin()),
        "swiglu": swiglu,
        "swiglu of two": lambda x: swiglu(*x.unbind(1)),
        "quick_gelu": quick_gelu,
    }[layer]
    x = randn(3, 2, 8)
    by_hand = call(x)
    (gradient,) = torch.autograd.grad(by_hand.square().sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = call(x)
    torch.testing.assert_close(plain, by_hand)
    torch.testing.assert_close(torch.autograd.grad(plain.square().sum(), x)[0], gradient)


def _pairs_by_hand(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
