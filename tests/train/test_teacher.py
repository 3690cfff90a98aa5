"""The teacher of a run: the checkpoint that it began with, and one that reads the same batches."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from steps import ALONE, alter, assert_same_gradients, four_batches, take_step

from mmpt.config import RunConfig
from mmpt.data.tokens import Tokenizer
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout
from mmpt.parallel.layout import Layout
from mmpt.parallel.mesh import World, make_mesh
from mmpt.train.checkpoint import load_model, newest, step_folder
from mmpt.train.loop import train
from mmpt.train.teacher import load_teacher
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


def taught_step(config: RunConfig, layout: Layout | None) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The first step of a student, its teacher laid out as it is."""
    device = torch.device("cpu")
    world = ALONE if layout is None else World(rank=dist.get_rank(), size=2, device=device, mesh=make_mesh(layout, device))
    teacher, _ = load_teacher(config, world, None)
    model = apply_layout(MultimodalModel(config.model).initialize(seed=1), config.train, world)
    return take_step(model, four_batches(config, 1, 4, world), config, world, teacher=teacher)


def taught_steps(config: RunConfig, layouts: list[Layout]) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    return [taught_step(config, layout) for layout in layouts]


@pytest.mark.parametrize("samples", [0, 3])
def test_a_teacher_is_laid_out_as_the_run(tiny_config: RunConfig, tmp_path: Path, samples: int):
    """Also where tokens are drawn: a token draws the same on every layout."""
    heads = alter(tiny_config, model={"transformer": {"n_kv_heads": 2}})
    wide = alter(heads, model={"transformer": {"dim": 48}}).model_copy(update={"name": "wide"})
    config = alter(student_of(train(wide, runs=tmp_path), heads), objectives={"distillation": {"samples": samples}})
    figures, gradients = taught_step(config, None)
    assert figures["loss/distillation"] > 0
    for steps in on_ranks(2, taught_steps, config, [Layout(dp_shard=2), Layout(ring=2), Layout(tp=2)]):
        for found, taught in steps:
            assert found["loss/distillation"] == pytest.approx(figures["loss/distillation"], rel=1e-5)
            assert_same_gradients(taught, gradients, 1e-4)


def test_a_teacher_that_does_not_fit_the_layout_is_refused(teacher: Path, tiny_config: RunConfig):
    """One head of keys; and batches are split for the mask of the run."""
    student = alter(student_of(teacher, tiny_config), model={"transformer": {"n_kv_heads": 2}})
    mesh = SimpleNamespace(shape=(1, 1, 1, 1, 2))
    with pytest.raises(UserError, match=r"its model\.transformer\.n_kv_heads 1 is not a multiple of ulysses 1 x tp 2"):
        load_teacher(student, World(rank=0, size=2, device=torch.device("cpu"), mesh=mesh), None)
    media = alter(student, model={"transformer": {"mask": "media"}})
    with pytest.raises(UserError, match=r"its model\.transformer\.mask is 'causal', and this run's is 'media'"):
        load_teacher(media, World(rank=0, size=2, device=torch.device("cpu"), mesh=mesh), None)
    assert load_teacher(media, ALONE, None)[1] == 4


def test_no_teacher_where_one_is_named(tiny_config: RunConfig, tmp_path: Path):
    with pytest.raises(UserError, match=r"objectives\.distillation\.teacher = .*nowhere: run .*no such folder"):
        train(student_of(tmp_path / "nowhere", tiny_config), runs=tmp_path)
