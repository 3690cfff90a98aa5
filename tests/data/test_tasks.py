"""Sources with tasks, from the spec to the batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tasks import SENTINELS, all_tasks, task_config, task_tokenizer, write_texts

from mmpt.config import RunConfig
from mmpt.data.loader import Loader, open_sources, plan_of
from mmpt.data.mixture import Slot
from mmpt.data.source import Source
from mmpt.data.tokens import Tokenizer
from mmpt.types import AUDIO, IGNORE, IMAGE, MASKED, NEXT_TOKEN, NOTHING, SPAN, TEXT, LoaderState, PackedBatch, UserError


@pytest.fixture
def config(tiny_config: RunConfig, tiny_data: Path, tmp_path: Path) -> RunConfig:
    return all_tasks(tiny_config, tmp_path, tiny_data / "tiny.yaml")


def sources_of(config: RunConfig) -> dict[str, Source]:
    return {source.name: source for source in open_sources(config, Tokenizer.of(config.data))}


def slots_of(source: Source, config: RunConfig, epochs: int = 1) -> Iterator[Slot]:
    """Those of a plan, as far as they are of the first epochs."""
    plan = plan_of([source], config.data, "tokens")
    for slots, cursor in plan.walk(plan.begin()):
        yield from (slot for slot in slots if slot.epoch < epochs)
        if cursor.sources[source.name].position >= epochs * source.size + config.data.window:
            return


def take(config: RunConfig, count: int, rank: int = 0, ranks: int = 1, state: LoaderState | None = None) -> list[PackedBatch]:
    return list(islice(Loader(config, rank, ranks, state), count))


def packs_of(batch: PackedBatch) -> Iterator[tuple[Any, ...]]:
    """What stands in each pack, without the numbers that are local to the batch."""
    length = len(batch.tokens) // batch.packs
    for start in range(0, len(batch.tokens), length):
        here = slice(start, start + length)
        shown = batch.document_ids[here][batch.document_ids[here] != NOTHING].unique()
        yield (
            *(getattr(batch, name)[here].tolist() for name in ("tokens", "labels", "token_types")),
            batch.position_ids[:, here].tolist(),
            [batch.provenance[int(document)] for document in batch.segments.document[shown]],
            batch.segments.task[shown].tolist(),
            batch.segments.next_sentence[shown].tolist(),
        )


def test_every_document_is_what_was_planned(config: RunConfig):
    sources = sources_of(config)
    assert list(sources) == ["texts", "texts:masked", "texts:span", "tiny:masked"]
    for source in sources.values():
        slots = list(slots_of(source, config))
        assert {slot.document for slot in slots} == set(range(source.size))
        assert any(slot.piece for slot in slots) == source.name.startswith("texts"), "some of those are longer than a pack"
        for slot in slots:
            reading = source.read(slot)
            assert sum(len(segment.tokens) for segment in reading.segments) == slot.tokens
            assert {segment.task for segment in reading.segments} == {source.form.task}


def test_what_is_hidden_is_another_in_the_next_epoch_and_the_same_when_read_again(config: RunConfig):
    source = sources_of(config)["texts:masked"]
    first, second = (source.read(Slot(0, 3, epoch, 0, int(source.lengths[3]))).segments for epoch in (0, 1))
    assert first == source.read(Slot(0, 3, 0, 0, int(source.lengths[3]))).segments
    assert first != second
    assert [restored(row) for row in first] == [restored(row) for row in second]


def test_in_every_piece_other_words_are_hidden(config: RunConfig):
    source = sources_of(config)["texts:masked"]
    document = int(source.lengths.argmax())
    tokens = [length for length, _ in source.pieces(document, 0)]
    rows = [source.read(Slot(0, document, 0, piece, tokens[piece])).segments[0] for piece in range(2)]
    assert tokens[0] == tokens[1] == config.data.pack_tokens
    places = [[place for place, label in enumerate(row.labels) if label != IGNORE] for row in rows]
    assert len(places[0]) == len(places[1]) == round(0.15 * (tokens[0] - 3)) and len(set(places[0]) & set(places[1])) < 15


def restored(row: Any) -> list[int]:
    return [token if label == IGNORE else label for token, label in zip(row.tokens, row.labels, strict=True)]


def test_all_tasks_stand_in_the_batches(config: RunConfig):
    batches = take(config, 6)
    tasks = torch.cat([batch.segments.task for batch in batches])
    assert set(tasks.tolist()) == {NEXT_TOKEN, MASKED, SPAN} and not any(batch.report.faults for batch in batches)
    follows = torch.cat([batch.segments.next_sentence for batch in batches])
    assert 0.2 < (follows == 1).sum() / (follows != IGNORE).sum() < 0.7
    for batch in batches:
        pairs = (batch.segments.next_sentence != IGNORE)[batch.document_ids] & (batch.document_ids != NOTHING)
        assert (batch.token_types[~pairs] == 0).all() and (batch.token_types[pairs] == 1).any() == pairs.any()
        for number in range(len(batch.segments.task)):
            check_segment(batch, number)


def check_segment(batch: PackedBatch, number: int) -> None:
    """Labels at their own place for hidden words, else those of the next place; every segment is of its source's task."""
    rows = batch.document_ids == number
    tokens, labels = batch.tokens[rows], batch.labels[rows]
    asked = labels != IGNORE
    ref = batch.provenance[int(batch.segments.document[number])]
    task = ["next_token", "masked", "span"][int(batch.segments.task[number])]
    assert (ref.source.partition(":")[2] or "next_token") == task
    if task == "masked":
        words = int(((tokens != task_tokenizer().bos) & (tokens != task_tokenizer().eos)).sum())
        assert asked.sum() <= max(1, 0.2 * words + 1)
    else:
        assert torch.equal(labels[:-1][asked[:-1]], tokens[1:][asked[:-1]]) and not asked[-1:].any()


def test_exchanged_texts_keep_to_their_pack_and_their_document(config: RunConfig):
    """References say where each document begins, also where its second text is another's and so of another length."""
    for batch in take(config, 4):
        length = len(batch.tokens) // batch.packs
        for document, ref in enumerate(batch.provenance):
            first = int((batch.segments.document == document).nonzero()[0])
            place = int((batch.document_ids == first).nonzero()[0])
            assert place % length == ref.position
        assert (batch.document_ids.reshape(batch.packs, -1).diff(dim=1) <= 1).all()


def test_other_layouts_hide_the_same(config: RunConfig):
    whole, halves = take(config, 4), [take(config, 4, rank, 2) for rank in range(2)]
    for one, *parts in zip(whole, *halves, strict=True):
        assert list(packs_of(one)) == [pack for part in parts for pack in packs_of(part)]
    resumed = take(config.model_copy(update={"data": config.data.model_copy(update={"workers": 2})}), 2, state=whole[1].state)
    for one, other in zip(whole[2:], resumed, strict=True):
        assert list(packs_of(one)) == list(packs_of(other))


def test_the_fingerprint_names_what_decides_a_batch(config: RunConfig, tmp_path: Path):
    (batch,) = take(config, 1)
    for model in ({"pool": "mean"}, {"head": "linear"}, {"transformer": {"rope_sections": (2, 1, 1), "dim": 16}}):
        changed = task_config(config, tmp_path, [{"spec": "texts.yaml", "task": "masked"}], model)
        then = {name: value for name, value in batch.state.fingerprint.items() if name.startswith("source texts:masked")}
        now = {name: value for source in sources_of(changed).values() for name, value in source.fingerprint.items()}
        assert [name for name in then if then[name] != now[name]] == ["source texts:masked task and form"]


# Longest segments


def test_no_segment_is_longer_than_the_table_of_positions(tiny_config: RunConfig, tiny_data: Path, tmp_path: Path):
    write_texts(tmp_path, 30)
    positions = {"transformer": {"positions": "learned", "max_positions": 40}}
    parts = [{"spec": "texts.yaml", "task": task} for task in ("next_token", "masked", "span")]
    config = task_config(
        tiny_config, tmp_path, [*parts, {"spec": str(tiny_data / "tiny.yaml")}], {**positions, "head": "bert", "token_types": 2}
    )
    for source in sources_of(config).values():
        slots = list(slots_of(source, config))
        assert {slot.document for slot in slots} == set(range(source.size)) and any(slot.piece > 0 for slot in slots)
        for slot in slots:
            lengths = [len(segment.tokens) for segment in source.read(slot).segments]
            assert sum(lengths) == slot.tokens and max(lengths) <= 40
    batches = take(config, 12)
    assert any((batch.segments.next_sentence == 1).any() for batch in batches)
    for batch in batches:
        assert int(batch.position_ids.max()) < 40
        assert all(int(torch.bincount(ids[ids >= 0]).max()) <= 40 for ids in batch.document_ids.chunk(batch.packs))


def test_a_medium_longer_than_the_table_of_positions_is_named(tiny_config: RunConfig, tiny_data: Path, tmp_path: Path):
    model = {"transformer": {"positions": "learned", "max_positions": 10}, "image": {"merge": 1}}
    with pytest.raises(UserError, match=r"model.transformer.max_positions = 10: a medium of document tiny\d+ of tiny takes 16"):
        sources_of(task_config(tiny_config, tmp_path, [{"spec": str(tiny_data / "tiny.yaml")}], model))


def test_a_text_with_more_spans_than_sentinels_goes_in_pieces(tiny_config: RunConfig, tmp_path: Path):
    write_texts(tmp_path, 8, longest=80)
    config = task_config(tiny_config, tmp_path, [{"spec": "texts.yaml", "task": "span"}])
    config = config.model_copy(update={"data": config.data.model_copy(update={"pack_tokens": 4096})})
    (source,) = sources_of(config).values()
    rows = [source.read(slot).segments[0] for slot in slots_of(source, config)]
    assert any(slot.piece for slot in slots_of(source, config)) and max(source.lengths) < 4096
    used = [len(set(row.tokens) & set(task_tokenizer().sentinels)) for row in rows]
    assert max(used) == SENTINELS


# Without fusion


def test_towers_alone_read_one_text_and_the_first_of_each_modality(four_config: RunConfig, tmp_path: Path):
    config = four_config.model_copy(
        update={"model": four_config.model.model_copy(update={"fusion": False, "levels": ("tower",)})}
    )
    found = set()
    for batch in take(config, 4):
        assert (batch.media_index == NOTHING).all() and (batch.labels == IGNORE).all() and not batch.report.faults
        for modality, media in batch.media.items():
            shown = batch.slots.item[batch.slots.modality == modality].tolist()
            assert shown == list(range(len(media.grid))), "every item has its slot, and no other is read"
        of_text = (batch.slots.modality == TEXT).nonzero().flatten()
        ends = batch.pool_index[batch.pool_index != NOTHING]
        assert torch.equal(ends, of_text), "an <emb> for each text, and no token for media"
        for document in range(batch.documents):
            found.add(tuple(batch.slots.modality[batch.slots.pair == document].tolist()))
    assert {(TEXT, IMAGE), (TEXT, AUDIO), (TEXT, IMAGE, AUDIO, 3), (IMAGE,), (TEXT,)} <= found


def test_towers_alone_do_not_cut_a_document(four_config: RunConfig):
    model = four_config.model.model_copy(update={"fusion": False, "levels": ("tower",)})
    config = four_config.model_copy(
        update={"model": model, "data": four_config.data.model_copy(update={"pack_media": 80, "spec": four_spec(four_config)})}
    )
    with pytest.raises(UserError, match=r"data.pack_media = 80: the media of document four\d\d of four take 1\d\d together"):
        sources_of(config)


def four_spec(config: RunConfig) -> str:
    return yaml.safe_load(Path(config.data.spec).read_text())["mixture"][0]["spec"]


# Refusals


@pytest.mark.parametrize(
    ("part", "model", "told"),
    [
        ({"task": "masked"}, {"fusion": False, "levels": ["tower"]}, "source texts:masked: task masked wants model.fusion: true"),
        (
            {"task": "span"},
            {"transformer": {"mask": "bidirectional"}},
            "source texts:span: task span wants .*mask: causal or media",
        ),
    ],
)
def test_a_task_that_the_model_cannot_do_is_refused(tiny_config: RunConfig, tmp_path: Path, part: dict, model: dict, told: str):
    write_texts(tmp_path, 4)
    with pytest.raises(UserError, match=told):
        sources_of(task_config(tiny_config, tmp_path, [{"spec": "texts.yaml", **part}], model))


@pytest.mark.parametrize(("task", "token"), [("masked", "<mask>"), ("span", "<extra_id_0>")])
def test_a_task_whose_tokens_the_tokenizer_lacks_is_refused(tiny_config: RunConfig, tmp_path: Path, task: str, token: str):
    write_texts(tmp_path, 4)
    config = task_config(tiny_config, tmp_path, [{"spec": "texts.yaml", "task": task}])
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tiny_config.data.tokenizer})})
    with pytest.raises(UserError, match=rf"source texts:{task}: task {task}: the tokenizer has no '{token}'; name its own as"):
        sources_of(config)


def test_segments_of_a_few_tokens_are_refused(tiny_config: RunConfig, tmp_path: Path):
    write_texts(tmp_path, 4)
    transformer = {"positions": "learned", "max_positions": 4}
    with pytest.raises(UserError, match=r"source texts: segments of 4 tokens; raise data.pack_tokens and model"):
        sources_of(task_config(tiny_config, tmp_path, [{"spec": "texts.yaml"}], {"transformer": transformer}))


def test_media_without_an_encoder_are_refused_by_name(tiny_config: RunConfig, four_data: Path, tmp_path: Path):
    parts = [{"spec": str(four_data / "four.yaml")}]
    with pytest.raises(
        UserError, match=r"source four: it has parts of modality audio, and the model has no encoder .* model.audio"
    ):
        sources_of(task_config(tiny_config, tmp_path, parts))
    with pytest.raises(UserError, match=r"source four: it has parts of modality image"):
        sources_of(task_config(tiny_config, tmp_path, parts, {"image": None}))
    assert np.all(
        [source.lengths > 0 for source in sources_of(task_config(tiny_config, tmp_path, *texts_alone(tmp_path))).values()]
    )


def texts_alone(folder: Path) -> tuple[list, dict]:
    """A mixture and a model without any encoder."""
    write_texts(folder, 4)
    return [{"spec": "texts.yaml"}], {"image": None}
