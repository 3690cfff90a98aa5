"""A run of any kind goes on from its checkpoint to the same bits, also where some parameters never had a gradient."""

import shutil
from pathlib import Path

import pytest
import torch
from steps import alter

from mmpt.config import RunConfig
from mmpt.train.checkpoint import load_model, newest
from mmpt.train.loop import train

OFF = {"weight": 0.0}
VARIANTS = {
    "a bias that InfoNCE does not use": {"model": {"logit_bias_init": -5.0}},
    "a level without weight": {"model": {"levels": ("backbone", "tower")}, "objectives": {"contrastive": {"tower": OFF}}},
    "no contrast": {"objectives": {"contrastive": {"backbone": OFF}}},
    "frozen parts": {"model": {"transformer": {"frozen": True}, "image": {"frozen": True}}},
    "routing biases": {"model": {"transformer": {"experts": {"count": 4, "top_k": 2, "balance": "bias"}}}},
    "a classifier without pairs of texts": {"model": {"head": "bert", "token_types": 2}},
    "cached contrast": {"objectives": {"contrastive": {"grad_cache": True}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_goes_on_to_the_same_bits(tiny_config: RunConfig, tmp_path: Path, variant: str):
    steps = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 5, "accumulate": 2}
    config = alter(tiny_config, train=steps, **VARIANTS[variant])
    whole = train(config, runs=tmp_path / "whole")
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped" / config.name))
    shutil.rmtree(newest(stopped))
    train(config, runs=tmp_path / "stopped")
    expected, found = (load_model(run)[0].state_dict() for run in (whole, stopped))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
