"""One, two and four ranks, one and four micro-batches, gather and ring: the loss and every gradient are one process's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from pairs import SHARES, pair_batch
from ranks import on_ranks
from steps import ALONE, Toy, alter, assert_same_gradients, four_batches, take_step
from torch import Tensor

from mmpt.config import RunConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout
from mmpt.parallel.layout import Layout
from mmpt.parallel.mesh import World, make_mesh

Step = tuple[dict[str, float], dict[str, Tensor]]

Case = tuple[int, str, bool]  # micro-batches, exchange, grad_cache

CASES = [(accumulate, exchange, cached) for accumulate in (1, 4) for exchange in ("gather", "ring") for cached in (False, True)]
REAL_CASES = [(1, "gather", False), (4, "ring", False), (4, "gather", True)]
PACKS = 16  # of a step


def setting(config: RunConfig, exchange: str, cached: bool) -> RunConfig:
    return alter(config, objectives={"contrastive": {"exchange": exchange, "grad_cache": cached}})


def real_steps(config: RunConfig, world: World, cases: list[Case]) -> list[Step]:
    model = MultimodalModel(config.model).initialize(seed=0)
    apply_layout(model, config.train, world)
    batches = {count: four_batches(config, count, PACKS // count, world) for count in {case[0] for case in cases}}
    return [
        take_step(model, batches[accumulate], setting(config, exchange, cached), world, detailed=True)
        for accumulate, exchange, cached in cases
    ]


def toy_steps(config: RunConfig, world: World) -> list[Step]:
    """In fp64. All documents at once; then SHARES of them as micro-batches, which ranks share out in turn."""
    whole = [number for share in SHARES for number in share]
    each = [pair_batch(whole[world.rank :: world.size])], [pair_batch(share[world.rank :: world.size]) for share in SHARES]
    steps = []
    for accumulate, exchange, cached in CASES:
        figures, gradients = take_step(Toy(), each[accumulate > 1], setting(config, exchange, cached), world)
        if world.group is not None:
            for name in sorted(gradients):
                dist.all_reduce(gradients[name], group=world.group)
        del figures["grad_norm"]  # of this rank's part: nothing sums the gradients of a model that is not sharded before
        steps.append((figures, gradients))
    return steps


def body(config: RunConfig, toy_config: RunConfig) -> tuple[list[Step], list[Step]]:
    size, device = dist.get_world_size(), torch.device("cpu")
    world = World(rank=dist.get_rank(), size=size, device=device, mesh=make_mesh(Layout(dp_shard=size), device))
    return real_steps(config, world, REAL_CASES), toy_steps(toy_config, world)


@pytest.fixture
def configs(four_config: RunConfig, tiny_config: RunConfig) -> tuple[RunConfig, RunConfig]:
    """Four modalities, both levels, both losses, experts with an auxiliary loss; and a plain one for the toy."""
    sigmoid = {"contrastive": {"tower": {"loss": "sigmoid"}}}
    model = {"levels": ("backbone", "tower"), "logit_bias_init": -4.0, "transformer": {"experts": {"count": 4, "top_k": 2}}}
    return alter(four_config, model=model, objectives=sigmoid), alter(tiny_config, objectives=sigmoid)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_one_process(configs: tuple[RunConfig, RunConfig], size: int):
    """Contrast stays within a micro-batch of all ranks; with grad_cache, four of them are one. Figures are the same, too."""
    config, toy_config = configs
    real = real_steps(config, ALONE, [(1, "gather", False), (4, "gather", False)])
    toy_one, *_, toy_four, _, _, _ = toy_steps(toy_config, ALONE)
    for found, toy_found in on_ranks(size, body, config, toy_config):
        compare(REAL_CASES, found, real, gradients=1e-5, figures=2e-5)
        compare(CASES, toy_found, (toy_one, toy_four), gradients=1e-10, figures=1e-10)


def compare(cases: list[Case], steps: list[Step], expected: Sequence[Step], *, gradients: float, figures: float) -> None:
    """Steps against those of one process with one micro-batch and with four."""
    for (accumulate, exchange, cached), found in zip(cases, steps, strict=True):
        figures_then, gradients_then = expected[accumulate > 1 and not cached]
        assert_same_gradients(found[1], gradients_then, gradients)
        assert found[0] == pytest.approx(figures_then, rel=figures, abs=figures / 20), (accumulate, exchange, cached)
