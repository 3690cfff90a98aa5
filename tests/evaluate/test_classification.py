import json
from pathlib import Path
from unittest import mock

import open_clip
import pytest
import torch
from fakes import Embedder, content_of, shade, write_corpus
from rich.console import Console
from torch.nn import functional as F

from mmpt.config import RunConfig, load_model, parse
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate import classification as module
from mmpt.evaluate.classification import (
    Accuracy,
    Classification,
    ClassSet,
    build_classifier,
    class_vectors,
    classification_table,
    classify,
    evaluate_classification,
)
from mmpt.model.convert import write_checkpoint
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import Document, Text, UserError

PETS = ClassSet(templates=("a photo of a {}.", "{}, drawn"), classes=("cat", "dog", "7", "owl"))
TINY_CLIP = (
    "embedding_dim=24",
    "image={size: 32, patch: 16, dim: 32, layers: 1, n_heads: 2, ffn_dim: 64}",
    "transformer={dim: 32, layers: 2, n_heads: 2, ffn_dim: 64}",
)


def document(text: str | None = None, **meta: object) -> Document:
    return Document(key="d1", source="pets", parts=(Text(text=text),) if text is not None else (), meta=meta)


def test_a_document_says_its_class_by_name_or_number():
    assert [PETS.number_of(document(text)) for text in ("cat", " dog\n", "owl", "0", "3")] == [0, 1, 3, 0, 3]
    assert PETS.number_of(document("7")) == 2  # a name goes before a number
    by_meta = PETS.model_copy(update={"label": "kind"})
    assert [by_meta.number_of(document("cat", kind=kind)) for kind in ("dog", 1, 0, "3")] == [1, 1, 0, 3]
    named_twice = ClassSet(templates=("{}",), classes=("crane", "crane", "maillot"))  # as two pairs of ImageNet's classes are
    assert named_twice.number_of(document("1")) == 1
    for classes, said, complaint in (
        (PETS, document("dgo"), "document d1 of pets: its text = 'dgo' is none of the 4 classes, .*'dog'"),
        (PETS, document("4"), "its text = 4 is none of the 4 classes"),
        (PETS, document("-1"), "its text = '-1' is none"),
        (PETS, document(), "its text = None is none"),
        (by_meta, document("cat", kind=True), "its meta.kind = True is none"),
        (by_meta, document("cat", kind=[1]), r"its meta.kind = \[1\] is none"),
        (by_meta, document("cat"), "its meta.kind is not there; its meta has nothing"),
        (named_twice, document("crane"), "'crane' is the name of 2 classes; let the labels be numbers"),
    ):
        with pytest.raises(UserError, match=complaint):
            classes.number_of(said)


def test_a_file_of_classes(tmp_path: Path):
    path = tmp_path / "pets.yaml"
    path.write_text("templates: ['a {}.']\nclasses: [cat, dog]\nlabel: kind\n")
    assert ClassSet.load(path) == ClassSet(templates=("a {}.",), classes=("cat", "dog"), label="kind")
    for text, complaint in (
        ("templates: ['a {}.']\n", "classes"),
        ("templates: ['a {c}.']\nclasses: [cat, dog]\n", "write {} once"),
        ("templates: ['{} {}']\nclasses: [cat, dog]\n", "write {} once"),
        ("templates: []\nclasses: [cat, dog]\n", "templates"),
        ("templates: ['{}']\nclasses: [cat]\n", "classes"),
        ("templates: ['{}']\nclasses: [cat, '']\n", "classes"),
        ("templates: ['{}']\nclasses: [yes, no]\n", "classes"),
        ("templates: ['{}']\nclasses: [cat, dog]\nlables: kind\n", "lables"),
        ("- cat\n", "a mapping is wanted"),
        ("classes: [cat", "not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=complaint) as error:
            ClassSet.load(path)
        assert str(error.value).startswith(f"classes {path}")
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file"):
        ClassSet.load(tmp_path / "nowhere.yaml")


def test_templates_are_filled_and_never_formatted():
    """A name, and a template, may hold whatever a person typed."""
    hostile = ClassSet(templates=("{} {0.__class__} {x!r} {{",), classes=("{}", "b"))
    assert hostile.prompts() == ["{} {0.__class__} {x!r} {{", "b {0.__class__} {x!r} {{"]
    assert PETS.prompts()[:3] == ["a photo of a cat.", "cat, drawn", "a photo of a dog."]


def test_a_table_worked_by_hand():
    scores = torch.tensor(
        [
            [0.9, 0.5, 0.1],  # class 0: rank 1
            [0.2, 0.6, 0.7],  # class 0: rank 3
            [0.5, 0.5, 0.1],  # class 0, tied with class 1, which stands behind it: rank 1
            [0.5, 0.5, 0.1],  # class 1, tied with class 0, which stands before it: rank 2
        ]
    )
    found = classify(scores, torch.eye(3), torch.tensor([0, 0, 0, 1]))
    assert found == Accuracy(
        items=4, classes=3, classes_present=2, top={1: 0.5}, mean_per_class_recall=pytest.approx((2 / 3 + 0) / 2), majority=0.75
    )
    tree = json.loads(json.dumps(found.to_json()))
    assert tree["top-1"] == 0.5 and tree["chance"] == {"top-1": pytest.approx(1 / 3)} and "top-5" not in tree


def test_a_collapsed_model_is_not_better_than_chance():
    found = classify(torch.full((20, 4), 0.5), torch.full((10, 4), 0.5), torch.arange(20) % 10)
    assert found.top == {1: 0.1, 5: 0.5}
    assert found.mean_per_class_recall == pytest.approx(0.1)


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_accuracy_is_that_of_sorting(block: int):
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    labels = torch.randint(0, 28, (200,), generator=generator)
    items = F.normalize(classes[labels] + 0.6 * torch.randn(200, 8, generator=generator), dim=1)
    with mock.patch.object(module, "BLOCK_SCORES", block), torch.autocast("cpu", dtype=torch.bfloat16):
        found = classify(items, classes, labels)
    order = (items.double() @ classes.double().T).argsort(dim=1, descending=True)
    right = order == labels[:, None]
    assert 0.2 < found.top[1] < 0.9
    assert found.top == {k: pytest.approx(right[:, :k].any(dim=1).double().mean().item()) for k in (1, 5)}
    recalls = [right[labels == label, 0].double().mean().item() for label in labels.unique()]
    assert found.mean_per_class_recall == pytest.approx(sum(recalls) / len(recalls))
    assert found.majority == torch.bincount(labels).max().item() / 200


def test_class_vectors_are_means_of_unit_length():
    rows = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]), dim=1)
    half = 0.5**0.5
    torch.testing.assert_close(class_vectors(rows, 2), torch.tensor([[half, half, 0], [0, 0, 1]]))


def test_the_classifier_is_that_of_open_clip(tiny_config: RunConfig, tmp_path: Path):
    """The same tiny CLIP in open_clip, which reads what we export; captions padded to 77 there, packed here."""
    tree = tiny_config.model_dump(mode="json")
    model_tree = load_model(Path(__file__).parents[2] / "configs/models/clip_vit_b32.yaml", list(TINY_CLIP)).model_dump(
        mode="json"
    )
    tree["model"] = model_tree
    tree["data"] |= {"tokenizer": "open_clip:ViT-B-32", "pack_tokens": 200, "packs_per_batch": 1}
    config = parse(tree, where="clip")
    model = MultimodalModel(config.model).initialize(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    write_checkpoint(model, config.model, "open_clip", tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    names = ("tench", "Great White Shark", "a cat " * 60, "été", "7")
    templates = ("a bad photo of a {}.", "itap of my {}.", "{}")
    expected = open_clip.build_zero_shot_classifier(theirs, open_clip.get_tokenizer("ViT-B-32"), names, templates).T
    classes = ClassSet(templates=templates, classes=names)
    found = build_classifier(model, classes, Tokenizer.of(config.data), config, "cpu", level="tower")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.pdist(found).min() > 0.01


def test_pictures_are_told_apart_by_their_labels(tiny_config: RunConfig, tmp_path: Path):
    """A text that is no label, none at all, and labels by name and number: what counts is the field of meta."""
    documents = [
        ([shade(0), "who knows"], {"kind": "cat"}),
        ([shade(1)], {"kind": 1}),
        ([shade(2), "dog"], {"kind": "owl"}),
        (["a text alone"], {}),
    ]
    spec = write_corpus(tmp_path, documents)
    vectors = torch.eye(4)
    told = {content_of(prompt): vectors[row // 2] for row, prompt in enumerate(PETS.prompts())}
    told |= {content_of(shade(number)): vectors[seen] for number, seen in enumerate((0, 1, 0))}  # the owl is taken for a cat
    classes = PETS.model_copy(update={"label": "kind"})
    found = evaluate_classification(Embedder(told, width=4), tiny_config, spec, classes, "val", "cpu")
    assert (found.accuracy.items, found.accuracy.classes_present) == (3, 3)
    assert found.accuracy.top[1] == pytest.approx(2 / 3)
    assert found.variant == ("image", "backbone") and found.templates == 2
    with pytest.raises(UserError, match="document d0 of small: its text = 'who knows' is none of the 4 classes"):
        evaluate_classification(Embedder(told, width=4), tiny_config, spec, PETS, "val", "cpu")
    told[content_of(shade(0))] = torch.full((4,), torch.nan)
    with pytest.raises(UserError, match=r"classification on .*, split 'val': items\[0\] holds a value that is not finite"):
        evaluate_classification(Embedder(told, width=4), tiny_config, spec, classes, "val", "cpu")


def test_the_table_shows_chance():
    generator = torch.Generator().manual_seed(0)
    items, classes = (torch.randn(n, 8, generator=generator) for n in (40, 10))
    accuracy = classify(items, classes, torch.arange(40) % 10)
    found = Classification(accuracy=accuracy, templates=3, item="video", level="tower")
    console = Console(width=100)
    with console.capture() as shown:
        console.print(classification_table(found))
    assert "(tower), 40 clips of 10 classes, 10 to choose from" in " ".join(shown.get().split())
    (chance,) = (line for line in shown.get().splitlines() if "chance" in line)
    assert chance.count("10.0%") == 2 and "50.0%" in chance
    assert found.to_json()["item"] == "video"
