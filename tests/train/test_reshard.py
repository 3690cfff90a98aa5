"""A checkpoint is of no layout: written in one, read in another, every tensor is the same to the byte, the optimizer's too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from steps import ALONE, alter
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmpt.config import RunConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout
from mmpt.parallel.layout import Layout
from mmpt.parallel.mesh import World, make_mesh
from mmpt.train import checkpoint
from mmpt.train.optimizer import make_optimizer
from mmpt.types import LoaderState, PlanCursor, TrainState

FOUR = (
    Layout(dp_replicate=2, dp_shard=2),
    Layout(ring=2, ulysses=2),
    Layout(dp_shard=2, tp=2),
    Layout(dp_replicate=2, tp=2),
)
TWO = (Layout(dp_shard=2), Layout(tp=2))
STATE = TrainState(
    step=3, loader=LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0), samples=0
)

Tensors = dict[str, Tensor]


@pytest.fixture
def configs(four_config: RunConfig) -> dict[str, RunConfig]:
    """Every kind of parameter, and sizes that no number of ranks divides; with experts and without."""
    transformer = {"dim": 40, "layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 66, "norm": "layer", "bias": True}
    levels = {"levels": ("backbone", "tower"), "logit_bias_init": -4.0, "embedding_dim": 15, "tie_embeddings": False}
    dense = alter(four_config, model={"vocabulary": 301, "transformer": transformer, **levels})
    experts = {"count": 5, "top_k": 2, "shared": 1, "balance": "bias"}
    return {"dense": dense, "experts": alter(dense, model={"transformer": {"experts": experts}})}


def build(config: RunConfig, world: World, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = MultimodalModel(config.model).initialize(seed)
    for name, buffer in model.named_buffers():
        assert name.endswith("ffn.bias")
        buffer += seed
    apply_layout(model, config.train, world)
    return model, make_optimizer(model, config.optimizer)


def draw(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer state of a run in its midst, of one process."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            for tensor in (parameter, *optimizer.state[parameter].values()):
                tensor += torch.randn(tensor.shape, generator=generator)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """All of them, whole, by name."""
    found = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        found |= {f"{name}/{kind}": tensor for kind, tensor in optimizer.state[parameter].items()}
    return {name: whole(tensor) for name, tensor in found.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def differing(found: Tensors, expected: Tensors) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def read(run: Path, config: RunConfig, world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = build(config, world, seed=2)
    assert checkpoint.restore(checkpoint.newest(run), model, optimizer, config) == STATE
    return model, optimizer


def pass_on(layouts: list[Layout], origins: list[Path], folder: Path, configs: dict[str, RunConfig], expected: dict) -> dict:
    """Each layout reads two of the checkpoints, so that all are read, and writes one. What differed, by pairs."""
    device, wrong = torch.device("cpu"), {}
    for number, layout in enumerate(layouts):
        world = World(rank=dist.get_rank(), size=layout.ranks, device=device, mesh=make_mesh(layout, device))
        for kind, config in configs.items():
            for origin in {origins[number % len(origins)], origins[(number + len(layouts)) % len(origins)]}:
                model, optimizer = read(origin / kind, config, world)
                if names := differing(tensors_of(model, optimizer), expected[kind]):
                    wrong[f"{origin.name} -> {layout}, {kind}"] = names
            checkpoint.save(folder / str(layout) / kind, model, optimizer, STATE, config, world)
    return wrong


def test_layouts_read_one_another(configs: dict[str, RunConfig], tmp_path: Path):
    """One process -> layouts of four ranks -> those of two -> one process."""
    expected = {}
    for kind, config in configs.items():
        model, optimizer = build(config, ALONE, seed=0)
        draw(model, optimizer)
        expected[kind] = tensors_of(model, optimizer)
        checkpoint.save(tmp_path / "one" / kind, model, optimizer, STATE, config, ALONE)
        assert differing(tensors_of(*build(config, ALONE, seed=2)), expected[kind])  # what is compared does change
    origins = [tmp_path / "one"]
    for size, layouts in ((4, FOUR), (2, TWO)):
        folder = tmp_path / str(size)
        for wrong in on_ranks(size, pass_on, layouts, origins, folder, configs, expected):
            assert not wrong
        origins = [folder / str(layout) for layout in layouts]
    for origin in origins:
        for kind, config in configs.items():
            assert not differing(tensors_of(*read(origin / kind, config, ALONE)), expected[kind])
