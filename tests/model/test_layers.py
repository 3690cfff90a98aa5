"""Hand-written gradients against autograd's own, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.model.attention import rotary_angles
from mmpt.model.layers import rms_norm, rotate, swiglu


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


def test_swiglu_is_the_formula():
    def formula(x):
        gate, up = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    x = randn(5, 12)
    torch.testing.assert_close(swiglu(x), formula(x))
    assert_same_gradients(swiglu, formula, x)


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


def _pairs_by_hand(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
