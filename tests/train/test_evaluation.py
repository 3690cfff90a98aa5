"""Evaluation in the loop on held-out splits of every kind."""

from pathlib import Path

import pytest

from mmpt.config import RunConfig
from mmpt.data.shards import ShardWriter
from mmpt.evaluate.zero_shot import evaluate_retrieval
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.mesh import join_world
from mmpt.train.evaluation import evaluate


def figures(config: RunConfig) -> dict[str, float]:
    with join_world() as world:
        return evaluate(MultimodalModel(config.model).initialize(seed=0), config, world)


def with_spec(config: RunConfig, path: Path) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"spec": str(path)})})


def test_the_loop_and_the_command_agree(tiny_config: RunConfig):
    found = figures(tiny_config)
    model = MultimodalModel(tiny_config.model).initialize(seed=0)
    result, _ = evaluate_retrieval(model, tiny_config, tiny_config.data.spec, "val", "cpu")
    for k in (1, 5, 10):
        assert found[f"retrieval/image_to_text/R@{k}"] == result.item_to_text.ties_won.recall[k]
        assert found[f"retrieval/text_to_image/R@{k}"] == result.text_to_item.ties_won.recall[k]
    assert 0 < found["val/next_token"] < 20


@pytest.mark.parametrize(("split", "expected"), [('{train: ":"}', set()), ('{train: ":", val: ":"}', {"val/next_token"})])
def test_without_a_split_or_without_pictures(tiny_config: RunConfig, tmp_path: Path, split: str, expected: set[str]):
    with ShardWriter(tmp_path, "words", samples_per_shard=8) as writer:
        for number in range(3):
            document = {"v": 1, "id": f"t{number}", "parts": [{"type": "text", "text": "a red disc"}], "meta": {}}
            writer.write(f"t{number}", document, {})
    spec = tmp_path / "words.yaml"
    shards = 'shards: {root: ".", pattern: "words-00000.tar"}'
    spec.write_text(f"version: 1\nname: words\nformat: interleaved\n{shards}\nsplit: {split}\n")
    assert figures(with_spec(tiny_config, spec)).keys() == expected
