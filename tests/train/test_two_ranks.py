"""torchrun with FSDP2 over gloo against a single process: the same command, config and global batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmpt.config import RunConfig
from mmpt.train.checkpoint import load_model

LIMIT = 180  # seconds for a run: a hang is a failure


def run(folder: Path, config: RunConfig, ranks: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train in a folder of its own; its logged steps and its final weights."""
    folder.mkdir()
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


def test_two_ranks_reach_the_losses_of_one(tmp_path: Path, tiny_config: RunConfig):
    """fp32, accumulation 2, evaluation in the loop. Steps sum in another order, so fp32 rounding remains, and grows a
    little with every step."""
    tree = tiny_config.model_dump()
    tree["train"] |= {"steps": 6, "accumulate": 2, "eval_every": 3}
    tree["data"] |= {"workers": 1}
    config = RunConfig.model_validate(tree)
    one_log, one = run(tmp_path / "one", config, ranks=1)
    two_log, two = run(tmp_path / "two", config, ranks=2)
    assert [(line["kind"], line["step"]) for line in one_log] == [(line["kind"], line["step"]) for line in two_log]
    for first, second in zip(one_log, two_log, strict=True):
        shared = [name for name in first if not name.startswith(("kind", "seconds", "samples_per", "loader"))]
        for name in shared:  # what is left out are clocks, and what the first rank has loaded
            assert second[name] == pytest.approx(first[name], rel=2e-5, abs=1e-6), (first["step"], name)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
