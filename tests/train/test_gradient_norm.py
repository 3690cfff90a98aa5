"""The norm of a gradient whose parts are cut over several meshes, some held by several ranks, is that of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from mmpt.train.clip import clip_gradients

SHAPES = [(7, 4), (8, 6), (5,), (1,), (6, 2), (3, 3)]


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def model_with(found: list[torch.Tensor]) -> nn.Module:
    model = nn.ParameterList(nn.Parameter(torch.zeros_like(gradient)) for gradient in found)
    for parameter, gradient in zip(model, found, strict=True):
        parameter.grad = gradient
    model.append(nn.Parameter(torch.zeros(2)))  # has no gradient
    return model


def clipped(bounds: list[float]) -> list[tuple[float, list[torch.Tensor]]]:
    """On four ranks: FSDP, HSDP, and blocks that tp cuts or holds, under FSDP as well."""
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shard"))
    flat = hybrid._flatten("all")
    ways: list[tuple[object, list[Placement]]] = [
        (flat, [Shard(0)]),
        (hybrid, [Shard(0), Shard(1)]),
        (hybrid, [Shard(0), Replicate()]),
        (flat, [Shard(0)]),
        (hybrid, [Replicate(), Shard(0)]),
        (hybrid, [Replicate(), Replicate()]),
    ]
    results = []
    for bound in bounds:
        parts = [distribute_tensor(g, mesh, way) for g, (mesh, way) in zip(gradients(torch.float64), ways, strict=True)]
        model = model_with(parts)
        norm = clip_gradients(model, bound, flat.get_group())
        results.append((norm, [parameter.grad.full_tensor() for parameter in model if parameter.grad is not None]))
    return results


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("bound", [0.5, 1e3])
def test_on_one_process(dtype: torch.dtype, tolerance: float, bound: float):
    found = gradients(dtype)
    model = model_with([gradient.clone() for gradient in found])
    expected = torch.cat([gradient.flatten() for gradient in found]).double().norm().item()
    assert clip_gradients(model, bound) == pytest.approx(expected, rel=tolerance)
    for parameter, gradient in zip(model, found, strict=False):
        torch.testing.assert_close(parameter.grad, gradient * min(1.0, bound / expected))


def test_on_four_ranks():
    found = gradients(torch.float64)
    expected = torch.cat([gradient.flatten() for gradient in found]).norm().item()
    bounds = [0.5, 1e3]
    for rank in on_ranks(4, clipped, bounds):
        for bound, (norm, parts) in zip(bounds, rank, strict=True):
            assert norm == pytest.approx(expected, rel=1e-14)
            for part, gradient in zip(parts, found, strict=True):
                torch.testing.assert_close(part, gradient * min(1.0, bound / expected), rtol=1e-14, atol=0)


def test_nothing_and_not_a_number():
    assert clip_gradients(nn.Linear(2, 2), 1.0) == 0.0
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.tensor([[math.inf]])
    assert clip_gradients(model, 1.0) == math.inf
    model.weight.grad = torch.tensor([[math.nan]])
    assert math.isnan(clip_gradients(model, 1.0))
