"""Other implementations of causal attention over a ring, each a function of this rank's part of one document.

q, k, v, dout (heads, tokens, head_dim) of all tokens --take--> this rank's part, as the system wants it --run--> out, dq, dk, dv
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torchs

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Share(NamedTuple):
    """One rank's work: the tokens that are its own, what to run, and how results come back to (heads, tokens, head_dim)."""

    rows: Tensor
    run: Callable[[], Sequence[Tensor]]
    restore: Callable[[Tensor], Tensor]


def with_gradients(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], list[Tensor]]:
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def run() -> list[Tensor]:
        out = attend(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    return run


def one_process(heads: Sequence[Tensor]) -> Share:
    """torch's attention for all tokens, without a ring."""
    run = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *(x[None] for x in heads))
    return Share(torch.arange(heads[0].shape[1]), run, lambda x: x[0])


class _TorchRing(torch.autograd.Function):
    """The ring inside of torch's context parallelism, given the kernel for CPUs, which the public one refuses."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torchs._templated_ring_attention(dist.group.WORLD, 2, FORWARD, q, k, v, is_causal=True, dropout_p=0.0)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        names = ("query", "key", "value", "out", "logsumexp")
        saved = dict(zip(names, ctx.saved_tensors, strict=True))
        kinds = {"grad_out_name": "grad_out", "is_causal": True, "dropout_p": 0.0}
        return tuple(torchs._templated_ring_attention_backward(dist.group.WORLD, 2, BACKWARD, dout, **saved, **kinds)[:3])


def torch_ring(heads: Sequence[Tensor]) -> Share:
    """Tokens in two chunks a rank, one from each end; keys pass on by all-to-all."""
    torchs.set_rotate_method("alltoall")
    rank, size = dist.get_rank(), dist.get_world_size()
    chunks = torch.arange(heads[0].shape[1]).chunk(2 * size)
    rows = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
    return Share(rows, with_gradients(_TorchRing.apply, *(x[None, :, rows].contiguous() for x in heads)), lambda x: x[0])


def ring_attention_pytorch(heads: Sequence[Tensor]) -> Share | None:
    """lucidrains' ring in plain torch, striped by token; None where it is not installed."""
    if importlib.util.find_spec("ring_attention_pytorch") is None:
        return None
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    rank, size = dist.get_rank(), dist.get_world_size()
    rows = torch.arange(rank, heads[0].shape[1], size)
    kinds = {"causal": True, "bucket_size": 512, "ring_reduce_col": True, "striped_ring_attn": True, "ring_size": size}
    parts = (x[:, rows].transpose(0, 1)[None].contiguous() for x in heads)
    return Share(rows, with_gradients(lambda q, k, v: ring_flash_attn(q, k, v, **kinds), *parts), lambda x: x[0].transpose(0, 1))
