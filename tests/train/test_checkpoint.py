"""Checkpoints from strangers, damaged ones, and those of another run."""

import json
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mmpt.config import RunConfig
from mmpt.data.loader import Loader
from mmpt.train.checkpoint import FORMAT, SafeReader, load_model, newest, read_state
from mmpt.train.loop import train
from mmpt.types import TrainState, UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by the first test that needs a run, for all of this file."""
    return {"folder": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def run(trained: dict[str, Path], tiny_config: RunConfig, tmp_path: Path) -> Path:
    """A copy of a finished run of four steps."""
    if "run" not in trained:
        trained["run"] = train(tiny_config, runs=trained["folder"])
    return Path(shutil.copytree(trained["run"], tmp_path / "tiny"))


class Exploit:
    """Pickled, a call of the function that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_the_metadata_does_not_run(run: Path, tmp_path: Path):
    evidence = tmp_path / "code ran"
    (newest(run) / ".metadata").write_bytes(pickle.dumps(Exploit(evidence)))
    with pytest.raises(UserError, match="which no checkpoint of mmpt holds: it was not loaded"):
        load_model(run)
    assert not evidence.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pickled_objects_beside_tensors_are_refused(run: Path, tmp_path: Path):
    """DCP stores what is no tensor as a pickle, and unpickles it on loading."""
    evidence = tmp_path / "code ran"
    shutil.rmtree(newest(run))
    checkpoint = run / "checkpoints" / "step-00000004"
    dcp.save({"model": {"weight": torch.zeros(2)}, "extra": Exploit(evidence)}, storage_writer=dcp.FileSystemWriter(checkpoint))
    evidence.unlink(missing_ok=True)
    with pytest.raises(UserError, match="BytesStorageMetadata, which no checkpoint of mmpt holds"):
        SafeReader(checkpoint)
    assert not evidence.exists()


def test_files_outside_the_checkpoint_are_refused(run: Path):
    metadata = pickle.loads((newest(run) / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../step-00000002/" + info.relative_path
    (newest(run) / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"the file '\.\./step-00000002/.*' lies outside it"):
        load_model(run)


@pytest.mark.parametrize("file", [".metadata", "state.json", "__0_0.distcp"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 8], lambda data: b"", None])
def test_damage_is_named(run: Path, file: str, damage):
    path = newest(run) / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"checkpoint .*step-00000004"):
        load_model(run)


def test_another_models_checkpoint_is_refused(run: Path):
    path = newest(run) / "state.json"
    state = json.loads(path.read_text())
    state["config"]["model"]["transformer"]["dim"] = 64
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"written by another config: model.transformer.dim was 64 and is 32"):
        load_model(run)


def test_a_checkpoint_of_another_format_is_refused(run: Path):
    path = newest(run) / "state.json"
    state = json.loads(path.read_text())
    for written in ({**state, "format": FORMAT + 1}, {name: value for name, value in state.items() if name != "format"}):
        path.write_text(json.dumps(written))
        with pytest.raises(UserError, match=r"its format is [13], and this version of mmpt reads 2; go on with the version that"):
            load_model(run)


def test_going_on_under_another_config_names_the_change(run: Path, tiny_config: RunConfig):
    faster = tiny_config.model_copy(update={"optimizer": tiny_config.optimizer.model_copy(update={"lr": 0.5})})
    with pytest.raises(UserError, match=r"optimizer.lr was 0.001 and is 0.5; set them back, or give the new run its own name"):
        train(faster, runs=run.parent)


def test_how_a_run_is_watched_may_change(run: Path, tiny_config: RunConfig):
    train_section = tiny_config.train.model_copy(update={"log_every": 3, "checkpoint_every": 1})
    assert train(tiny_config.model_copy(update={"train": train_section}), runs=run.parent) == run


def test_the_state_says_where_the_run_stood(run: Path):
    state, config = read_state(newest(run))
    assert state.step == 4 and state.samples > 0 and state.loader.packs_consumed == 16
    assert config["name"] == "tiny"


def test_states_of_strangers_are_one_line(tmp_path: Path, tiny_config: RunConfig):
    state = asdict(TrainState(step=1, loader=Loader(tiny_config, 0, 1).state, samples=1)) | {"config": {}, "format": FORMAT}

    def cursor(**changes: object) -> dict:
        return state | {"loader": state["loader"] | {"cursor": state["loader"]["cursor"] | changes}}

    place = {"position": 0, "consumed": 0, "weight": 1.0}
    hostile = [
        5,
        "x",
        cursor(sources=[]),
        cursor(pack=-1),
        cursor(pack="a"),
        cursor(sources={"tiny": place | {"position": 2**70}}),
    ]
    hostile += [cursor(sources={"tiny": place | {name: value}}) for name, value in (("position", 1.5), ("weight", -1))]
    for content in (*map(json.dumps, hostile), "[" * 100_000):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(UserError, match=r"state\.json does not read") as caught:
            read_state(tmp_path)
        assert "\n" not in str(caught.value)
    for content, told in (
        (cursor(pack=99), "no number 99"),
        (state | {"loader": state["loader"] | {"fingerprint": {}}}, "was not there"),
    ):
        (tmp_path / "state.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=told):
            next(iter(Loader(tiny_config, 0, 1, read_state(tmp_path)[0].loader)))
