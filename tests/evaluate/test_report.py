import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmpt.config import ObjectivesConfig
from mmpt.evaluate.charts import COLORS, POINTS, Series, line_chart, thin
from mmpt.evaluate.classification import Classification, classify
from mmpt.evaluate.curves import charts
from mmpt.evaluate.embed import Embedded
from mmpt.evaluate.gallery import Example, Found, ReportExamples
from mmpt.evaluate.language import Language, language_json
from mmpt.evaluate.report import duration, percent, write_report
from mmpt.evaluate.retrieval import retrieval
from mmpt.evaluate.zero_shot import Retrieval
from mmpt.types import UserError

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HOSTILE = """<script>alert("x")</script><img src=x onerror=alert(1)> & '"'"""


CONFIG = f"""\
name: demo
data: {{spec: data/emoji/spec.yaml, tokenizer: data/emoji/tokenizer.json}}
train: {{steps: 100}}
objectives: {{span: {{weight: 0.5}}, contrastive: {{tower: {{weight: 0.25}}}}}}
# {HOSTILE}
"""


class Page(HTMLParser):
    """The elements, addresses and text of a page; fails on an element that is not closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.elements, self.addresses, self.text = [], [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k.rstrip("_")) == v for k, v in attributes.items()) for t, a in self.elements)


def example(name: str, rank: int, caption: str | None = "") -> Example:
    found = tuple(Found(name=f"candidate {place}", picture=PIXEL, right=place == rank) for place in range(1, 6))
    return Example(name=name, picture=PIXEL, found=found, rank=rank, caption=caption)


EXAMPLES = ReportExamples(
    source="emoji, split val",
    pictures=(example("cat", 1, "a cat"), example(HOSTILE, 3, HOSTILE), example("dog", 71)),
    names=(example("sun", 5), example("moon", 6)),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training and `mmpt eval retrieval` leave it."""
    folder = tmp_path / "demo"
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    lines = []
    for step in range(10, 101, 10):
        losses = {"loss": 3 / step, "loss/next_token": 2 / step, "loss/contrastive/backbone/text_image": 2 / step}
        pace = {"samples": step * 64, "seconds": step * 0.9, "samples_per_second": 71.0, "lr": 1e-3}
        lines.append({"kind": "train", "step": step, **losses, **pace})
    ways = ("image_to_text", "text_to_image")
    recall = {f"retrieval/backbone/{way}/R@{k}": 0.1 * k for way in ways for k in (1, 5, 10)}
    lines.append({"kind": "eval", "step": 100, "val/next_token": 0.5, **recall})
    write_lines(folder, lines)
    write_result(folder, "emoji", searched(torch.eye(40)))
    return folder


def write_lines(folder: Path, lines: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def searched(embeddings: torch.Tensor, item: str = "image") -> dict:
    owner = torch.arange(len(embeddings))
    result = retrieval(embeddings, embeddings, owner)
    embedded = Embedded(items=embeddings, texts=embeddings, owner=owner, keys=tuple(map(str, owner.tolist())))
    return Retrieval(result=result, embedded=embedded, item=item, level="backbone", captions="first").to_json()


def write_result(folder: Path, name: str, figures: dict, kind: str = "retrieval", **trained: object) -> None:
    trained_on = {"spec": "data_specs/emoji.yaml", "split": "train", "name": "emoji", "documents": 400, "fingerprint": "f00d"}
    evaluated_on = {"split": "val", "name": name, "documents": 40, "fingerprint": "beef"}
    sources = {"checkpoint": {"run": "demo", "step": 100}, "trained_on": trained_on | trained, "evaluated_on": evaluated_on}
    (folder / "eval" / f"{kind}-{name}-val.json").write_text(json.dumps({"kind": kind, **figures, **sources}))


def test_the_page_asks_for_nothing_and_escapes_everything(run: Path):
    source = write_report(run, EXAMPLES).read_text()
    page = Page(source)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", source)
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "".join(page.text).count(HOSTILE) == 3  # a name, a caption and the config, each as text


def test_the_page_shows_the_figures_beside_chance(run: Path):
    page = Page(write_report(run, EXAMPLES).read_text())
    text = page.words
    assert "100 steps, 6,400 samples, 1 min 30 s" in text
    assert text.count("chance 2.5% 12.5% 25.0%") == 2  # in the table, and above it:
    assert text.count("chance 2.5% ") == 4 and text.count("chance 12.5% ") == 2
    assert "of training on data_specs/emoji.yaml" in text
    assert (
        "40 pictures and 40 texts of emoji, split val, by backbone embeddings; checkpoint of step 100, trained on emoji" in text
    )
    assert "Picture to text, R@1 100.0% chance 2.5%" in text
    assert "ties lost" not in text
    assert page.count("figure") == page.count("svg") == 6
    assert page.count("table") == 1


def test_the_gallery_marks_the_right_one(run: Path):
    page = Page(write_report(run, EXAMPLES).read_text())
    text = page.words
    assert page.count("article") == 5
    assert page.count("li") == 25
    assert page.count("li", class_="right") == 3  # the others are found below the five
    assert "candidate 1 ✓" in text and "candidate 3 ✓" in text
    assert "found at 71" in text and "found at 6" in text
    assert "The right text is first for 1 and among the five for 2." in text
    assert "The right picture is first for 0 and among the five for 1." in text


def test_results_on_the_run_s_own_data_come_first_and_ties_are_told(run: Path):
    write_result(run, "alien", searched(torch.ones(8, 2)))
    text = Page(write_report(run, EXAMPLES).read_text()).words
    assert text.index("texts of emoji") < text.index("texts of alien")
    assert text.index("chance 2.5%") < text.index("texts of emoji")
    assert text.count("with ties lost 0.0%") == 2


def test_the_same_run_gives_the_same_bytes(run: Path):
    first = write_report(run, EXAMPLES).read_bytes()
    assert write_report(run, EXAMPLES).read_bytes() == first


def test_a_run_without_evaluation_in_the_loop_and_with_a_half_line(run: Path):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + '{"kind": "train", "st')
    page = Page(write_report(run, EXAMPLES).read_text())
    assert page.count("figure") == 5
    assert "40 steps" in page.words


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("config.yaml", "no config.yaml"),
        ("metrics.jsonl", "no metrics.jsonl"),
    ],
)
def test_what_is_missing_is_named(run: Path, missing: str, complaint: str):
    (run / missing).unlink()
    with pytest.raises(UserError, match=complaint):
        write_report(run, EXAMPLES)
    assert not (run / "report.html").exists()


def test_a_run_before_its_first_logged_step_is_refused(run: Path):
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no training step yet"):
        write_report(run, EXAMPLES)


def test_a_run_of_texts_alone_shows_their_figures(run: Path):
    (run / "eval" / "retrieval-emoji-val.json").unlink()
    assert "Zero-shot" not in Page(write_report(run, None).read_text()).words  # nothing measured yet
    spoken = {
        HOSTILE: Language(nats=300.0, tokens=100, bytes=400, documents=7),
        "b": Language(nats=50.0, tokens=100, bytes=100, documents=2),
    }
    write_result(run, "books", language_json(spoken), "language")
    page = Page(write_report(run, None).read_text())
    assert "Perplexity 5.755 200 tokens of books Bits per byte 1.010 200" in page.words
    assert "Texts of books, split val; checkpoint of step 100, trained on emoji, split train." in page.words
    assert "3.000 20.09 1.082 100 7" in page.words and HOSTILE in "".join(page.text)
    assert (page.count("table"), page.count("article")) == (1, 0)
    assert "Pictures and" not in page.words and "Zero-shot" not in page.words


def test_a_run_that_classifies_and_does_not_write(run: Path):
    accuracy = classify(torch.eye(8), torch.eye(8), torch.arange(8))
    found = Classification(accuracy=accuracy, templates=3, item="audio", level="tower").to_json()
    init = {"image": {"open_clip": "ViT-B-32", "pretrained": HOSTILE}}
    write_result(run, "sounds", {"classes_file": "esc50.yaml"} | found, "classification", init=init)
    silent = replace(EXAMPLES, pictures=tuple(replace(each, caption=None) for each in EXAMPLES.pictures))
    page = Page(write_report(run, silent).read_text())
    assert "8 sounds of sounds, split val: 8 of the 8 classes of esc50.yaml, 3 templates, by tower embeddings" in page.words
    assert f"split train; image begun with ViT-B-32 {HOSTILE}." in page.words
    assert "Accuracy 100.0% 100.0% 100.0% chance 12.5% 62.5%" in page.words
    assert page.count("p", class_="wrote") == 0 and "caption that the model wrote" not in page.words
    (run / "eval" / "retrieval-emoji-val.json").unlink()
    assert "Classification, top-1 100.0% chance 12.5%" in Page(write_report(run, None).read_text()).words


def test_curves_are_found_by_their_names():
    steps = [{"step": step} for step in (10, 20)]
    contrasts = {
        f"loss/contrastive/{level}/{pair}": 1.0 for level in ("backbone", "tower") for pair in ("text_image", "text_audio")
    }
    train = [
        line | {"loss": 1.0, "loss/span": 2.0, "loss/novel_one": 3.0, "loss/span/of/a/source": 9.0} | contrasts for line in steps
    ]
    held_out = {f"{name}/val/span": 1.0 for name in ("books", "web")} | {"val/other": 1.0}
    found = {"web/retrieval/tower/audio_to_text/R@1": 0.5, "retrieval/backbone/image_to_text/R@1": 0.5}
    objectives = ObjectivesConfig.model_validate(yaml.safe_load(CONFIG)["objectives"])
    drawn = {chart.title: chart for chart in charts(train, [steps[1] | held_out | found], objectives)}
    assert list(drawn) == [
        "Span loss",
        "Novel one",
        "Contrastive loss, backbone",
        "Contrastive loss, tower",
        "Total loss",
        "Retrieval, web/tower",
        "Retrieval, backbone",
    ]
    assert [line.label for line in drawn["Span loss"].series] == ["training", "held out, books", "held out, web"]
    assert len({line.color for line in drawn["Span loss"].series}) == 3
    assert [line.label for line in drawn["Contrastive loss, tower"].series] == ["text and image", "text and audio"]
    # Losses are logged with their weights: 0.5, 0.25, and by default 0.5.
    assert [list(line.values) for line in drawn["Span loss"].series] == [[4.0, 4.0], [1.0], [1.0]]
    assert [list(line.values) for line in drawn["Contrastive loss, tower"].series] == [[4.0, 4.0]] * 2
    assert list(drawn["Contrastive loss, backbone"].series[0].values) == [2.0, 2.0]
    assert [line.label for line in drawn["Retrieval, web/tower"].series] == ["sound to text"]
    assert charts(steps, [], objectives) == []


def test_charts_are_drawings_in_the_colours_of_the_page():
    series = Series(label="a & b", steps=range(5), values=[1, math.nan, 2, 3, 1], dots=True)
    svg = line_chart([series, replace(series, light=True)], "percent")
    tree = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
    assert tree.get("viewBox") and not tree.get("width")
    assert not any(color in svg for color in COLORS)
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
    assert "200%" in "".join(tree.itertext())


def test_long_curves_are_averaged_and_keep_their_ends_and_level():
    steps, values = thin(np.arange(10_000), np.full(10_000, 2.0))
    assert len(steps) == POINTS and steps[0] < 20 and steps[-1] > 9_980
    np.testing.assert_allclose(values, 2.0)
    steps, _ = thin([1, 2, 3], [math.inf, 1.0, math.nan])
    assert steps.tolist() == [2]


def test_figures_are_written_for_people():
    assert [percent(value) for value in (0.0026, 0.27449, 1.0)] == ["0.3%", "27.4%", "100.0%"]
    assert [duration(seconds) for seconds in (41.6, 400, 7261)] == ["42 s", "6 min 40 s", "2 h 1 min"]
