"""What benchmarks/ring.py --device runs on an accelerator, on a CPU: the simulated ring gives what one rank does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rings import random_heads

CPU = torch.device("cpu")


@pytest.fixture
def ring_kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import ring_kernels

    monkeypatch.setattr(ring_kernels, "HEAD_DIM", 8)
    return ring_kernels


@pytest.mark.parametrize("name", ["one document", "six documents"])
def test_a_simulated_ring_equals_one_rank(ring_kernels, name):
    lengths = ring_kernels.packs(256)[name]
    heads = random_heads(256, (4, 2))
    whole, shared = (ring_kernels.simulated(ring_kernels.whole_plan(lengths, ranks), heads) for ranks in (1, 4))
    for x, y in zip(shared, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_every_figure_of_a_device_is_there(ring_kernels):
    found = ring_kernels.figures(CPU, (512,))
    assert {name.split(",")[0] for name in found} == {"one document 512", "six documents 512"}
    assert all(value > 0 for row in found.values() for value in row.values())
    assert sum("share_of_one_call" in row for row in found.values()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_nothing_is_measured(ring_kernels):
    assert ring_kernels.main(torch.device("cuda")).startswith("not measured")
