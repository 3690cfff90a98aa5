import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.spec import load_spec
from mmpt.evaluate.gallery import gallery
from mmpt.evaluate.retrieval import retrieval
from mmpt.evaluate.zero_shot import evaluate_retrieval, retrieval_table, write_result
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import UserError


@pytest.fixture
def tiny_model(tiny_config: RunConfig) -> MultimodalModel:
    return MultimodalModel(tiny_config.model).initialize(seed=0)


def test_a_result_says_what_was_ranked_by_what(tiny_config: RunConfig, tiny_model: MultimodalModel, tmp_path: Path):
    spec = tiny_config.data.spec
    result, embeddings = evaluate_retrieval(tiny_model, tiny_config, spec, "val", "cpu")
    assert result.items == len(embeddings.items) > 5
    path = write_result(tmp_path, result, tiny_config, 40, spec, "val")
    assert path == tmp_path / "eval" / "retrieval-tiny-val.json"
    tree = json.loads(path.read_text())
    val, train = (Corpus.open(load_spec(spec), split) for split in ("val", "train"))
    assert tree["text_to_item"] == result.text_to_item.to_json()
    assert tree["checkpoint"] == {"run": "tiny", "step": 40}
    assert tree["evaluated_on"] == {"name": "tiny", "split": "val", "documents": len(val), "fingerprint": val.fingerprint}
    assert tree["trained_on"]["fingerprint"] == train.fingerprint != val.fingerprint
    assert tree["trained_on"]["spec"] == spec


def test_training_data_that_is_gone_is_still_named(tiny_config: RunConfig, tiny_model: MultimodalModel, tmp_path: Path):
    spec = tiny_config.data.spec
    result, _ = evaluate_retrieval(tiny_model, tiny_config, spec, "val", "cpu")
    moved = tiny_config.model_copy(update={"data": tiny_config.data.model_copy(update={"spec": str(tmp_path / "gone.yaml")})})
    tree = json.loads(write_result(tmp_path, result, moved, 40, spec, "val").read_text())
    assert tree["trained_on"] == {"spec": str(tmp_path / "gone.yaml"), "split": "train"}


def test_a_diverged_model_is_an_error_of_one_line(tiny_config: RunConfig, tiny_model: MultimodalModel):
    torch.nn.init.constant_(tiny_model.embedding_head.weight, torch.nan)
    with pytest.raises(UserError, match=r"split 'val': items\[0\] holds a value that is not finite"):
        evaluate_retrieval(tiny_model, tiny_config, tiny_config.data.spec, "val", "cpu")


def test_the_table_shows_chance_and_ties():
    result = retrieval(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4))
    console = Console(width=100)
    with console.capture() as shown:
        console.print(retrieval_table(result))
    lines = [line for line in shown.get().splitlines() if "%" in line]
    assert [line.count("100.0%") for line in lines] == [3, 2, 2, 3, 2, 2]
    assert ["chance" in line for line in lines] == [False, True, False] * 2
    assert "ties lost" in lines[2]


def test_the_gallery_shows_what_retrieval_counted(tiny_config: RunConfig, tiny_model: MultimodalModel):
    corpus = Corpus.open(load_spec(tiny_config.data.spec), "val")
    result, embeddings = evaluate_retrieval(tiny_model, tiny_config, tiny_config.data.spec, "val", "cpu")
    n = result.items
    examples = gallery(tiny_model, tiny_config, corpus, "val", embeddings, "cpu", count=n, top=5)
    for shown, direction in ((examples.pictures, result.item_to_text), (examples.names, result.text_to_item)):
        assert len(shown) == n
        for k in (1, 5):
            assert sum(example.rank <= k for example in shown) == pytest.approx(n * direction.ties_won.recall[k])
        for example in shown:
            right = [place for place, found in enumerate(example.found, start=1) if found.right]
            assert right == ([example.rank] if example.rank <= 5 else [])
            assert all(found.name == example.name and found.picture == example.picture for found in example.found if found.right)
            assert len(example.found) == min(5, n)
    assert examples == gallery(tiny_model, tiny_config, corpus, "val", embeddings, "cpu", count=n, top=5)
