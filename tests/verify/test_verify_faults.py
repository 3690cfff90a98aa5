"""That the wall fails where a layout is wrong, and that the command says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt import cli
from mmpt.config import RunConfig, load
from mmpt.parallel.layout import Layout
from mmpt.parallel.mesh import World
from mmpt.parallel.sequence import Splitter
from mmpt.train import step
from mmpt.types import IGNORE, PackedBatch
from mmpt.verify import steps, table, wall
from mmpt.verify.families import families
from mmpt.verify.mixes import TASTES
from mmpt.verify.ranks import on_ranks
from mmpt.verify.steps import Difference, Outcome, Task, compare, outcomes
from mmpt.verify.table import SEED, TOLERANCE
from mmpt.verify.wall import Case, case

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
LIMIT = 60.0


@pytest.fixture(scope="module")
def small() -> dict[str, RunConfig]:
    return families(load(DEMO))


# Mutations: each is a fault that real systems have had, and every one must show.


def shift_labels_after_the_split(batch: PackedBatch, splitter: Splitter) -> PackedBatch:
    """torchtitan #4544: a rank's last token, and every one before a gap, is to say what does not follow it."""
    unshifted = torch.cat([batch.labels.new_full((1,), IGNORE), batch.labels[:-1]])
    split = splitter(replace(batch, labels=unshifted))
    return replace(split, labels=torch.cat([split.labels[1:], split.labels.new_full((1,), IGNORE)]))


def count_positions_after_the_split(batch: PackedBatch, splitter: Splitter) -> PackedBatch:
    split = splitter(batch)
    return replace(split, position_ids=torch.arange(len(split.tokens)).expand_as(split.position_ids))


def count_on_one_rank(batch: PackedBatch, splitter: Splitter) -> PackedBatch:
    """torchtitan #3111: losses are divided by what this rank has."""
    of_step = step.global_counts
    step.global_counts = lambda batches, group: of_step(batches, None)
    return splitter(batch)


def keep_media_apart(batch: PackedBatch, splitter: Splitter) -> PackedBatch:
    """Tokens show the features that this rank made, whichever theirs are."""
    split = splitter(batch)
    route = split.split.features
    own = torch.arange(sum(route.receive_sizes)) % max(len(split.images.grid), 1)
    sizes = tuple(sum(route.receive_sizes) if part == split.split.part else 0 for part in range(split.split.parts))
    alone = replace(route, send=own, send_sizes=sizes, receive_sizes=sizes)
    return replace(split, split=replace(split.split, features=alone))


Mutation = Callable[[PackedBatch, Splitter], PackedBatch]


def mutated(layout: Layout, tasks: Sequence[tuple[Task, Outcome]], mutation: Mutation) -> Iterator[Difference]:
    """As `differences`, with a fault put in, and taken out again."""
    splitter_of, counts = steps.splitter_of, step.global_counts

    def faulty(model, world: World) -> Callable[[PackedBatch], PackedBatch]:
        return lambda batch: mutation(batch, splitter_of(model, world))

    steps.splitter_of = faulty
    try:
        yield from steps.differences(layout, tasks)
    finally:
        steps.splitter_of, step.global_counts = splitter_of, counts


@pytest.mark.parametrize(
    ("mutation", "family"),
    [
        (shift_labels_after_the_split, "Llama"),
        (count_positions_after_the_split, "Llama"),
        (count_on_one_rank, "Llama"),
        (keep_media_apart, "demo"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_fails_the_wall(small: dict[str, RunConfig], mutation: Mutation, family: str):
    chosen = case(ring=2)
    task = Task(config=chosen.of(small[family]), tastes=TASTES, seed=SEED)
    ((expected,),) = on_ranks(1, outcomes, Layout(), [task], limit=LIMIT)
    (found,) = on_ranks(2, mutated, chosen.layout, [(task, expected)], mutation, limit=LIMIT)
    assert max(one.gradient for one in found) > 1e-3
    (healthy,) = on_ranks(2, steps.differences, chosen.layout, [(task, expected)], limit=LIMIT)
    assert max(one.worst for one in healthy) < TOLERANCE["fp64"]


def test_what_is_missing_or_no_number_is_a_difference():
    one = np.ones(3)
    whole = Outcome(
        figures={"loss": 1.0, "grad_norm": 2.0}, gradients={"a": one}, weights={"a": one}, embeddings={"b": one[None]}
    )
    assert compare(whole, whole).worst == 0
    nan = one * float("nan")
    for other in (
        replace(whole, gradients={}),
        replace(whole, gradients={"a": nan}),
        replace(whole, weights={"a": one[:2]}),
        replace(whole, figures={"grad_norm": 2.0}),
        replace(whole, figures={"loss": float("nan"), "grad_norm": 2.0}),
        replace(whole, embeddings={"b": nan[None]}),
    ):
        assert compare(other, whole).worst == float("inf")
    assert compare(replace(whole, figures={**whole.figures, "sequence/remote": 0.5}), whole).worst == 0


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One family in one layout."""
    monkeypatch.setattr(wall, "WALL", (Case(layout=Layout(dp_shard=2)),))
    monkeypatch.setattr("mmpt.verify.families.FAMILIES", {})


def test_the_command_prints_a_table(short: None, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", str(DEMO), "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 shards" in out and "equal" in out and "1 steps, all equal to one rank's" in out


def test_the_command_ends_in_1_where_a_layout_differs(short: None, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(table, "TOLERANCE", {"fp64": 0.0, "fp32": 0.0})
    assert cli.main(["verify", str(DEMO), "--ranks", "2"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT" in out and "1 of 1 steps DIFFER from one rank's" in out and "demo, 2 shards: fp64" in out
