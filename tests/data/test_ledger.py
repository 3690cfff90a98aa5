from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from tasks import all_tasks

from mmpt.config import AugmentConfig, RunConfig
from mmpt.data.ledger import Layout, chase, entries, first_difference, read
from mmpt.data.loader import Loader
from mmpt.types import LoaderState, UserError

ALONE = Layout(world_size=1, workers=0)


def with_data(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def small(config: RunConfig) -> RunConfig:
    """Packs of two or three documents."""
    return with_data(config, pack_tokens=96, packs_per_batch=1, window=16, augment=AugmentConfig(rotate=10))


def test_a_run_killed_and_resumed_under_every_layout_reads_what_one_process_reads(
    four_config: RunConfig, four_data: Path, tmp_path: Path
):
    """World sizes 1, 2, 3, 4, 8 with 0, 1, 2, 4 workers each, killed after one to three steps; all tasks are in the mixture.

    A document's place in its pack tells where second texts were exchanged before it: it is part of every row.
    """
    layouts = []
    config = small(all_tasks(four_config, tmp_path, four_data / "four.yaml"))
    whole, chased = chase(config, seed=1, tell=lambda layout, first, last: layouts.append(layout))
    assert first_difference(whole, chased) is None and len(whole) > 20
    assert len(set(layouts)) == 20
    rows = [row for rows in whole for row in rows]
    assert len({row[0] for row in rows}) == len(rows) and len({row[1] for row in rows}) > len(rows) / 2
    assert [row[2:] for row in rows] == sorted(row[2:] for row in rows)


def test_a_difference_is_found():
    assert first_difference([[(1, 2, 3, 4)], [(1, 2, 3, 4)]], [[(1, 2, 3, 4)], [(1, 2, 3, 5)]]) == 1


def mixture(path: Path, **weights: float) -> Path:
    tree = yaml.safe_load((path / "both.yaml").read_text())
    for part in tree["mixture"]:
        part["weight"] = weights[Path(part["spec"]).stem]
    tree["mixture"] = [part for part in tree["mixture"] if part["weight"] is not None]
    (path / "changed.yaml").write_text(yaml.safe_dump(tree))
    return path / "changed.yaml"


def samples(ledger: list, first: int = 0) -> list[int]:
    return [row[0] for rows in ledger[first:] for row in rows]


def test_other_weights_go_on_without_a_repeat(four_config: RunConfig, tmp_path: Path):
    """Hashes are of source, key and epoch: none comes twice while an epoch of a source is drawn on."""
    config = small(four_config)
    first, state = read(config, 7, ALONE)
    changed = with_data(config, spec=str(mixture(tmp_path, four=1.0, tiny=5.0)))
    second, state = read(changed, 9, ALONE, state)
    third, _ = read(config, 6, ALONE, LoaderState.from_json(json.loads(json.dumps(asdict(state)))))
    seen = samples(first) + samples(second) + samples(third)
    assert len(seen) == len(set(seen))
    assert second != read(config, 16, ALONE)[0][7:]


def test_an_added_source_goes_on_without_a_repeat(four_config: RunConfig, tmp_path: Path):
    alone = with_data(small(four_config), spec=str(mixture(tmp_path, four=1.0, tiny=None)))
    first, state = read(alone, 7, ALONE)
    second, _ = read(small(four_config), 12, ALONE, state)
    seen = samples(first) + samples(second)
    assert len(seen) == len(set(seen)) and len(second[-1]) > 0


def test_a_source_that_was_taken_out_is_named(four_config: RunConfig, tmp_path: Path):
    _, state = read(small(four_config), 1, ALONE)
    with pytest.raises(UserError, match=r"source tiny was .*, is gone"):
        read(with_data(small(four_config), spec=str(mixture(tmp_path, four=1.0, tiny=None))), 1, ALONE, state)


def test_data_that_end_are_told(four_config: RunConfig, tmp_path: Path):
    path = mixture(tmp_path, four=1.0, tiny=1.0)
    tree = yaml.safe_load(path.read_text())
    tree["mixture"][0] |= {"max_epochs": 1, "on_exhausted": "stop"}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"the data ends after \d+ of 500 micro-batches"):
        read(with_data(small(four_config), spec=str(path)), 500, Layout(world_size=1, workers=1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_takes_the_same_steps_to_the_end_of_the_data(four_config: RunConfig, tmp_path: Path, world_size: int):
    path = mixture(tmp_path, four=1.0, tiny=1.0)
    tree = yaml.safe_load(path.read_text())
    for part in tree["mixture"]:
        part |= {"max_epochs": 1.5}
    path.write_text(yaml.safe_dump(tree))
    config = with_data(small(four_config), spec=str(path), packs_per_batch=6)
    ranks = [[entries(batch) for batch in Loader(config, rank, world_size)] for rank in range(world_size)]
    alone = [entries(batch) for batch in Loader(config, 0, 1)]
    assert {len(rank) for rank in ranks} == {len(alone)} and len(alone) > 2
    assert [[row for rows in step for row in rows] for step in zip(*ranks, strict=True)] == alone
    drawn = [row[0] for rows in alone for row in rows]
    assert len(drawn) == len(set(drawn)) <= 1.5 * (16 + 36)
