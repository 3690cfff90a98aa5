"""Evaluation in the loop on held-out splits of every kind."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import four_document
from ranks import on_ranks
from steps import ALONE, alter, four_batches

from mmpt.config import RunConfig
from mmpt.data.shards import ShardWriter
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import evaluating
from mmpt.evaluate.zero_shot import evaluate_retrieval
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout, splitter_of
from mmpt.parallel.layout import Layout
from mmpt.parallel.mesh import World, join_world, make_mesh
from mmpt.train.evaluation import WholeBatches, evaluate


def figures(config: RunConfig) -> dict[str, float]:
    with join_world(config) as world:
        return evaluate(MultimodalModel(config.model).initialize(seed=0), config, world)


def with_spec(config: RunConfig, path: Path) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"spec": str(path)})})


def test_the_loop_and_the_command_agree(tiny_config: RunConfig):
    found = figures(tiny_config)
    model = MultimodalModel(tiny_config.model).initialize(seed=0)
    result = evaluate_retrieval(model, tiny_config, tiny_config.data.spec, "val", "cpu").result
    for k in (1, 5, 10):
        assert found[f"retrieval/backbone/image_to_text/R@{k}"] == result.item_to_text.ties_won.recall[k]
        assert found[f"retrieval/backbone/text_to_image/R@{k}"] == result.text_to_item.ties_won.recall[k]
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


def test_every_held_out_split_of_a_mixture_is_evaluated(tiny_config: RunConfig, tiny_data: Path, tmp_path: Path):
    other = (
        (tiny_data / "tiny.yaml").read_text().replace("name: tiny", "name: other").replace('root: "."', f'root: "{tiny_data}"')
    )
    (tmp_path / "other.yaml").write_text(other)
    parts = f"[{{spec: {tiny_data / 'tiny.yaml'}, weight: 1}}, {{spec: other.yaml, weight: 1}}]"
    (tmp_path / "both.yaml").write_text(f"version: 1\nname: both\nmixture: {parts}\n")
    alone, both = figures(tiny_config), figures(with_spec(tiny_config, tmp_path / "both.yaml"))
    assert both == {f"{source}/{name}": value for source in ("tiny", "other") for name, value in alone.items()}


def test_each_task_has_a_loss_of_its_own_and_retrieval_is_measured_once(
    four_config: RunConfig, four_data: Path, tiny_data: Path, tmp_path: Path
):
    """One corpus under two tasks, its documents showing pictures, sounds and clips."""
    texts = [part["text"] for number in range(16) for part in four_document(number)[0]["parts"] if part["type"] == "text"]
    Tokenizer.train(texts, vocabulary=290, sentinels=8).save(tmp_path / "tokenizer.json")
    spec = (four_data / "four.yaml").read_text().replace('root: "."', f'root: "{four_data}"')
    (tmp_path / "four.yaml").write_text(spec.replace('split: {train: ":"}', 'split: {train: ":", val: "0:1"}'))
    parts = "[{spec: four.yaml, weight: 1}, {spec: four.yaml, weight: 1, task: span}]"
    (tmp_path / "both.yaml").write_text(f"version: 1\nname: both\nmixture: {parts}\n")
    data = {"spec": str(tmp_path / "both.yaml"), "tokenizer": str(tmp_path / "tokenizer.json")}
    found = figures(four_config.model_copy(update={"data": four_config.data.model_copy(update=data)}))
    losses = {name for name in found if "/val/" in name}
    assert losses == {"four/val/next_token", "four:span/val/span"}
    measured = {name.split("/R@")[0] for name in found if "/R@" in name}
    pairs = {f"{a}_to_{b}" for medium in ("image", "audio", "video") for a, b in ((medium, "text"), ("text", medium))}
    assert measured == {f"four/retrieval/backbone/{pair}" for pair in pairs}


def test_a_faulty_picture_is_counted_and_does_not_end_the_run(tiny_config: RunConfig, tiny_data: Path, tmp_path: Path):
    shutil.copytree(tiny_data, tmp_path, dirs_exist_ok=True)
    held_out = tmp_path / "tiny-00003.tar"
    times, content = held_out.stat(), bytearray(held_out.read_bytes())
    content[content.index(b"IHDR") + 40] ^= 0xFF
    held_out.write_bytes(content)
    os.utime(held_out, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = figures(with_spec(tiny_config, tmp_path / "tiny.yaml"))
    assert found["val/faults"] == 1 and 0 < found["val/next_token"] < 20


def embeddings(config: RunConfig, layouts: Sequence[Layout]) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Of all slots of a whole batch, in fp64, in each layout."""
    (batch,), found = four_batches(config, 1, packs=4), []
    for layout in layouts:
        world = ALONE
        if layout.ranks > 1:
            mesh = make_mesh(layout, ALONE.device)
            world = World(rank=dist.get_rank(), size=layout.ranks, device=ALONE.device, mesh=mesh)
        model = apply_layout(MultimodalModel(config.model).initialize(seed=0).double(), config.train, world)
        whole = WholeBatches(model, splitter_of(config.model, world), world)
        with evaluating(whole):
            found.append({level: (e.vectors, e.norms) for level, e in whole(batch).embeddings.items()})
        assert model.training
    return found


def test_embeddings_of_whole_batches(four_config: RunConfig):
    config = alter(four_config, model={"levels": ("backbone", "tower"), "transformer": {"n_kv_heads": 2}})
    (alone,) = embeddings(config, [Layout()])
    assert alone.keys() == {"backbone", "tower"} and len(alone["tower"][0]) > 8
    for rank in on_ranks(2, embeddings, config, [Layout(dp_shard=2), Layout(ring=2), Layout(ulysses=2), Layout(tp=2)]):
        for found in rank:
            torch.testing.assert_close(found, alone, rtol=1e-11, atol=1e-12)
