"""Layouts that cannot be: one line with the numbers and the nearest that work, before any process group forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from steps import alter

from mmpt.config import RunConfig
from mmpt.parallel.layout import Layout, layout_of
from mmpt.train.loop import train
from mmpt.types import UserError


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """Eight heads over four of keys; four packs of 128 tokens a batch."""
    return alter(tiny_config, model={"transformer": {"n_heads": 8, "n_kv_heads": 4}})


def test_what_is_left_is_shards(config: RunConfig):
    assert layout_of(config, 1) == Layout()
    assert layout_of(config, 4) == Layout(dp_shard=4)
    assert layout_of(alter(config, parallel={"ring": 2, "ulysses": 2}), 8) == Layout(dp_shard=2, ring=2, ulysses=2)
    assert layout_of(alter(config, parallel={"dp_replicate": 2, "dp_shard": 1, "tp": 4}), 8) == Layout(dp_replicate=2, tp=4)


REFUSED = [
    (8, {"ring": 3, "tp": 2}, "dp_replicate 1 x dp_shard (the rest) x ring 3 x ulysses 1 x tp 2 wants a multiple of 6"),
    (8, {"dp_shard": 2, "ring": 2}, "dp_replicate 1 x dp_shard 2 x ring 2 x ulysses 1 x tp 1 wants 4 ranks, and there are 8"),
    (1, {"ring": 2}, "dp_replicate 1 x dp_shard (the rest) x ring 2 x ulysses 1 x tp 1 wants a multiple of 2"),
    (8, {"tp": 8}, "model.transformer.n_kv_heads 4 is not a multiple of ulysses 1 x tp 8"),
    (16, {"ulysses": 4, "tp": 4}, "model.transformer.n_heads 8 is not a multiple of ulysses 4 x tp 4; model.tran"),
    (8, {}, "data.packs_per_batch 4 is not a multiple of dp_replicate 1 x dp_shard 8"),
    (3, {"ring": 3}, "data.pack_tokens 128 is not a multiple of ring 3 x ulysses 1 x tp 1"),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "parallel", "reason"), REFUSED)
def test_a_refusal_has_the_numbers(config: RunConfig, ranks: int, parallel: dict, reason: str):
    with pytest.raises(UserError) as caught:
        layout_of(alter(config, parallel=parallel), ranks)
    message = str(caught.value)
    assert message.startswith(f"parallel: {reason}") and "\n" not in message
    assert " can be parallel: {" in message or " can: parallel: {" in message


def test_what_is_proposed_works_and_is_near(config: RunConfig):
    for ranks, parallel, nearest in (
        (8, {"tp": 8}, Layout(dp_shard=2, tp=4)),
        (8, {"dp_shard": 2, "ring": 2}, Layout(dp_shard=2, ring=2, tp=2)),
        (8, {"dp_replicate": 8}, Layout(dp_replicate=4, dp_shard=1, tp=2)),
    ):
        with pytest.raises(UserError, match=rf"{ranks} rank\(s\) can be parallel: ") as caught:
            layout_of(alter(config, parallel=parallel), ranks)
        assert f"can be parallel: {nearest} or " in str(caught.value)
        assert layout_of(alter(config, parallel=vars(nearest)), ranks) == nearest
    with pytest.raises(UserError, match=r"no layout of 5 can be; 4 can: parallel: \{dp_shard: 4\} or"):
        layout_of(config, 5)
    with pytest.raises(UserError, match=r"no layout of 30011 can be; 16384 can"):  # a prime: nothing is tried for long
        layout_of(alter(config, data={"packs_per_batch": 2**12}), 30011)


def test_a_window_and_narrow_layers(config: RunConfig):
    windowed = alter(config, model={"transformer": {"window": 16}})
    with pytest.raises(
        UserError, match=r"window 16 is for ranks that have all tokens of a pack, and ring 2 x ulysses 1 x tp 1 share"
    ):
        layout_of(alter(windowed, parallel={"ring": 2}), 2)
    assert layout_of(windowed, 2) == Layout(dp_shard=2)
    narrow = alter(config, model={"transformer": {"ffn_dim": 63}}, parallel={"tp": 2})
    with pytest.raises(UserError, match="ffn_dim 63 is not a multiple of tp 2"):
        layout_of(narrow, 2)
    assert layout_of(alter(narrow, model={"transformer": {"experts": {"count": 4, "top_k": 2}}}), 2) == Layout(tp=2)


def test_no_process_group_forms(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "6", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("ranks would wait for one another"))
    with pytest.raises(
        UserError, match=r"^parallel: data\.packs_per_batch 4 is not a multiple of dp_replicate 1 x dp_shard 6; no"
    ):
        train(config, runs=tmp_path)
    assert not any(tmp_path.iterdir())
