"""Steps on packs of any mixture: what some rank may lack, and that all others then wait for.

seed --random_tastes, draw--> packs --one rank by itself; all ranks of a layout--> Difference
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmpt.config import RunConfig
from mmpt.parallel.layout import Layout, faults_of
from mmpt.parallel.mesh import World
from mmpt.types import IGNORE, MODALITIES
from mmpt.verify.mixes import draw, random_tastes
from mmpt.verify.ranks import on_ranks
from mmpt.verify.steps import Difference, Task, compare, micro_batches, outcome, world_of
from mmpt.verify.wall import Case, case

RANKS = 4
CASES = (
    case(dp_shard=4),
    case(ring=4),
    case(dp_shard=2, ring=2),
    case(ring=2, ulysses=2),
    case(ring=2, tp=2),
    case(dp_replicate=2, ring=2),
    case(dp_replicate=2, dp_shard=2),
    case(dp_shard=2, tp=2),
    case(ulysses=2, tp=2),
    case(dp_shard=2, ulysses=2),
)
"""What mixes take turns in."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mix `number` of a seed, in which case and of which family, and what came of it."""

    number: int
    case: Case
    family: str
    present: Mapping[str, Sequence[bool]]  # whether each rank's packs have a label, a pair, a picture, ...
    difference: Difference


def fuzz(families: Mapping[str, RunConfig], seed: int, *, at_once: int = RANKS, limit: float) -> Iterator[Mix]:
    """Mixes without end, `at_once` in one layout, then so many in the next.

    Raises Failed, in place of the mix, where a rank fails or a step takes more than `limit` seconds.
    """
    turns = [(name, chosen) for chosen in CASES for name in sorted(families) if not any(faults_of(chosen.layout, families[name]))]
    for run in range(2**31):
        family, chosen = turns[run % len(turns)]
        numbers = range(at_once * run, at_once * (run + 1))
        tasks = [task_of(chosen.of(families[family]), seed, number) for number in numbers]
        walk = on_ranks(RANKS, _differences, chosen.layout, tasks, limit=limit)
        for number, found in zip(numbers, walk, strict=True):
            (difference,) = [difference for difference, _ in found if difference]
            present = {name: tuple(has[name] for _, has in found) for name in found[0][1]}
            yield Mix(number=number, case=chosen, family=family, present=present, difference=difference)


def task_of(config: RunConfig, seed: int, number: int) -> Task:
    """One pack for each rank, or two."""
    chance = np.random.default_rng([seed, number])
    packs = RANKS * int(chance.integers(1, 3))
    data = config.data.model_copy(update={"packs_per_batch": packs})
    tastes = random_tastes(packs, chance)
    return Task(config=config.model_copy(update={"data": data}), tastes=tastes, seed=int(chance.integers(2**31)))


def _differences(layout: Layout, tasks: Sequence[Task]) -> Iterator[tuple[Difference | None, Mapping[str, bool]]]:
    """Of each task from what one rank makes of it by itself, which ranks take in turns; and what is present on this rank."""
    world, alone = world_of(layout), world_of(Layout())
    mine = {number: outcome(task, alone) for number, task in enumerate(tasks) if number % world.size == world.rank}
    for number, task in enumerate(tasks):
        found = outcome(task, world)
        yield compare(found, mine[number]) if number in mine else None, _present(task, world)


def _present(task: Task, world: World) -> dict[str, bool]:
    """What this rank's part of the step has, of all that the model reads."""
    (batch,) = micro_batches(task.config, draw(task.config, task.tastes, task.seed), world)
    media = {MODALITIES[modality]: bool(len(found.grid)) for modality, found in batch.media.items() if found.values.shape[1]}
    tokens = {"document": bool((batch.document_ids >= 0).any()), "label": bool((batch.labels != IGNORE).any())}
    return tokens | {"embedding": bool(len(batch.slots.pair))} | media
