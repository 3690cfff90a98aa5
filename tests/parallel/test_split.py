"""A batch cut into parts: each token, medium, slot and feature row is one part's, and routes bring it where it is looked at."""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate, islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from split_batches import MODEL, Made, made_batch, made_packs, without_fusion

from mmpt.config import ModelConfig, RunConfig
from mmpt.data.collate import token_grid
from mmpt.data.loader import Loader
from mmpt.parallel.sequence import Splitter, feature_rows, item_costs, share_out
from mmpt.types import AUDIO, IMAGE, NOTHING, TEXT, VIDEO, PackedBatch, Route

PER_TOKEN = ("labels", "token_types", "document_ids", "pool_index", "span_ids")
LAYOUTS = st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (8, 1, 1)])
MASKS = st.sampled_from(["causal", "bidirectional", "media"])

relaxed = settings(deadline=None, max_examples=60)


def masked(mask: str) -> ModelConfig:
    return MODEL.model_copy(update={"transformer": MODEL.transformer.model_copy(update={"mask": mask})})


def marked(batch: PackedBatch) -> PackedBatch:
    """Tokens that are their own numbers; media whose times are the numbers of their items, through all modalities."""
    made, start = {}, 0
    for name in ("images", "audios", "videos"):
        media = getattr(batch, name)
        numbers = torch.arange(start, start + len(media.grid)).repeat_interleave(media.grid[:, 0])
        made[name], start = replace(media, times=numbers.float()), start + len(media.grid)
    return replace(batch, tokens=torch.arange(len(batch.tokens)), **made)


def split(batch: PackedBatch, layout: tuple[int, int, int], model: ModelConfig = MODEL) -> list[PackedBatch]:
    ring, ulysses, tp = layout
    return [Splitter(model, ring, ulysses, tp, part)(batch) for part in range(ring * ulysses * tp)]


def delivered(routes: list[Route], rows: list[list[Any]]) -> list[list[Any]]:
    """What every part receives, of the rows that each has."""
    letters = []
    for route, own in zip(routes, rows, strict=True):
        sent = [own[i] for i in route.send]
        edges = [sum(route.send_sizes[:target]) for target in range(len(routes) + 1)]
        letters.append([sent[start:stop] for start, stop in pairwise(edges)])
    for target, route in enumerate(routes):
        assert route.receive_sizes == tuple(len(letter[target]) for letter in letters)
    return [[row for letter in letters for row in letter[target]] for target in range(len(routes))]


def item_numbers(batch: PackedBatch) -> list[int]:
    """Of a marked batch's items, in order."""
    return [int(media.times[start]) for media in batch.media.values() for start in media.grid[:, 0].cumsum(0) - media.grid[:, 0]]


def feature_names(batch: PackedBatch) -> list[tuple[int, int]]:
    """Item and number of every row of features that the encoders make of a marked batch."""
    rows = feature_rows(MODEL, batch.media).tolist()
    return [(item, row) for item, count in zip(item_numbers(batch), rows, strict=True) for row in range(count)]


@relaxed
@given(made_packs, LAYOUTS)
def test_every_token_stands_with_one_part(packs: list[list[Made]], layout: tuple[int, int, int]):
    whole = marked(made_batch(packs))
    parts = split(whole, layout)
    assert torch.cat([part.tokens for part in parts]).sort().values.equal(whole.tokens)
    for number, part in enumerate(parts):
        assert (part.split.part, part.split.parts, len(part.tokens)) == (number, len(parts), len(whole.tokens) // len(parts))
        for name in PER_TOKEN:
            assert getattr(part, name).equal(getattr(whole, name)[part.tokens]), name
        assert part.position_ids.equal(whole.position_ids[:, part.tokens])
        assert (part.packs, part.kinds, part.provenance, part.report) == (
            whole.packs,
            whole.kinds,
            whole.provenance,
            whole.report,
        )
        begins = part.segments.first >= 0
        assert part.tokens[part.segments.first[begins]].equal(whole.segments.first[begins])
    assert sum((part.segments.first >= 0).long() for part in parts).tolist() == [1] * len(whole.segments.first)


@relaxed
@given(made_packs, LAYOUTS)
def test_every_feature_comes_to_the_tokens_that_show_it(packs: list[list[Made]], layout: tuple[int, int, int]):
    whole = marked(made_batch(packs))
    parts, names = split(whole, layout), feature_names(whole)
    assert sorted(item for part in parts for item in item_numbers(part)) == item_numbers(whole)
    received = delivered([part.split.features for part in parts], [feature_names(part) for part in parts])
    for part, rows in zip(parts, received, strict=True):
        shown = whole.media_index[part.tokens]
        assert [rows[i] if i >= 0 else None for i in part.media_index] == [names[i] if i >= 0 else None for i in shown]
        assert len(set(rows)) == len(rows)


@relaxed
@given(made_packs, LAYOUTS)
def test_items_are_whole(packs: list[list[Made]], layout: tuple[int, int, int]):
    """Pixels and frames, shapes and times of every item, with the part that has it."""
    whole = made_batch(packs)
    numbers = [item_numbers(part) for part in split(marked(whole), layout)]
    for part, owned in zip(split(whole, layout), numbers, strict=True):
        start = 0
        for media, own in zip(whole.media.values(), part.media.values(), strict=True):
            mine = [number - start for number in owned if 0 <= number - start < len(media.grid)]
            assert own.grid.equal(media.grid[mine])
            assert own.values.equal(stretches(media.values, media.grid.prod(1), mine))
            assert own.times.equal(stretches(media.times, media.grid[:, 0], mine))
            assert own.cu_seqlens.tolist() == [0, *accumulate(own.grid.prod(1).tolist())]
            start += len(media.grid)


def stretches(values: torch.Tensor, lengths: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """Those with these numbers, of stretches of `lengths` end to end."""
    parts = values.split(lengths.tolist())
    return torch.cat([values[:0], *(parts[number] for number in numbers)])


@relaxed
@given(made_packs, LAYOUTS, st.booleans(), st.booleans())
def test_every_slot_gets_its_medium_and_its_tokens(
    packs: list[list[Made]], layout: tuple[int, int, int], mean: bool, fusion: bool
):
    whole = marked(made_batch(packs, mean=mean))
    whole = whole if fusion else without_fusion(whole)
    parts = split(whole, layout)
    before = {IMAGE: 0, AUDIO: len(whole.images.grid), VIDEO: len(whole.images.grid) + len(whole.audios.grid)}
    items = delivered([part.split.items for part in parts], [item_numbers(part) for part in parts])
    tokens = delivered([part.split.pooled for part in parts], [part.tokens.tolist() for part in parts])
    assert sorted(torch.cat([part.split.slot_numbers for part in parts]).tolist()) == list(range(len(whole.slots.pair)))
    for part, rows, pooled in zip(parts, items, tokens, strict=True):
        numbers = part.split.slot_numbers
        for name, values in vars(whole.slots).items():
            assert getattr(part.slots, name).equal(values[numbers])
        for modality, item, row in zip(part.slots.modality.tolist(), part.slots.item.tolist(), part.split.item_rows, strict=True):
            assert row == 0 if modality == TEXT else rows[row] == before[modality] + item
        assert whole.pool_index[pooled].equal(numbers[part.split.pooled_slots])
    assert sorted(token for pooled in tokens for token in pooled) == (whole.pool_index >= 0).nonzero().flatten().tolist()


@relaxed
@given(made_packs, LAYOUTS)
def test_slots_are_shared_evenly_by_whole_documents(packs: list[list[Made]], layout: tuple[int, int, int]):
    whole = made_batch(packs)
    parts = split(whole, layout)
    documents = [set(part.slots.pair.tolist()) for part in parts]
    assert sum(map(len, documents)) == len(set().union(*documents))
    sizes, largest = [len(part.slots.pair) for part in parts], torch.bincount(whole.slots.pair, minlength=1).max()
    assert max(sizes) - min(sizes) <= largest


@relaxed
@given(made_packs, LAYOUTS, MASKS)
def test_the_rings_slices_are_the_batchs_mask(packs: list[list[Made]], layout: tuple[int, int, int], mask: str):
    """Of every query and key of the whole batch, the slices of all ring ranks cover those that see each other, once."""
    whole, model = marked(made_batch(packs)), masked(mask)
    ring, inner = layout[0], layout[1] * layout[2]
    parts = split(whole, layout, model)
    assert all(equal(part.split.attention, parts[number // inner * inner].split.attention) for number, part in enumerate(parts))
    tokens = [torch.cat([part.tokens for part in parts[rank * inner : (rank + 1) * inner]]) for rank in range(ring)]
    plans = [parts[rank * inner].split.attention for rank in range(ring)]
    covered = torch.zeros(len(whole.tokens), len(whole.tokens), dtype=torch.int64)
    for rank, plan in enumerate(plans):
        for hop, slices in enumerate(plan.slices):
            source = plans[(rank - hop) % ring]
            start = sum(source.send_sizes[:hop])
            keys = (
                tokens[(rank - hop) % ring]
                if hop == 0
                else tokens[(rank - hop) % ring][source.send[start:][: source.send_sizes[hop]]]
            )
            assert len(keys) == plan.receive_sizes[hop]
            for piece in slices:
                queries, seen = tokens[rank][piece.q_start : piece.q_stop], keys[piece.k_start : piece.k_stop]
                area = torch.ones(len(queries), len(seen), dtype=torch.int64)
                covered[queries[:, None], seen] += area.tril() if piece.causal else area
    assert covered.equal(dense_mask(whole, mask).long())


def dense_mask(batch: PackedBatch, mask: str) -> torch.Tensor:
    ids, spans = batch.document_ids, batch.span_ids
    within = (ids[:, None] == ids) & (ids >= 0)
    if mask == "bidirectional":
        return within
    causal = batch.tokens[:, None] >= batch.tokens
    return within & (causal | (mask == "media") & (spans[:, None] == spans) & (spans >= 0))


def equal(one: Any, other: Any) -> bool:
    """Of dataclasses, tuples, tensors and plain values."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.equal(other)
    if is_dataclass(one):
        return all(equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


@settings(deadline=None, max_examples=10)
@given(made_packs, LAYOUTS)
def test_it_is_a_pure_function_that_workers_can_have(packs: list[list[Made]], layout: tuple[int, int, int]):
    batch, kept = made_batch(packs), made_batch(packs)
    splitter = Splitter(MODEL, *layout, 0)
    assert equal(splitter(batch), pickle.loads(pickle.dumps(splitter))(batch))
    assert equal(batch, kept)
    assert equal(splitter(batch).to("cpu"), splitter(batch))


def test_feature_rows_are_those_that_packs_count():
    batch = made_batch([[Made(((IMAGE, 3), (VIDEO, 2), (AUDIO, 5), (VIDEO, 1), (IMAGE, 1)))]])
    grids = [token_grid(MODEL, modality, shape) for modality, media in batch.media.items() for shape in media.grid.tolist()]
    assert (
        feature_rows(MODEL, batch.media).tolist() == [time * height * width for time, height, width in grids] == [3, 1, 5, 4, 2]
    )


def test_costs_by_hand():
    """Width 16, one layer, 2 heads of 8, SwiGLU of 24: 16 * (48 + 16 + 72) = 2176 multiplications a row, and 32 for each key."""
    batch = made_batch([[Made(((IMAGE, 3), (AUDIO, 5), (VIDEO, 2)))]])
    image, sound, clip = 12 * (2176 + 16 * 12 + 32 * 12), 10 * (2176 + 16 * 80 + 32 * 10), 3 * 8 * (2176 + 16 * 12 + 32 * 8)
    assert item_costs(MODEL, batch.media) == [image, sound, clip]


@given(st.lists(st.integers(1, 10**12), max_size=30), st.integers(1, 9))
def test_shares_by_cost_are_near_equal(costs: list[int], parts: int):
    """No part has more than the mean and one of the costliest."""
    owner = share_out(costs, parts)
    loads = [sum(cost for cost, its in zip(costs, owner.tolist(), strict=True) if its == part) for part in range(parts)]
    assert sum(loads) == sum(costs) and max(loads) * parts <= sum(costs) + parts * max(costs, default=0)


def test_one_large_picture_weighs_as_many_small_ones():
    """By count each part would have four pictures; by cost the large one stands alone."""
    small = [Made(((IMAGE, 2),)) for _ in range(7)]
    whole = made_batch([[Made(((IMAGE, 40),)), *small]])
    assert sorted(len(part.images.grid) for part in split(whole, (2, 1, 1))) == [1, 7]


def test_tokens_that_cannot_be_shared_are_refused():
    batch = made_batch([[Made(((TEXT, 5),))]], multiple=6)
    with pytest.raises(AssertionError, match=r"6 tokens cannot be shared equally by 4 ranks"):
        Splitter(MODEL, 4, 1, 1, 0)(batch)


def test_nothing_but_padding():
    """Every part takes part, with routes that bring nothing."""
    for part in split(made_batch([[Made(((IMAGE, 4),), lost=True)]]), (2, 2, 1)):
        assert part.document_ids.tolist() == [NOTHING] * 2
        assert not any(sum(route.receive_sizes) for route in (part.split.features, part.split.items, part.split.pooled))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_split_out_of_the_loader(four_config: RunConfig, workers: int):
    config = four_config.model_copy(update={"data": four_config.data.model_copy(update={"workers": workers})})
    whole = list(islice(Loader(config, rank=0, world_size=1), 2))
    splitter = Splitter(config.model, 2, 1, 1, 1)
    for found, expected in zip(
        islice(Loader(config, rank=0, world_size=1, finish=splitter), 2), map(splitter, whole), strict=True
    ):
        expected = replace(expected, report=found.report)  # whose clocks differ
        assert equal(found, expected) and found.split.part == 1
