from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.decode import pixels, sound
from mmpt.data.loader import Loader, make_source, sequential_batches
from mmpt.data.mixture import Slot
from mmpt.data.shards import ShardWriter
from mmpt.data.source import Source
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.types import AUDIO, IMAGE, VIDEO, Audio, Image, PackedBatch, UserError

from conftest import clip, picture  # isort: skip


def write_pairs(folder: Path, count: int, **spec: object) -> Path:
    """Tars as img2dataset writes them, and a spec that reads them in place."""
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number in range(count):
            meta = {"url": "u", "key": f"{number:09d}", "status": "success", "width": 40, "height": 40}
            members = {
                "jpg": picture("disc", "red", 40, "JPEG"),
                "json": json.dumps(meta).encode(),
                "txt": b"caption %d" % number,
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    tree = {
        "version": 1,
        "name": "laion",
        "format": "pairs",
        "shards": {"root": ".", "pattern": "00000.tar"},
        "split": {"train": ":"},
    }
    (folder / "laion.yaml").write_text(yaml.safe_dump(tree | spec))
    return folder / "laion.yaml"


def source_of(spec: Path, tokenizer: Tokenizer, config: RunConfig) -> Source:
    return make_source(Corpus.open(load_spec(spec), "train"), tokenizer, config)


def all_slots(source: Source, epoch: int) -> list[Slot]:
    drawn = source.draw(np.arange(epoch * source.size, (epoch + 1) * source.size))
    columns = zip(*(column.tolist() for column in drawn[:3]), strict=True)
    return [Slot(source=0, document=document, epoch=of, piece=0, tokens=tokens) for of, document, tokens in columns]


def test_every_document_of_four_modalities_is_what_was_planned(four_data: Path, tokenizer: Tokenizer, four_config: RunConfig):
    source = source_of(four_data / "four.yaml", tokenizer, four_config)
    slots = all_slots(source, 0)
    assert sorted(slot.document for slot in slots) == list(range(16))
    for slot in slots:
        reading = source.read(slot)
        assert sum(len(segment.tokens) for segment in reading.segments) == slot.tokens
        rows = 0
        for _, part in reading.media:
            if isinstance(part, Audio):
                rows += len(sound(part, source.budget).values)
            else:
                frames = pixels(part, source.budget, 0).frames
                rows += frames.shape[0] * frames.shape[2] * frames.shape[3] // four_config.model.image.patch**2
        assert rows == source.media_rows[slot.document]


def test_pairs_are_read_in_place_in_both_orders(tmp_path: Path, tokenizer: Tokenizer, tiny_config: RunConfig):
    templates = [{"order": ["image", "text"], "p": 0.25}, {"order": ["text", "image"], "p": 0.75}]
    source = source_of(write_pairs(tmp_path, 200, templates=templates), tokenizer, tiny_config)
    turned: list[set[int]] = []
    for epoch in range(2):
        turned.append(set())
        for slot in all_slots(source, epoch):
            reading = source.read(slot)
            text_first = reading.segments[0].tokens[0] == tokenizer.bos
            assert len(reading.segments) == 2 + text_first and [number for number, _ in reading.media] == [0]
            if text_first:
                turned[-1].add(slot.document)
    assert 110 < len(turned[0]) < 190 and turned[0] != turned[1]


def test_a_pair_has_the_picture_and_the_words_of_its_members(tmp_path: Path, tokenizer: Tokenizer, tiny_config: RunConfig):
    source = source_of(write_pairs(tmp_path, 3), tokenizer, tiny_config)
    document = source.corpus.document(1)
    assert isinstance(document.parts[0], Image) and bytes(document.parts[0].data) == picture("disc", "red", 40, "JPEG")
    assert document.parts[1].text == "caption 1" and document.key == "000000001" and document.meta["url"] == "u"
    spec = write_pairs(tmp_path, 3)
    config = tiny_config.model_copy(update={"data": tiny_config.data.model_copy(update={"spec": str(spec)})})
    (batch,) = islice(Loader(config, 0, 1), 1)
    assert {ref.key for ref in batch.provenance} == {"000000000", "000000001", "000000002"}


def test_a_mixture_of_four_modalities_in_batches(four_config: RunConfig, tokenizer: Tokenizer):
    batches = list(islice(Loader(four_config, 0, 1), 6))
    for batch in batches:
        check_media(batch, four_config)
    tokens: dict[str, int] = {}
    for batch in batches:
        for name, count in batch.report.tokens.items():
            tokens[name] = tokens.get(name, 0) + count
    assert tokens["four"] / tokens["tiny"] == pytest.approx(2, rel=0.2)
    assert all(sum(len(batch.audios.grid) for batch in batches) and len(batch.videos.grid) for batch in batches)
    assert set(batches[0].report.milliseconds) == {"read", "image", "audio", "video"} and not batches[0].report.faults


def check_media(batch: PackedBatch, config: RunConfig) -> None:
    """Features end to end, each shown by as many tokens as it has rows for."""
    merge, whole = config.model.image.merge**2, config.model.audio.frames_per_token
    features = [len(batch.images.values) // merge, len(batch.audios.values) // whole, len(batch.videos.values) // merge]
    shown = batch.media_index[batch.media_index >= 0]
    assert set(shown.tolist()) == set(range(sum(features)))
    for media in (batch.images, batch.audios, batch.videos):
        assert torch.equal(media.grid.prod(1).cumsum(0), media.cu_seqlens[1:])
        assert len(media.times) == media.grid[:, 0].sum() and media.cu_seqlens[-1] == len(media.values)
    assert {IMAGE, AUDIO, VIDEO} >= set(batch.slots.modality.tolist()) - {0}


def test_frames_keep_their_time_stamps(four_config: RunConfig):
    (batch,) = islice(Loader(four_config, 0, 1), 1)
    assert len(batch.videos.grid) and (batch.videos.grid[:, 0] == 3).all()
    assert batch.videos.times[:3].tolist() == pytest.approx([0.1, 0.5, 0.8], abs=1e-6)
    assert batch.audios.times[:3].tolist() == pytest.approx([0.0, 0.01, 0.02])


def test_the_sound_of_a_clip_is_a_part_of_its_own_where_it_is_asked_for(tmp_path: Path, four_config: RunConfig):
    """A tone of 440 Hz through the second half of a clip of two seconds: one mel band is loud in every frame."""
    video = {"type": "video", "file": "000.mp4", "wh": [48, 32], "fps": 10, "frames": 20, "clip": [1, 2], "audio": True}
    with ShardWriter(tmp_path, "talk", samples_per_shard=1) as writer:
        writer.write("a", {"v": 1, "parts": [video, {"type": "text", "text": "a tone"}]}, {"000.mp4": clip(0, 20, track=True)})
    tree = {"version": 1, "name": "talk", "format": "interleaved", "split": {"train": ":"}}
    (tmp_path / "talk.yaml").write_text(yaml.safe_dump(tree | {"shards": {"root": ".", "pattern": "talk-00000.tar"}}))
    data = {"spec": str(tmp_path / "talk.yaml"), "packs_per_batch": 1, "window": 1}
    config = four_config.model_copy(update={"data": four_config.data.model_copy(update=data)})
    (batch,) = islice(Loader(config, 0, 1), 1)
    assert not batch.report.faults and batch.videos.grid.tolist() == [[1, 4, 4]] and batch.audios.grid.tolist() == [[104, 1, 1]]
    loudest = batch.audios.values[:98].argmax(dim=1)
    assert loudest.unique().numel() <= 2 and batch.audios.times[0] == 1.0
    assert (batch.media_index >= 0).sum() == 4 + 2 * 13, "the sound stands in the row, and once more to be contrasted"


def test_pairs_in_both_orders_are_evaluated(tmp_path: Path, tokenizer: Tokenizer, tiny_config: RunConfig):
    templates = [{"order": ["image", "text"], "p": 1}, {"order": ["text", "image"], "p": 1}]
    corpus = Corpus.open(load_spec(write_pairs(tmp_path, 20, templates=templates)), "train")
    assert sum(batch.documents for batch in sequential_batches(corpus, tokenizer, tiny_config)) == 20


def test_no_pack_of_an_evaluation_holds_more_media_than_it_may(four_data: Path, tokenizer: Tokenizer, four_config: RunConfig):
    data = {"pack_media": 150, "packs_per_batch": 1}
    config = four_config.model_copy(update={"data": four_config.data.model_copy(update=data)})
    corpus = Corpus.open(load_spec(four_data / "four.yaml"), "train")
    rows = [
        sum(len(media.values) for media in (batch.images, batch.audios, batch.videos))
        for batch in sequential_batches(corpus, tokenizer, config)
    ]
    assert 100 < max(rows) <= 150


def test_a_document_of_absurd_length_is_named(tmp_path: Path, tokenizer: Tokenizer, four_config: RunConfig):
    """A clip that is shown 30,000 times costs more than 32 bits hold."""
    video = {"type": "video", "file": "000.mp4", "wh": [48, 32], "fps": 1, "frames": 99, "clip": [0, 1024]}
    with ShardWriter(tmp_path, "many", samples_per_shard=1) as writer:
        writer.write("a", {"v": 1, "parts": [video] * 30_000}, {"000.mp4": b"unread"})
    tree = {"version": 1, "name": "many", "format": "interleaved", "split": {"train": ":"}, "video": {"max_frames": 1024}}
    (tmp_path / "many.yaml").write_text(yaml.safe_dump(tree | {"shards": {"root": ".", "pattern": "many-00000.tar"}}))
    config = four_config.model_copy(update={"data": four_config.data.model_copy(update={"pack_tokens": 8192})})
    with pytest.raises(UserError, match=r"source many: document a takes [0-9,]+ tokens or media rows"):
        source_of(tmp_path / "many.yaml", tokenizer, config)
