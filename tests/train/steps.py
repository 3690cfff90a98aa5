"""What a training step computes, made visible: its gradients by name, and a model small enough for fp64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from mmpt.config import RunConfig
from mmpt.data.loader import Loader
from mmpt.parallel.apply import splitter_of
from mmpt.parallel.mesh import World
from mmpt.train.step import train_step
from mmpt.types import Embeddings, ModelOutput, PackedBatch

ALONE = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


class Recorder(torch.optim.SGD):
    """Leaves the weights alone, and keeps a copy of every whole gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        super().__init__(model.parameters(), lr=0.0)

    def step(self, closure=None) -> None:
        self.seen = {
            self.names[id(p)]: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }


class Toy(nn.Module):
    """A table, two heads and an output layer, for batches of pairs; in fp64, unlike the embeddings of the real model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(levels=("backbone", "tower"))
        self.table, self.output = nn.Embedding(64, 6), nn.Linear(6, 11)
        self.heads = nn.ModuleDict({level: nn.Linear(6, 5, bias=False) for level in self.config.levels})
        self.log_scale = nn.ParameterDict({level: nn.Parameter(torch.tensor([1.5])) for level in self.config.levels})
        self.logit_bias = nn.ParameterDict({"tower": nn.Parameter(torch.tensor([-2.0]))})
        self.double()

    def forward(self, batch: PackedBatch) -> ModelOutput:
        hidden, pooled = self.table(batch.tokens), self.table(batch.slots.content % 64)
        embeddings = {}
        for level, head in self.heads.items():
            raw = head(pooled)
            bias = self.logit_bias.get(level)
            scale = self.log_scale[level].exp()
            embeddings[level] = Embeddings(
                vectors=F.normalize(raw, dim=-1), norms=raw.detach().norm(dim=-1), scale=scale, bias=bias
            )
        return ModelOutput(
            hidden=hidden,
            output_hidden=hidden,
            output_weight=self.output.weight.view_as(self.output.weight),
            output_bias=self.output.bias.view_as(self.output.bias),
            sentence_logits=None,
            embeddings=embeddings,
            routing=(),
        )

    def after_step(self, loads: torch.Tensor | None) -> None:
        pass


def alter(config: RunConfig, **sections: dict) -> RunConfig:
    """The config with settings of its sections replaced, two levels deep."""
    tree = config.model_dump()
    for name, settings in sections.items():
        for key, value in settings.items():
            tree[name][key] = {**tree[name][key], **value} if isinstance(value, dict) and tree[name][key] else value
    return RunConfig.model_validate(tree)


def four_batches(config: RunConfig, count: int, packs: int, world: World = ALONE) -> list[PackedBatch]:
    """The rank's first micro-batches of a run, of `packs` packs over all ranks."""
    finish = splitter_of(config.model, world)
    loader = Loader(
        alter(config, data={"packs_per_batch": packs}), rank=world.data_rank, world_size=world.data_size, finish=finish
    )
    return list(islice(loader, count))


def take_step(
    model: nn.Module, batches: Sequence[PackedBatch], config: RunConfig, world: World, **settings
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The figures and the gradients of one step, before clipping."""
    optimizer = Recorder(model)
    config = alter(config, optimizer={"clip_norm": 1e9})
    figures = train_step(model, optimizer, batches, 0, config, world, **{"detailed": False, **settings})
    return figures, optimizer.seen


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every gradient within `tolerance` of its own norm."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        distance, norm = (found[name] - gradient).norm(), gradient.norm()
        assert distance <= tolerance * norm + 1e-30, f"{name}: {distance / norm:.1e} of its norm {norm:.1e}"
