"""One optimizer step of a family in one case, on one of its ranks, and how far it is from another.

tastes --draw--> packs of the step --this rank's, split--> micro-batches --train_step--> Outcome --compare--> Difference
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmpt.config import RunConfig
from mmpt.data.collate import PackEntry
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout, splitter_of
from mmpt.parallel.layout import Layout
from mmpt.parallel.mesh import World, make_mesh
from mmpt.train.optimizer import make_optimizer
from mmpt.train.step import train_step
from mmpt.types import PackedBatch
from mmpt.verify.mixes import Taste, batch_of, draw

Precision = Literal["fp64", "fp32"]
CPU = torch.device("cpu")
JITTER = 0.1  # deviation of what is added to biases and gains: at 0 and 1 some would hide where they are used twice
SMALL = 1e-6  # of the whole gradient: a parameter's that is smaller may be 0 but for rounding, and is measured against this
ROUNDING = 1e-3  # a gradient below this likewise: where one pair is contrasted with none, all that there is is rounding


@dataclass(frozen=True, kw_only=True)
class Task:
    """A step to take."""

    config: RunConfig
    tastes: Sequence[Taste]
    seed: int
    precision: Precision = "fp64"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step came to, the same on every rank."""

    figures: Mapping[str, float]
    gradients: Mapping[str, np.ndarray]  # whole and clipped, by parameter
    weights: Mapping[str, np.ndarray]  # after it, by parameter
    embeddings: Mapping[str, np.ndarray]  # of all slots in order, by level, with these weights


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two outcomes are apart; inf where one has what the other lacks."""

    losses: float  # the largest among all figures but grad_norm: relative above 1, absolute below
    grad_norm: float  # relative
    gradient: float  # the largest distance of a parameter's gradient, as a part of its norm
    parameter: str  # whose that is
    weights: float  # as `gradient`, of the weights after the step
    embeddings: float  # the largest distance of a slot's, whose length is 1

    @property
    def worst(self) -> float:
        return max(self.losses, self.grad_norm, self.gradient, self.weights, self.embeddings)


def world_of(layout: Layout) -> World:
    """This rank's place, in the process group that stands."""
    if layout.ranks == 1:
        return World(rank=0, size=1, device=CPU, mesh=None)
    return World(rank=dist.get_rank(), size=layout.ranks, device=CPU, mesh=make_mesh(layout, CPU))


def outcomes(layout: Layout, tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Of every task, on every rank."""
    world = world_of(layout)
    for task in tasks:
        yield outcome(task, world)


def differences(layout: Layout, tasks: Sequence[tuple[Task, Outcome]]) -> Iterator[Difference]:
    """Of every task from what is expected, on every rank: each compares what it has."""
    world = world_of(layout)
    for task, expected in tasks:
        yield compare(outcome(task, world), expected)


def outcome(task: Task, world: World) -> Outcome:
    """Take the step. Every rank of `world` calls it."""
    config = task.config
    model = make_model(task)
    apply_layout(model, config.train, world)
    optimizer = make_optimizer(model, config.optimizer)
    gradients: dict[str, np.ndarray] = {}
    optimizer.register_step_pre_hook(lambda *_: gradients.update(whole({name: p.grad for name, p in model.named_parameters()})))
    batches = micro_batches(config, draw(config, task.tastes, task.seed), world)
    figures = train_step(model, optimizer, batches, 0, config, world, detailed=True)
    weights = whole({name: parameter.detach() for name, parameter in model.named_parameters()})
    return Outcome(figures=figures, gradients=gradients, weights=weights, embeddings=whole_embeddings(model, batches, world))


def make_model(task: Task) -> MultimodalModel:
    model = MultimodalModel(task.config.model).initialize(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "scale" not in name:
                parameter += JITTER * torch.randn_like(parameter)
    return model.double() if task.precision == "fp64" else model


def micro_batches(config: RunConfig, packs: Sequence[Sequence[PackEntry]], world: World) -> list[PackedBatch]:
    """This rank's of the step, as its loader would make them: `finish` included."""
    size = config.data.packs_per_batch
    share = size // world.data_size
    split = splitter_of(config.model, world) or (lambda batch: batch)
    firsts = [start + world.data_rank * share for start in range(0, len(packs), size)]
    return [split(batch_of(config, packs[first : first + share])) for first in firsts]


def whole(tensors: Mapping[str, Tensor | None]) -> dict[str, np.ndarray]:
    """Copies of the tensors, of which FSDP and tp may have left each rank a part; of None nothing. Every rank calls it."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()).numpy()
        for name, tensor in present.items()
    }


@torch.no_grad()
def whole_embeddings(model: MultimodalModel, batches: Sequence[PackedBatch], world: World) -> dict[str, np.ndarray]:
    """Of all slots of a step, in the order of packs and slots; on every rank."""
    found = []
    for number, batch in enumerate(batches):
        slots = torch.arange(len(batch.slots.pair)) if batch.split is None else batch.split.slot_numbers
        vectors = {level: embeddings.vectors for level, embeddings in model(batch).embeddings.items()}
        found += [
            ((number, world.data_rank, slot), level, row.numpy())
            for level, rows in vectors.items()
            for slot, row in zip(slots.tolist(), rows, strict=True)
        ]
    everyone = [found]
    if world.group is not None:
        everyone *= world.size
        dist.all_gather_object(everyone, found, group=world.group)
    placed = sorted((row for rows in everyone for row in rows), key=lambda row: row[0])
    width = model.config.embedding_dim
    return {
        level: np.stack([np.zeros(width), *(row for _, of, row in placed if of == level)])[1:] for level in model.config.levels
    }


def compare(found: Outcome, expected: Outcome) -> Difference:
    gradients, weights = _distances(found.gradients, expected.gradients), _distances(found.weights, expected.weights)
    parameter = max(gradients, key=gradients.__getitem__, default="-")  # of none, where nothing is to be learned
    ours, theirs = _losses(found.figures), _losses(expected.figures)
    return Difference(
        losses=max(_apart(ours.get(name), theirs.get(name), 1.0) for name in ours | theirs),
        grad_norm=_apart(found.figures["grad_norm"], expected.figures["grad_norm"], ROUNDING),
        gradient=gradients.get(parameter, 0.0),
        parameter=parameter,
        weights=max(weights.values()),
        embeddings=max((_farthest(found.embeddings[level], rows) for level, rows in expected.embeddings.items()), default=0.0),
    )


def _losses(figures: Mapping[str, float]) -> dict[str, float]:
    """All but what is the layout's, and gradients that may be 0 but for rounding, with their cosine."""
    chosen = {name: value for name, value in figures.items() if not name.startswith(("grad_norm", "sequence/"))}
    norms = {name: value for name, value in chosen.items() if name.startswith("gradient/") and name != "gradient/cosine"}
    rounding = {name for name, norm in norms.items() if norm < ROUNDING}
    return {name: value for name, value in chosen.items() if name not in rounding | ({"gradient/cosine"} if rounding else set())}


def _distances(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """By name: how far an array is from what is expected, as a part of its norm; of one that is next to 0, of all of them."""
    least = max(SMALL * np.sqrt(sum(np.square(array).sum() for array in expected.values())), ROUNDING)
    apart = {}
    for name in found | expected:
        if name in found and name in expected and found[name].shape == expected[name].shape:
            norm = max(np.linalg.norm(expected[name]), least)
            apart[name] = _finite(np.linalg.norm(found[name] - expected[name]) / norm)
        else:
            apart[name] = float("inf")
    return apart


def _apart(found: float | None, expected: float | None, least: float) -> float:
    if found is None or expected is None:
        return float("inf")
    return _finite(abs(found - expected) / max(abs(expected), least))


def _farthest(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return _finite(np.linalg.norm(found - expected, axis=1).max(initial=0.0))


def _finite(number: float) -> float:
    """Or inf, which compares as a difference; not a number would pass for none."""
    return float("inf") if np.isnan(number) else float(number)
