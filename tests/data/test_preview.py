"""A page about a small corpus of all four modalities, read back: what stands in it, in which order, and nothing else."""

import base64
import io
import os
import re
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import soundfile
from conftest import image_part, picture
from pages import Element, Page

import mmpt.data.preview
from mmpt.config import AugmentConfig, ModelConfig, RunConfig, parse
from mmpt.data.loader import Loader
from mmpt.data.preview import preview
from mmpt.data.shards import ShardWriter
from mmpt.data.tokens import Tokenizer
from mmpt.types import UserError

HOSTILE = """<script>alert("x")</script><img src=x onerror=alert(1)> & '"'"""
SPEC = """\
version: 1
name: {name}
format: interleaved
shards: {{root: ".", pattern: "{name}-{{00000..00000}}.tar"}}
split: {{train: ":"}}
video: {{fps: 2}}
"""


def text(words: str, **fields) -> dict:
    return {"type": "text", "text": words, **fields}


def sound(seconds: float, rate: int) -> bytes:
    wave = 0.4 * np.sin(2 * np.pi * 500 * np.arange(round(seconds * rate)) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC")
    return buffer.getvalue()


def sound_part(file: str, data: bytes) -> dict:
    info = soundfile.info(io.BytesIO(data))
    found = {"type": "audio", "file": file, "sample_rate": info.samplerate, "samples": info.frames}
    return found | {"crc32": zlib.crc32(data)}


def video(seconds: int) -> bytes:
    """64 x 48, ten frames a second, each brighter than the one before."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(seconds * 10):
            shade = np.full((48, 64, 3), 250 * number // (seconds * 10), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def video_part(file: str, data: bytes, seconds: int) -> dict:
    found = {"type": "video", "file": file, "wh": [64, 48], "fps": 10, "frames": 10 * seconds, "clip": [0, seconds]}
    return found | {"audio": False, "crc32": zlib.crc32(data)}


def documents() -> list[tuple[str, list[dict], dict[str, bytes], dict]]:
    """(key, parts, files, meta) of a corpus in which each document shows one thing."""
    image, flac, clip = picture("disc", "red"), sound(0.8, 22050), video(2)
    large = picture("bar", "green", side=400, kind="JPEG")
    cut = large[: len(large) // 2]
    everything = [
        text("what is this?", predict=False),
        image_part("000.png", image),
        sound_part("001.flac", flac),
        text("a red disc and a tone ☃"),
        video_part("002.mp4", clip, 2),
    ]
    cut_part = {"type": "image", "file": "001.jpg", "wh": [400, 400], "crc32": zlib.crc32(cut)}
    faulty = [image_part("000.png", image), text("one is cut"), cut_part]
    changed = {**image_part("000.png", image), "crc32": 1}
    return [
        (
            "everything",
            everything,
            {"000.png": image, "001.flac": flac, "002.mp4": clip},
            {"license": "CC0-1.0", "scores": {"a": 1}},
        ),
        ("hostile", [text(HOSTILE + "\u202e\x00 end")], {}, {"url": "javascript:alert(1)", HOSTILE: HOSTILE}),
        ("cut", faulty, {"000.png": image, "001.jpg": cut}, {}),
        ("changed", [changed, text("never planned")], {"000.png": image}, {}),
        ("long", [text("many words, " * 60)], {}, {}),
        *((f"short{n}", [text(f"a short one, number {n}")], {}, {}) for n in range(5)),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`four.yaml`, `plain.yaml`, a mixture of both, and their tokenizer."""
    folder = tmp_path_factory.mktemp("preview")
    plain = [(f"plain{n}", [text(f"plain text {n}")], {}, {}) for n in range(3)]
    words = []
    for name, corpus in (("four", documents()), ("plain", plain)):
        with ShardWriter(folder, name, samples_per_shard=100) as writer:
            for key, parts, files, meta in corpus:
                words += [part["text"] for part in parts if part["type"] == "text"]
                writer.write(key, {"v": 1, "id": key, "parts": parts, "meta": meta}, files)
        (folder / f"{name}.yaml").write_text(SPEC.format(name=name))
    parts = "".join(f"- {{spec: {name}.yaml, weight: 0.5}}\n" for name in ("four", "plain"))
    (folder / "both.yaml").write_text(f"version: 1\nname: both\nunit: samples\nmixture:\n{parts}")
    Tokenizer.train(words, vocabulary=300).save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def config(folder: Path, tiny_config: RunConfig) -> RunConfig:
    sections = {"audio": {"dim": 32, "layers": 1, "n_heads": 2, "ffn_dim": 64}, "video": {"size": 32}}
    model = ModelConfig.model_validate(tiny_config.model.model_dump() | sections)
    data = tiny_config.data.model_copy(
        update={"tokenizer": str(folder / "tokenizer.json"), "pack_tokens": 128, "pack_media": 256, "window": 20}
    )
    return tiny_config.model_copy(update={"model": model, "data": data})


@pytest.fixture
def page(config: RunConfig, folder: Path, tmp_path: Path) -> Page:
    return Page(preview(config, tmp_path / "sub" / "page.html", spec=folder / "four.yaml").read_text(encoding="utf-8"))


def uri(address: str, kind: str) -> io.BytesIO:
    assert address.startswith(f"data:{kind};base64,")
    return io.BytesIO(base64.b64decode(address.split(",", 1)[1], validate=True))


def chips(row: Element) -> list[tuple[str, str]]:
    return [(chip.attributes["class"].removeprefix("t "), chip.raw) for chip in row.all("span", "t")]


def test_the_page_asks_for_nothing_and_escapes_everything(page: Page):
    for element in page.every:
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("action", "data", "srcset", "poster")
            if name in ("src", "href"):
                assert value.startswith(
                    ("data:image/png;base64,", "data:audio/mpeg;base64,", "data:video/mp4;base64,", "#document-")
                )
    tags = {element.tag for element in page.every}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    (policy,) = (e.attributes["content"] for e in page.every if "http-equiv" in e.attributes)
    assert policy == "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    (style,) = page.root.all("style")
    assert not re.search(r"@import|url\(", style.raw)
    hostile = page.article("hostile")
    assert hostile.all("p", "said")[0].raw == HOSTILE + "⟨U+202E⟩⟨U+0000⟩ end"
    assert [dt.raw for dt in hostile.all("dt")] == ["url", HOSTILE]
    assert [dd.raw for dd in hostile.all("dd")] == ["javascript:alert(1)", HOSTILE]


def test_addresses_within_the_page_exist(page: Page):
    ids = [element.attributes["id"] for element in page.every if "id" in element.attributes]
    assert len(ids) == len(set(ids)) == 9  # of ten documents one is left out of the plan
    assert {e.attributes["href"] for e in page.every if "href" in e.attributes} == {f"#{name}" for name in ids}


def test_a_document_shows_its_parts_in_order(page: Page):
    article = page.article("everything")
    assert [dd.text for dd in article.all("dd")] == ["CC0-1.0", '{"a": 1}']
    parts = article.all("section", "part")
    assert [part.all("h4")[0].text for part in parts] == [
        "text 1 given",
        "picture 1",
        "sound 1",
        "text 2 predicted",
        "video 1",
    ]
    assert [p.raw for p in article.all("p", "said")] == ["what is this?", "a red disc and a tone ☃"]
    notes = [part.all("p", "note")[-1].text for part in parts]
    assert notes[1] == "40 × 40 → 32 × 32, 4 tokens"
    assert notes[2] == "0.80 s at 22,050 Hz → 80 × 80 log-mel, 10 tokens"
    assert notes[4] == "64 × 48, seconds 0 to 2 → 4 frames of 32 × 32, 16 tokens"


def test_media_are_those_that_the_model_gets(page: Page):
    article = page.article("everything")
    picture_part, sound_shown, video_shown = (article.all("section", kind)[0] for kind in ("picture", "sound", "video"))
    (image,) = picture_part.all("img")
    pixels = np.asarray(PIL.Image.open(uri(image.attributes["src"], "image/png")).convert("RGB")).astype(int)
    assert pixels.shape == (32, 32, 3)
    assert (abs(pixels[16, 16] - [255, 0, 0]) < 3).all() and (pixels[0, 0] == 255).all()  # a red disc on white
    (mel,) = sound_shown.all("img")
    assert PIL.Image.open(uri(mel.attributes["src"], "image/png")).size == (80, 80)
    (player,) = sound_shown.all("audio")
    with av.open(uri(player.attributes["src"], "audio/mpeg")) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == round(0.8 * 16000)
    assert [caption.text for caption in video_shown.all("figcaption")] == ["0.20 s", "0.70 s", "1.20 s", "1.70 s"]
    stills = [np.asarray(PIL.Image.open(uri(still.attributes["src"], "image/png"))) for still in video_shown.all("img")]
    assert [still.shape for still in stills] == [(32, 32, 3)] * 4
    (player,) = video_shown.all("video")
    with av.open(uri(player.attributes["src"], "video/mp4")) as container:
        shown = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert [time for time, _ in shown] == [0.0, 0.5, 1.0, 1.5]
    for (_, frame), still in zip(shown, stills, strict=True):
        assert abs(frame.astype(int) - still).mean() < 4


def test_augmented_pictures_are_those_of_training(config: RunConfig, folder: Path, tmp_path: Path):
    augment = AugmentConfig(rotate=30, scale=0.3, color=0.4, background=1.0)
    data = config.data.model_copy(update={"spec": str(folder / "four.yaml"), "augment": augment})
    config = config.model_copy(update={"data": data})
    article = Page(preview(config, tmp_path / "page.html", spec=folder / "four.yaml").read_text()).article("everything")
    (image,) = article.all("section", "picture")[0].all("img")
    epoch = int(re.search(r"epoch (\d+)", article.all("header")[0].text)[1])
    for batch in Loader(config, 0, 1):
        found = [ref for ref in batch.provenance if (ref.key, ref.epoch) == ("everything", epoch)]
        if found:
            break
    start = (found[0].pack - batch.provenance[0].pack) * data.pack_tokens + found[0].position
    feature = next(int(index) for index in batch.media_index[start:] if index >= 0)  # of four patches; pictures come first
    patches = batch.images.values[4 * feature : 4 * feature + 16].reshape(4, 4, 8, 8, 3)
    expected = patches.permute(0, 2, 1, 3, 4).reshape(32, 32, 3)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(uri(image.attributes["src"], "image/png"))), expected)


def test_a_pair_tells_which_template_was_drawn(config: RunConfig, folder: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "pairs-0.tar", "w") as tar:
        for number in range(12):
            for suffix, content in (("png", picture("disc", "red")), ("txt", b"a red disc")):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "pairs.yaml").write_text(
        'version: 1\nname: pairs\nformat: pairs\nshards: {root: ".", pattern: "pairs-{0..0}.tar"}\nsplit: {train: ":"}\n'
        "templates: [{order: [image, text]}, {order: [text, image]}]\n"
    )
    page = Page(preview(config, tmp_path / "page.html", spec=tmp_path / "pairs.yaml").read_text())
    told = ["the text stands first" in article.all("header")[0].text for article in page.root.all("article")]
    assert told == [chips(article.all("p", "tokens")[0])[0][1] == "<bos>" for article in page.root.all("article")]
    assert set(told) == {True, False}


def test_a_strangers_bytes_never_reach_the_page(config: RunConfig, folder: Path, tmp_path: Path):
    source = preview(config, tmp_path / "page.html", spec=folder / "four.yaml").read_bytes()
    embedded = [base64.b64decode(found) for found in re.findall(rb"base64,([A-Za-z0-9+/=]+)", source)]
    originals = {data for _, _, files, _ in documents() for data in files.values()}
    assert embedded and not originals & set(embedded)


def test_tokens_are_those_of_the_document(page: Page):
    article = page.article("everything")
    heads = [head.text for head in article.all("div", "rows")[0].all("h4")]
    rows = [chips(row) for row in article.all("p", "tokens")]
    assert [re.sub(r"\d+", "N", head) for head in heads] == [
        "row N tokens, N predicted",
        "text N, contrasted N tokens",
        "picture N, contrasted N tokens",
        "sound N, contrasted N tokens",
        "video N, contrasted N tokens",
    ]
    assert "".join(chip for kind, chip in rows[0] if kind == "predicted") == "a red disc and a tone ☃<eos>"
    assert "".join(chip for kind, chip in rows[0] if kind == "given") == "what is this?"
    assert [chip for kind, chip in rows[0] if kind not in ("predicted", "given")] == [
        *("<bos>", "<eos>", "picture 1 × 4", "sound 1 × 10", "<bos>", "video 1 × 16"),
    ]
    assert "".join(chip for _, chip in rows[1]) == "<bos>what is this?<emb>"
    assert rows[2] == [("picture", "picture 1 × 4"), ("emb", "<emb>")]
    assert rows[4] == [("video", "video 1 × 16"), ("emb", "<emb>")]


def test_a_page_of_towers_alone(config: RunConfig, folder: Path, tmp_path: Path):
    """CLIP's: one row of words, media beside it, with the tokenizer and the crops of a CLIP run."""
    tree = config.model_dump()
    tree["model"] |= {"fusion": False, "levels": ["tower"], "vocabulary": 49408}
    tree["model"]["image"]["resize"] = "crop"
    tree["data"] |= {"tokenizer": "open_clip:ViT-B-32", "augment": {"crop": 0.5}}
    page = Page(preview(parse(tree, "clip"), tmp_path / "page.html", spec=folder / "four.yaml").read_text())
    article = page.article("everything")
    assert "pictures augmented as in that epoch" in page.root.text
    notes = [part.all("p", "note")[-1].text for part in article.all("section", "part")]
    assert notes[1] == "40 × 40 → 32 × 32, 16 rows" and notes[4].endswith("4 frames of 32 × 32, 64 rows")
    (row,) = article.all("p", "tokens")
    kinds = chips(row)
    assert [kind for kind, _ in kinds] == ["special", *["given"] * 4, "emb", "picture", "sound", "video"]
    assert "".join(chip for _, chip in kinds) == "<start_of_text>what is this ? <end_of_text>picture 1sound 1video 1"
    columns = [[int(cell.text.replace(",", "")) for cell in row.all("td")[2:]] for row in page.root.all("table")[0].all("tr")[1:]]
    assert all(sum(counts[:-1]) == counts[-1] and min(counts) >= 0 for counts in columns)
    (image,) = article.all("section", "picture")[0].all("img")
    assert PIL.Image.open(uri(image.attributes["src"], "image/png")).size == (32, 32)


def test_hidden_words_are_shown_with_what_is_asked(config: RunConfig, folder: Path, tmp_path: Path):
    """A model of text alone, whose tokens are hidden where they stand."""
    Tokenizer.train(["many words, " * 9, "plain text 0123"], 300, mask=True).save(tmp_path / "t.json")
    (tmp_path / "m.yaml").write_text(
        f"version: 1\nname: m\nmixture: [{{spec: {os.path.relpath(folder / 'plain.yaml', tmp_path)}, weight: 1, task: masked}}]\n"
    )
    tree = config.model_dump()
    tree["data"]["tokenizer"] = str(tmp_path / "t.json")
    tree["model"] |= {"image": None, "audio": None, "video": None}
    tree["model"]["transformer"]["mask"] = "bidirectional"
    page = Page(preview(parse(tree, "masked"), tmp_path / "page.html", spec=tmp_path / "m.yaml").read_text())
    shown = [chip for article in page.root.all("article") for row in article.all("p", "tokens") for chip in chips(row)]
    hidden = [chip for kind, chip in shown if kind == "predicted"]
    assert hidden and all(" → " in chip for chip in hidden) and any(chip.startswith("<mask> → ") for chip in hidden)
    assert {kind for kind, _ in shown} <= {"special", "given", "predicted"}
    whole = "".join(chip.partition(" → ")[2] if kind == "predicted" else chip for kind, chip in shown)
    assert {f"<bos>plain text {n}<eos>" for n in range(3)} == set(re.findall("<bos>.*?<eos>", whole))


def test_a_faulty_part_and_a_faulty_document_are_told(page: Page):
    article = page.article("cut")
    whole, cut = article.all("section", "picture")
    assert whole.all("img") and not whole.all("p", "fault")
    assert not cut.all("img") and cut.all("p", "fault")[0].text.startswith("decode: ")
    lost = [chip.raw for chip in article.all("span", "lost")]
    assert lost == ["picture 2 × 4"]
    (table,) = page.root.all("table", "faults")
    cells = [cell.text for cell in table.all("td")]
    assert (cells[0], cells[1], cells[3]) == ("changed", "four", "crc")


def test_a_document_that_changed_since_it_was_indexed(config: RunConfig, folder: Path, tmp_path: Path):
    (tmp_path / "four.yaml").write_bytes((folder / "four.yaml").read_bytes())
    for path in folder.glob("four-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    preview(config, tmp_path / "page.html", spec=tmp_path / "four.yaml")  # the index is fresh, tokens are counted
    tar = tmp_path / "four-00000.tar"
    before = tar.stat()
    tar.write_bytes(tar.read_bytes().replace(b"a short one, number 3", b"a short one, number 7"))
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    page = Page(preview(config, tmp_path / "page.html", spec=tmp_path / "four.yaml").read_text())
    article = page.article("short3")
    assert article.all("p", "fault")[0].text.startswith("crc: ")
    assert not article.all("section", "part") and not article.all("p", "tokens")


def test_packs_are_those_of_training(page: Page, config: RunConfig, folder: Path):
    data = config.data.model_copy(update={"spec": str(folder / "four.yaml")})
    plan = Loader(config.model_copy(update={"data": data}), 0, 1).plan
    (table,) = page.root.all("table", "packs")
    (body,) = table.all("tbody")
    told = [[cell.text for cell in row.all("td")] for row in body.all("tr")]
    count = len(page.root.all("div", "pack"))
    expected = [
        [str(number), plan.sources[slot.source].name, plan.sources[slot.source].corpus.key(slot.document)]
        + [str(value) for value in (slot.epoch, slot.piece, slot.tokens)]
        for number, (slots, _) in enumerate(islice(plan.walk(plan.begin()), count))
        for slot in slots
    ]
    assert [[row[0], *row[2:7]] for row in told] == expected
    assert {row[3] for row in told} >= {"everything", "long"} and {row[5] for row in told} >= {"0", "1"}
    for number, pack in enumerate(page.root.all("div", "pack")):
        tokens = [int(row[6]) for row in told if row[0] == str(number)]
        bar, thin = pack.all("div", "bar")
        widths = [float(re.search(r"0 0 ([\d.]+)%", piece.attributes["style"])[1]) for piece in bar.all("a", "piece")]
        assert widths == pytest.approx([100 * length / 128 for length in tokens], abs=1e-3)
        assert pack.all("div", "fill")[0].text.startswith(f"{sum(tokens)} tokens, {100 * sum(tokens) / 128:.1f} %")
        rows = [int(row[7]) for row in told if row[0] == str(number) and row[7] != "0"]
        widths = [float(re.search(r"0 0 ([\d.]+)%", piece.attributes["style"])[1]) for piece in thin.all("span")]
        assert widths == pytest.approx([100 * length / 256 for length in rows], abs=1e-3)


def test_a_document_in_pieces_shows_all_of_them(page: Page):
    article = page.article("long")
    heads = [head.text for head in article.all("div", "rows")[0].all("h4")]
    assert len(heads) > 1 and heads[1].startswith(f"piece 2 of {len(heads)} ")
    words = "".join(chip for row in article.all("p", "tokens") for kind, chip in chips(row) if kind == "predicted")
    assert words == "many words, " * 60 + "<eos>"


def test_a_mixture_names_its_sources(config: RunConfig, folder: Path, tmp_path: Path):
    page = Page(preview(config, tmp_path / "page.html", spec=folder / "both.yaml").read_text())
    assert page.root.all("h1")[0].text == "both"
    rows = [[cell.text for cell in row.all("td")] for row in page.root.all("table")[0].all("tbody")[0].all("tr")]
    assert [row[:2] for row in rows] == [["0.5", "10"], ["0.5", "3"]]
    for row in rows:
        *parts, total = (int(cell.replace(",", "")) for cell in row[2:])
        assert sum(parts) == total
    assert {article.all("h3")[0].text for article in page.root.all("article")} >= {"plain0", "hostile"}


def test_fewer_documents_when_asked(config: RunConfig, folder: Path, tmp_path: Path):
    page = Page(preview(config, tmp_path / "page.html", spec=folder / "four.yaml", documents=2).read_text())
    assert len(page.root.all("article")) == 2
    links = {e.attributes["href"] for e in page.every if "href" in e.attributes}
    assert links == {"#document-0", "#document-1"}
    assert len(page.root.all("span", "piece")) > 0  # the others stand in the packs, and lead nowhere


def test_a_full_page_leaves_out_what_does_not_fit(
    config: RunConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = []
    for limit in (100, *range(4_000, 20_000, 2_000)):
        monkeypatch.setattr(mmpt.data.preview, "PAGE_BYTES", limit)
        page = Page(preview(config, tmp_path / "page.html", spec=folder / "four.yaml").read_text())
        assert sum(len(e.attributes["src"]) for e in page.every if "src" in e.attributes) <= limit
        shown = len(page.root.all("article"))
        assert 0 < shown <= 9
        assert (f"{9 - shown} further documents of these packs are not shown" in page.root.text) == (shown < 9)
        told.append(bool(re.search(r"the page is full|and \d+ parts more", page.root.text)))
    assert any(told)


def test_a_split_that_there_is_not(config: RunConfig, folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no split 'val'"):
        preview(config, tmp_path / "page.html", spec=folder / "four.yaml", split="val")
