"""Layers with their gradients written by hand.

Torch composes each of these from many passes over memory, and keeps the result of every one. A compiler does neither: where one
is at work it is given the plain formula.

Measured on two cores at 4,562 x 256 (benchmarks/NOTES.md): RMS norm 8.0 ms by torch, forward and backward.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial


def widened(x: Tensor) -> Tensor:
    """In fp32 at least: arithmetic that mixes types runs many times slower on a CPU than a cast does."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def narrowed(x: Tensor) -> Tensor:
    """In the type of autocast, where that is on: what a product would make of it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def local(weight: Tensor) -> Tensor:
    """A weight as the rows of this rank meet it. Where ranks have copies and rows of their own, its gradient is their sum."""
    return weight.to_local(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight over the last axis. Keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "*rows dim"], weight: Float[Tensor, "#heads dim"], eps: float):
        wide = widened(x)
        scale = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = widened(x) * scale
        both = grad * normed
        grad_weight = both.sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        along = both.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad * weight).sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Float[Tensor, "*rows dim"], weight: Float[Tensor, "..."], eps: float) -> Float[Tensor, "*rows dim"]:
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in fp32 or wider. `weight` broadcasts against x."""
    if torch.compiler.is_compiling():
        wide = widened(x)
        return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return rms_norm(x, local(self.weight), self.eps)


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the last axis (arXiv 1607.06450), in fp32 or wider."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return F.layer_norm(widened(x), self.weight.shape, local(self.weight), local(self.bias), self.eps)


def make_norm(kind: Literal["rms", "layer"], dim: int, eps: float) -> RMSNorm | LayerNorm:
    return {"rms": RMSNorm, "layer": LayerNorm}[kind](dim, eps)


class _Rotate(torch.autograd.Function):
    """Rotation is linear and its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(widened(x), cos, sin)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin).to(ctx.dtype), None, None


def rotate(
    x: Float[Tensor, "T *heads head_dim"], cos: Float[Tensor, "T *#heads half"], sin: Float[Tensor, "T *#heads half"]
) -> Float[Tensor, "T *heads head_dim"]:
    """Turn the pairs (x[i], x[i + head_dim / 2]) by their angles (RoFormer, arXiv 2104.09864), in fp32 or wider."""
    if torch.compiler.is_compiling():
        first, second = widened(x).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return _Rotate.apply(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    turned_first, turned_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return out


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, of two tensors or of the halves of one. Keeps what it is given alone."""

    @staticmethod
    def forward(ctx, *given: Tensor):
        ctx.save_for_backward(*given)
        gate, up = _gate_and_up(given)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        given = ctx.saved_tensors
        out = tuple(torch.empty_like(x) for x in given)
        (gate, up), (grad_gate, grad_up) = _gate_and_up(given), _gate_and_up(out)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def _gate_and_up(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return given if len(given) == 2 else given[0].chunk(2, dim=-1)


def swiglu(*gate_up: Float[Tensor, "T _"]) -> Float[Tensor, "T hidden"]:
    """silu(gate) * up (arXiv 2002.05202), of two tensors, or of one with the gates in its first half."""
    if torch.compiler.is_compiling():
        gate, up = _gate_and_up(gate_up)
        return F.silu(gate) * up
    return _SwiGLU.apply(*gate_up)


def gelu(x: Float[Tensor, "T hidden"]) -> Float[Tensor, "T hidden"]:
    """x * Phi(x), exact (arXiv 1606.08415)."""
    return F.gelu(x)


class _QuickGELU(torch.autograd.Function):
    """silu(1.702 x) / 1.702, for which torch has fast kernels in both directions. Keeps x alone."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "T hidden"]):
        ctx.save_for_backward(x)
        return F.silu(x * 1.702, inplace=True).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        scaled = x * 1.702
        return torch.ops.aten.silu_backward.grad_input(grad, scaled, grad_input=scaled)


def quick_gelu(x: Float[Tensor, "T hidden"]) -> Float[Tensor, "T hidden"]:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    if torch.compiler.is_compiling():
        return x * (1.702 * x).sigmoid()
    return _QuickGELU.apply(x)
