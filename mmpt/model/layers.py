"""Layers with their gradients written by hand.

Torch composes each of these from many passes over memory, and keeps the result of every one.

Measured on two cores at 4,562 x 256 (benchmarks/NOTES.md): RMS norm 8.0 ms by torch, forward and backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight over the last axis. Keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "*rows dim"], weight: Float[Tensor, "#heads dim"], eps: float):
        wide = _widened(x)
        scale = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = _widened(x) * scale
        both = grad * normed
        grad_weight = both.sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        along = both.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad * weight).sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Float[Tensor, "*rows dim"], weight: Float[Tensor, "..."], eps: float) -> Float[Tensor, "*rows dim"]:
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in fp32 or wider. `weight` broadcasts against x."""
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return rms_norm(x, self.weight, self.eps)


class _Rotate(torch.autograd.Function):
    """Rotation is linear and its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def rotate(
    x: Float[Tensor, "T heads head_dim"], cos: Float[Tensor, "T 1 half"], sin: Float[Tensor, "T 1 half"]
) -> Float[Tensor, "T heads head_dim"]:
    """Turn the pairs (x[i], x[i + head_dim / 2]) by their angles (RoFormer, arXiv 2104.09864)."""
    return _Rotate.apply(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    turned_first, turned_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return out


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, where gate and up are the halves of one tensor. Keeps that tensor alone."""

    @staticmethod
    def forward(ctx, gate_up: Float[Tensor, "T two_hidden"]):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def swiglu(gate_up: Float[Tensor, "T two_hidden"]) -> Float[Tensor, "T hidden"]:
    """silu(first half) * second half (arXiv 2002.05202)."""
    return _SwiGLU.apply(gate_up)


def _widened(x: Tensor) -> Tensor:
    """In fp32 at least: arithmetic that mixes types runs many times slower on a CPU than a cast does."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
