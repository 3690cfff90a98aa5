import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from fakes import Embedder, content_of, shade, write_corpus
from rich.console import Console
from torch.nn import functional as F

from mmpt.config import RunConfig, parse
from mmpt.evaluate.embed import Embedded
from mmpt.evaluate.gallery import gallery
from mmpt.evaluate.retrieval import retrieval
from mmpt.evaluate.split import HeldOut
from mmpt.evaluate.zero_shot import Retrieval, evaluate_retrieval, retrieval_table
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import UserError


@pytest.fixture
def tiny_model(tiny_config: RunConfig) -> MultimodalModel:
    return MultimodalModel(tiny_config.model).initialize(seed=0)


def with_levels(config: RunConfig, *levels: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"levels": levels})})


def text_only(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"image": None})})


CAPTIONS = {0: ("one", "the first", "number one"), 1: ("two",), 2: ("three", "third"), 3: ("four", "the last")}
"""Captions of pictures, as many as there happen to be."""


def known_vectors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Embedder]:
    """Items, texts and owners of CAPTIONS, and a model that embeds them so."""
    texts = [text for captions in CAPTIONS.values() for text in captions]
    owner = torch.tensor([number for number, captions in CAPTIONS.items() for _ in captions])
    generator = torch.Generator().manual_seed(3)
    items, spoken = (F.normalize(torch.randn(n, 4, generator=generator), dim=1) for n in (len(CAPTIONS), len(texts)))
    told = {content_of(shade(number)): vector for number, vector in enumerate(items)}
    told |= {content_of(text): vector for text, vector in zip(texts, spoken, strict=True)}
    return items, spoken, owner, Embedder(told, width=4)


def test_every_caption_counts_where_all_are_asked_for(tiny_config: RunConfig, tmp_path: Path):
    documents = [([shade(number), *captions], {}) for number, captions in CAPTIONS.items()]
    spec = write_corpus(tmp_path, [*documents, ([shade(9)], {}), (["a text alone"], {})])
    items, texts, owner, model = known_vectors()
    found = evaluate_retrieval(model, tiny_config, spec, "val", "cpu", captions="all")
    assert (found.result, found.captions) == (retrieval(items, texts, owner), "all")
    assert found.variant == ("image", "backbone", "all")
    first = torch.tensor([int((owner == number).nonzero()[0]) for number in CAPTIONS])
    found = evaluate_retrieval(model, tiny_config, spec, "val", "cpu")
    assert found.result == retrieval(items, texts[first], torch.arange(len(items)))
    assert found.variant == ("image", "backbone")


def test_captions_in_the_lines_of_one_member_are_read_in_place(tiny_config: RunConfig, tmp_path: Path):
    """As CLIP_benchmark's retrieval sets lie: 000.png beside 000.txt of several lines."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, captions in CAPTIONS.items():
            for suffix, data in (("png", shade(number)), ("txt", "\n".join(captions).encode() + b"\n")):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    spec = tmp_path / "wds.yaml"
    shards = '{root: ".", pattern: "0.tar"}'
    spec.write_text(f'version: 1\nname: wds\nformat: pairs\nshards: {shards}\nsplit: {{test: ":"}}\n')
    items, texts, owner, model = known_vectors()
    found = evaluate_retrieval(model, tiny_config, spec, "test", "cpu", captions="all")
    assert found.result == retrieval(items, texts, owner)


def test_level_and_item_are_the_model_s_and_the_split_s(tiny_config: RunConfig, four_config: RunConfig, four_data: Path):
    spec = tiny_config.data.spec
    both = with_levels(tiny_config, "tower", "backbone")
    found = {
        level: evaluate_retrieval(Embedder(), both, spec, "val", "cpu", level=level) for level in (None, "tower", "backbone")
    }
    assert found[None].result == found["tower"].result != found["backbone"].result
    assert (found[None].level, found["backbone"].level, found[None].item) == ("tower", "backbone", "image")
    with pytest.raises(UserError, match="--level tower: the model has backbone"):
        evaluate_retrieval(Embedder(), tiny_config, spec, "val", "cpu", level="tower")
    with pytest.raises(UserError, match=r"--item audio: .* has image that the model reads"):
        evaluate_retrieval(Embedder(), tiny_config, spec, "val", "cpu", item="audio")
    four = four_data / "four.yaml"
    with pytest.raises(UserError, match="image and audio and video that the model reads beside texts: name one"):
        evaluate_retrieval(Embedder(), four_config, four, "train", "cpu")
    with pytest.raises(UserError, match="has nothing that the model reads beside texts: there are no items"):
        HeldOut(text_only(tiny_config), spec, "val").item(None)
    keys = {item: evaluate_retrieval(Embedder(), four_config, four, "train", "cpu", item=item).embedded.keys for item in ITEMS}
    assert {item: {int(key[4:]) % 4 for key in found} for item, found in keys.items()} == ITEMS


ITEMS = {"image": {0, 3}, "audio": {1, 3}, "video": {2, 3}}
"""Which documents of the corpus of four modalities have one, by their number modulo 4."""


@pytest.mark.parametrize("item", ITEMS)
def test_the_model_embeds_sounds_and_clips_as_pictures(four_config: RunConfig, four_data: Path, item: str):
    config = with_levels(four_config, "backbone", "tower")
    model = MultimodalModel(config.model).initialize(seed=0)
    for level in config.model.levels:
        found = evaluate_retrieval(model, config, four_data / "four.yaml", "train", "cpu", item=item, level=level)
        assert (found.result.items, found.result.texts) == (8, 8)
        torch.testing.assert_close(found.embedded.items.norm(dim=1), torch.ones(8))
        assert torch.pdist(found.embedded.items).median() > 1e-3  # they differ, but for some pictures


def test_clip_is_searched_by_its_towers(tiny_config: RunConfig):
    tree = tiny_config.model_dump(mode="json")
    tree["model"] |= {"fusion": False, "levels": ["tower"]}
    config = parse(tree, where="clip")
    model = MultimodalModel(config.model).initialize(seed=0)
    found = evaluate_retrieval(model, config, config.data.spec, "val", "cpu")
    fused = evaluate_retrieval(Embedder(), tiny_config, config.data.spec, "val", "cpu")
    assert (found.level, found.result.items) == ("tower", fused.result.items)
    held_out = HeldOut(config, config.data.spec, "val")
    examples = gallery(model, held_out, found.embedded, "cpu", count=3)
    assert [example.caption for example in examples.pictures] == [None] * 3  # towers do not write


def test_a_diverged_model_is_an_error_of_one_line(tiny_config: RunConfig, tiny_model: MultimodalModel):
    torch.nn.init.constant_(tiny_model.embedding_head.weight, torch.nan)
    with pytest.raises(UserError, match=r"split 'val': items\[0\] holds a value that is not finite"):
        evaluate_retrieval(tiny_model, tiny_config, tiny_config.data.spec, "val", "cpu")


def test_a_split_without_pairs_is_told(tiny_config: RunConfig, tmp_path: Path):
    spec = write_corpus(tmp_path, [([shade(1)], {}), (["a text"], {})])
    with pytest.raises(UserError, match=r"split 'val': none of 2 documents has embeddings of both an item \(image\) and a text"):
        evaluate_retrieval(Embedder(), tiny_config, spec, "val", "cpu")
    assert HeldOut(tiny_config, spec, "val").paired_items() == []
    assert HeldOut(tiny_config, tiny_config.data.spec, "val").paired_items() == [1]


def test_the_table_shows_chance_and_ties():
    ones, owner = torch.ones(4, 2), torch.arange(4)
    embedded = Embedded(items=ones, texts=ones, owner=owner, keys=tuple("abcd"))
    found = Retrieval(result=retrieval(ones, ones, owner), embedded=embedded, item="audio", level="tower", captions="first")
    console = Console(width=100)
    with console.capture() as shown:
        console.print(retrieval_table(found))
    assert "(tower), 4 sounds and 4 texts" in shown.get() and "text to sound" in shown.get()
    lines = [line for line in shown.get().splitlines() if "%" in line]
    assert [line.count("100.0%") for line in lines] == [3, 2, 2, 3, 2, 2]
    assert ["chance" in line for line in lines] == [False, True, False] * 2
    assert "ties lost" in lines[2]
    tree = json.loads(json.dumps(found.to_json()))
    assert (tree["item"], tree["level"], tree["items"], tree["captions"]) == ("audio", "tower", 4, "first")


def test_the_gallery_shows_what_retrieval_counted(tiny_config: RunConfig, tiny_model: MultimodalModel):
    spec = tiny_config.data.spec
    found = evaluate_retrieval(tiny_model, tiny_config, spec, "val", "cpu")
    result, n = found.result, found.result.items
    assert n == len(found.embedded.items) > 5
    held_out = HeldOut(tiny_config, spec, "val")
    examples = gallery(tiny_model, held_out, found.embedded, "cpu", count=n, top=5)
    for shown, direction in ((examples.pictures, result.item_to_text), (examples.names, result.text_to_item)):
        assert len(shown) == n
        for k in (1, 5):
            assert sum(example.rank <= k for example in shown) == pytest.approx(n * direction.ties_won.recall[k])
        for example in shown:
            right = [place for place, each in enumerate(example.found, start=1) if each.right]
            assert right == ([example.rank] if example.rank <= 5 else [])
            assert all(each.name == example.name and each.picture == example.picture for each in example.found if each.right)
            assert len(example.found) == min(5, n)
    assert all(example.caption is not None for example in examples.pictures)
    assert examples == gallery(tiny_model, held_out, found.embedded, "cpu", count=n, top=5)
