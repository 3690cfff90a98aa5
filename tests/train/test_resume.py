"""kill -9 at any step, run again: the final weights are those of a run that nobody stopped, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mmpt.config import RunConfig
from mmpt.train.checkpoint import load_model, newest
from mmpt.train.loop import train

STEPS = 9
LIMIT = 120  # seconds for one process: a hang is a failure


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """Accumulation, a loader process and augmentation: everything that a resume has to get right."""
    tree = tiny_config.model_dump()
    tree["data"] |= {"workers": 1, "augment": {"rotate": 20, "shift": 0.1, "color": 0.5, "grayscale": 0.3, "background": 0.5}}
    tree["train"] |= {"steps": STEPS, "accumulate": 2, "checkpoint_every": 2, "eval_every": 4, "precision": "auto"}
    return RunConfig.model_validate(tree)


def command(folder: Path, config: RunConfig) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return [sys.executable, "-m", "mmpt", "train", str(path)]


def run_and_kill(folder: Path, config: RunConfig, after_step: int) -> None:
    """Start a run and kill it with SIGKILL as soon as metrics.jsonl shows the step."""
    process = subprocess.Popen(command(folder, config), cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    log, deadline = folder / "runs" / config.name / "metrics.jsonl", time.monotonic() + LIMIT
    while f'"step": {after_step},' not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None, f"the run ended before step {after_step} with exit code {process.returncode}"
        assert time.monotonic() < deadline, f"step {after_step} did not come within {LIMIT} s"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=LIMIT)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run)[0].state_dict()


def test_killed_runs_end_in_the_same_bits(tmp_path: Path, config: RunConfig):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    subprocess.run(command(whole, config), cwd=whole, env=environment(), check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)
    run_and_kill(broken, config, after_step=1)  # before the first checkpoint
    run_and_kill(broken, config, after_step=5)  # between checkpoints
    subprocess.run(command(broken, config), cwd=broken, env=environment(), check=True, timeout=LIMIT, stdout=subprocess.DEVNULL)
    runs = [folder / "runs" / config.name for folder in (whole, broken)]
    expected, found = map(weights, runs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # Every step is logged once, with the same losses, whatever was logged by the runs that died.
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    trained = [[(line["step"], line["loss"]) for line in log if line["kind"] == "train"] for log in logs]
    assert trained[0] == trained[1] and [step for step, _ in trained[0]] == list(range(1, STEPS + 1))


def test_a_half_written_checkpoint_is_never_found(tmp_path: Path, tiny_config: RunConfig):
    run = train(tiny_config, runs=tmp_path)
    last = newest(run)
    (run / "checkpoints" / "step-00000099.tmp").mkdir()
    assert newest(run) == last
    assert last.name == "step-00000004"
    assert sorted(path.name for path in last.parent.iterdir()) == ["step-00000002", "step-00000004", "step-00000099.tmp"]
