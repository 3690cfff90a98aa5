"""What a run has read, step by step, in a form that can be compared: the proof that resuming repeats and loses nothing.

batches of all ranks --entries--> rows --by global micro-batch--> Ledger;   `chase`: killed, resumed elsewhere, killed, ...
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from mmpt.config import RunConfig
from mmpt.data.loader import Loader
from mmpt.data.plan import keyed_hash
from mmpt.types import LoaderState, PackedBatch, UserError

Row = tuple[int, int, int, int]
"""Hash of the sample's id, seed of its augmentation, pack, position of its first token in the pack."""

Ledger = list[list[Row]]
"""Rows of every global micro-batch, in the order of packs and positions."""

WORLD_SIZES, WORKERS = (1, 2, 3, 4, 8), (0, 1, 2, 4)


@dataclass(frozen=True)
class Layout:
    world_size: int
    workers: int


def entries(batch: PackedBatch) -> list[Row]:
    """A row for each document of a batch, or piece of one."""
    return [(keyed_hash(ref.source, ref.key, ref.epoch, ref.piece), ref.seed, ref.pack, ref.position) for ref in batch.provenance]


def read(config: RunConfig, steps: int, layout: Layout, state: LoaderState | None = None) -> tuple[Ledger, LoaderState]:
    """The ledger of the next `steps` micro-batches over all ranks of a layout, and the state after them.

    Each rank's loader is dropped with all that it has made ahead, as a kill would.
    """
    data = config.data.model_copy(update={"workers": layout.workers})
    ledger: Ledger = [[] for _ in range(steps)]
    states = []
    for rank in range(layout.world_size):
        batches = iter(Loader(config.model_copy(update={"data": data}), rank, layout.world_size, state))
        taken = list(islice(batches, steps))
        batches.close()
        if len(taken) < steps:
            raise UserError(f"the data ends after {len(taken)} of {steps} micro-batches; verify fewer")
        for rows, batch in zip(ledger, taken, strict=True):
            rows += entries(batch)
        states.append(taken[-1].state)
    assert all(other == states[0] for other in states), "ranks disagree on the state"
    return [sorted(rows, key=lambda row: row[2:]) for rows in ledger], states[0]


def chase(config: RunConfig, seed: int = 0, tell: Callable[[Layout, int, int], None] | None = None) -> tuple[Ledger, Ledger]:
    """Two ledgers that must be equal: of one process without interruption, and of a run that is killed after 1 to 3 steps
    and resumed under another layout, until it has been through all of WORLD_SIZES x WORKERS.

    The state goes through JSON, as in a checkpoint. `tell` hears each layout, its first step and its last.
    """
    settings = {"prefetch": 1, "prefetch_mib": 2**20}  # one rank alone has more in its batches than it may have in the run
    settings["packs_per_batch"] = math.lcm(*WORLD_SIZES, config.data.packs_per_batch)
    config = config.model_copy(update={"data": config.data.model_copy(update=settings)})
    chance = random.Random(seed)
    layouts = [Layout(world_size, workers) for world_size in WORLD_SIZES for workers in WORKERS]
    chance.shuffle(layouts)
    chased: Ledger = []
    state: LoaderState | None = None
    for layout in layouts:
        steps = chance.randint(1, 3)
        ledger, state = read(config, steps, layout, state)
        state = LoaderState.from_json(json.loads(json.dumps(asdict(state))))
        chased += ledger
        if tell:
            tell(layout, len(chased) - steps, len(chased))
    whole, _ = read(config, len(chased), Layout(world_size=1, workers=0))
    return whole, chased


def first_difference(one: Sequence[list[Row]], other: Sequence[list[Row]]) -> int | None:
    """The first micro-batch in which two ledgers differ; None for equal ones."""
    differing = (step for step, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    return next(differing, None)
