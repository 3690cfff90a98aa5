"""torchrun over gloo against a single process: the same command, config and global batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from steps import alter

from mmpt.config import RunConfig
from mmpt.train.checkpoint import load_model

LIMIT = 180  # seconds for a run: a hang is a failure


Log = list[dict]


def run(folder: Path, config: RunConfig, ranks: int) -> tuple[Log, dict[str, torch.Tensor]]:
    """Train in a folder of its own, or go on there; its logged steps and its final weights."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    subprocess.run(
        [sys.executable, *launch, "-m", "mmpt", "train", str(path)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        check=True,
        timeout=LIMIT,
        stdout=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in (folder / "runs" / config.name / "metrics.jsonl").read_text().splitlines()]
    return lines, load_model(folder / "runs" / config.name)[0].state_dict()


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """fp32, accumulation 2, evaluation in the loop; heads that two ranks can share."""
    train = {"steps": 6, "accumulate": 2, "eval_every": 3, "checkpoint_every": 3}
    return alter(tiny_config, train=train, data={"workers": 1}, model={"transformer": {"n_kv_heads": 2}})


def test_two_ranks_reach_the_losses_of_one(tmp_path: Path, config: RunConfig):
    """As two shards, or sharing each batch: as a ring, and from its checkpoint on with shared matrices."""
    one = run(tmp_path / "one", config, ranks=1)
    compare(run(tmp_path / "shards", config, ranks=2), one)
    ring = alter(config, parallel={"ring": 2})
    compare(run(tmp_path / "shared", ring, ranks=2), one)
    shutil.rmtree(tmp_path / "shared" / "runs" / config.name / "checkpoints" / "step-00000006")
    compare(run(tmp_path / "shared", alter(config, parallel={"tp": 2}), ranks=2), one)


def compare(found: tuple[Log, dict[str, torch.Tensor]], expected: tuple[Log, dict[str, torch.Tensor]]) -> None:
    """Steps sum in another order, so fp32 rounding remains, and grows a little with every step."""
    assert [(line["kind"], line["step"]) for line in found[0]] == [(line["kind"], line["step"]) for line in expected[0]]
    for first, second in zip(expected[0], found[0], strict=True):
        shared = [name for name in first if not name.startswith(("kind", "seconds", "samples_per", "loader"))]
        for name in shared:  # what is left out are clocks, and what the first rank has loaded
            assert second[name] == pytest.approx(first[name], rel=2e-5, abs=1e-6), (first["step"], name)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
