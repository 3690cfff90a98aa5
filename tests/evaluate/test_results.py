import json
from pathlib import Path

import pytest
import yaml

from mmpt.config import RunConfig, parse
from mmpt.data.corpus import Corpus
from mmpt.data.spec import load_spec
from mmpt.evaluate.results import write_result
from mmpt.types import UserError


def written(run: Path, config: RunConfig, spec: str | Path, split: str = "val", **more) -> dict:
    path = write_result(run, "retrieval", {"R@1": 0.5}, config, 40, spec, split, **more)
    return {"path": path} | json.loads(path.read_text())


def with_data(config: RunConfig, **changes) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def test_a_result_says_what_was_measured_by_what(tiny_config: RunConfig, tmp_path: Path):
    spec = tiny_config.data.spec
    tree = written(tmp_path, tiny_config, spec, variant=("image", "tower"))
    assert tree["path"] == tmp_path / "eval" / "retrieval-tiny-val-image-tower.json"
    val, train = (Corpus.open(load_spec(spec), split) for split in ("val", "train"))
    assert (tree["kind"], tree["R@1"]) == ("retrieval", 0.5)
    assert tree["checkpoint"] == {"run": "tiny", "step": 40}
    assert tree["evaluated_on"] == {"name": "tiny", "split": "val", "documents": len(val), "fingerprint": val.fingerprint}
    assert tree["trained_on"]["fingerprint"] == train.fingerprint != val.fingerprint
    assert (tree["trained_on"]["spec"], tree["trained_on"]["name"]) == (spec, "tiny")


def test_every_source_of_a_mixture_is_named(four_config: RunConfig, tmp_path: Path):
    tree = written(tmp_path, four_config, four_config.data.spec, "train")
    assert tree["trained_on"]["name"] == "both"
    assert [source["name"] for source in tree["trained_on"]["sources"]] == ["four", "tiny"]
    assert tree["evaluated_on"]["sources"] == tree["trained_on"]["sources"]
    # Of the two sources, tiny alone has a split of this name.
    assert written(tmp_path, four_config, four_config.data.spec, "val")["evaluated_on"]["name"] == "tiny"
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        written(tmp_path, four_config, four_config.data.spec, "test")


def test_training_data_that_is_gone_is_still_named(tiny_config: RunConfig, tmp_path: Path):
    spec = tiny_config.data.spec
    gone = str(tmp_path / "gone.yaml")
    assert written(tmp_path, with_data(tiny_config, spec=gone), spec)["trained_on"] == {"spec": gone, "split": "train"}
    bare = tmp_path / "bare.yaml"  # the spec is there, its shards are not
    bare.write_text(yaml.safe_dump(yaml.safe_load(Path(spec).read_text()) | {"name": "bare"}))
    tree = written(tmp_path, with_data(tiny_config, spec=str(bare)), spec)
    assert tree["trained_on"] == {"spec": str(bare), "split": "train", "name": "bare"}


def test_published_weights_are_part_of_what_was_trained_on(tiny_config: RunConfig, tmp_path: Path):
    tree = tiny_config.model_dump(mode="json")
    tree["model"]["image"]["init"] = {"open_clip": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}
    tree["model"]["transformer"]["init"] = {"hf": "checkpoints/llama"}
    began = written(tmp_path, parse(tree, where="begun"), tiny_config.data.spec)["trained_on"]["init"]
    assert began == {
        "image": {"open_clip": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"},
        "transformer": {"hf": "checkpoints/llama"},
    }
