"""The teacher of a run: the checkpoint that it began with, and one that reads the same batches."""

import shutil
from pathlib import Path

import pytest
import torch
from steps import alter

from mmpt.config import RunConfig
from mmpt.data.tokens import Tokenizer
from mmpt.train.checkpoint import load_model, newest, step_folder
from mmpt.train.loop import train
from mmpt.types import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def teacher(runs: Path, tiny_config: RunConfig) -> Path:
    """A run of four steps with checkpoints of steps 2 and 4."""
    config = tiny_config.model_copy(update={"name": "teacher"})
    return runs / "teacher" if (runs / "teacher").exists() else train(config, runs=runs)


def student_of(teacher: Path, config: RunConfig, **changes: object) -> RunConfig:
    taught = {"distillation": {"teacher": str(teacher), "samples": 3}}
    steps = {"steps": 4, "checkpoint_every": 2}
    return alter(config, objectives=taught, train=steps, **changes).model_copy(update={"name": "student"})


def test_a_run_goes_on_with_the_checkpoint_that_taught_it(teacher: Path, tiny_config: RunConfig, tmp_path: Path):
    """The teacher learned on between stop and resume: its newer checkpoint is not taken."""
    still = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    newer = Path(shutil.move(step_folder(still, 4), tmp_path / "newer"))
    config = student_of(still, tiny_config)
    whole = train(config, runs=tmp_path / "whole")
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped" / "student"))
    shutil.rmtree(newest(stopped))
    shutil.move(newer, step_folder(still, 4))
    train(config, runs=tmp_path / "stopped")
    expected, found = (load_model(run)[0].state_dict() for run in (whole, stopped))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    shutil.rmtree(newest(stopped))
    shutil.rmtree(step_folder(still, 2))
    with pytest.raises(UserError, match=r"objectives\.distillation\.teacher = .*its checkpoint of step 2 is gone"):
        train(config, runs=tmp_path / "stopped")


def test_a_teacher_of_another_tokenizer_is_refused(teacher: Path, tiny_config: RunConfig, tmp_path: Path):
    Tokenizer.train(["other words " * 20, "and yet others"], vocabulary=290).save(tmp_path / "tokenizer.json")
    config = student_of(teacher, tiny_config, data={"tokenizer": str(tmp_path / "tokenizer.json")})
    with pytest.raises(UserError, match="learned with another tokenizer"):
        train(config, runs=tmp_path)


def test_a_teacher_of_shorter_texts_is_refused(tiny_config: RunConfig, tmp_path: Path):
    short = alter(tiny_config, model={"transformer": {"positions": "learned", "max_positions": 16}}, train={"steps": 1})
    teacher = train(short, runs=tmp_path)
    with pytest.raises(UserError, match="it has 16 positions, and this run's documents up to 128 tokens"):
        train(student_of(teacher, tiny_config), runs=tmp_path)


def test_a_teacher_of_other_patches_is_refused(teacher: Path, tiny_config: RunConfig, tmp_path: Path):
    config = student_of(teacher, tiny_config, model={"image": {"merge": 1}})
    with pytest.raises(UserError, match=r"its model\.image\.merge is 2, and this run's is 1"):
        train(config, runs=tmp_path)


def test_no_teacher_where_one_is_named(tiny_config: RunConfig, tmp_path: Path):
    with pytest.raises(UserError, match=r"objectives\.distillation\.teacher = .*nowhere: run .*no such folder"):
        train(student_of(tmp_path / "nowhere", tiny_config), runs=tmp_path)
