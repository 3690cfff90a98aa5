"""Small configs keep the structure of the large ones; made-up batches hold every mixture, and documents that rings must cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt.config import RunConfig, load, load_model
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.layout import faults_of
from mmpt.parallel.sequence import Splitter
from mmpt.types import IGNORE, MASKED, NEXT_TOKEN, SPAN, PackedBatch
from mmpt.verify.families import FAMILIES, families, shrink
from mmpt.verify.mixes import TASTES, batch_of, draw, random_tastes
from mmpt.verify.table import SEED
from mmpt.verify.wall import PACKS, WALL, Case, cases

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo.yaml"
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_shipped_model_is_made_small(path: Path):
    large = load_model(path)
    run = load(DEMO)
    small = shrink(run.model_copy(update={"model": large})).model
    assert sum(p.numel() for p in MultimodalModel(small).parameters()) < 400_000
    sizes = {"dim", "layers", "n_heads", "n_kv_heads", "ffn_dim", "max_positions", "window", "rope_sections", "rope_scaling"}
    for name in ("image", "audio", "transformer"):
        whole, part = getattr(large, name), getattr(small, name)
        assert (whole is None) == (part is None)
        if whole:
            same = type(whole).model_fields.keys() - sizes - {"experts", "init", "patch", "merge", "size", "stem_dims"}
            assert part.model_dump(include=same - {"frames_per_token"}) == whole.model_dump(include=same - {"frames_per_token"})
            assert (whole.n_heads > whole.kv_heads) == (part.n_heads > part.kv_heads)
    for name in ("rope_scaling", "experts", "rope_sections", "window"):
        assert bool(getattr(large.transformer, name)) == bool(getattr(small.transformer, name))
    assert (large.fusion, large.levels, large.head, large.pool) == (small.fusion, small.levels, small.head, small.pool)


def batches(config: RunConfig, data: int = 1) -> list[PackedBatch]:
    packs = draw(config, TASTES, SEED)
    share = PACKS // data
    return [batch_of(config, packs[start : start + share]) for start in range(0, PACKS, share)]


def test_a_seed_draws_the_same_again():
    config = families(load(DEMO))["four modalities"]
    (one,), (other,) = batches(config), batches(config)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.videos.values, other.videos.values)
    (another,) = [batch_of(config, draw(config, TASTES, SEED + 1))]
    assert not torch.equal(one.tokens, another.tokens)


def test_the_packs_of_the_wall_hold_everything_and_nothing():
    config = families(load(DEMO))["four modalities"]
    (whole,), each = batches(config), batches(config, PACKS)
    assert set(whole.segments.task.tolist()) == {NEXT_TOKEN, MASKED, SPAN}
    assert all(len(media.grid) for media in whole.media.values()) and len(whole.slots.pair)
    shown = {modality: [bool(len(batch.media[modality].grid)) for batch in each] for modality in whole.media}
    assert all(any(has) and not all(has) for has in shown.values())
    labelled = [bool((batch.labels != IGNORE).any()) for batch in each]
    assert any(labelled) and not all(labelled)
    assert any(not batch.documents for batch in each)


def test_some_documents_and_media_do_not_read():
    config = families(load(DEMO))["four modalities"]
    found = [entry for seed in range(8) for entry in draw(config, TASTES[-1:], seed)[0]]
    assert any(not entry.segments for entry in found)
    assert any(item is None for entry in found for items in entry.items.values() for item in items)


@pytest.mark.parametrize("family", ["demo", *FAMILIES])
@pytest.mark.parametrize(("ring", "data"), [(2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (4, 2)])
def test_a_ring_has_keys_to_pass_on(family: str, ring: int, data: int):
    """Documents that lie whole on one rank each would let any ring pass."""
    config = families(load(DEMO))[family]
    moved = [Splitter(config.model, ring, 1, 1, 0)(batch).split.remote for batch in batches(config, data)]
    assert max(moved) > 0, moved


def test_random_mixes_leave_anything_out():
    chance = np.random.default_rng(0)
    config = families(load(DEMO))["four modalities"]
    found = [batch_of(config, draw(config, random_tastes(1, chance), seed)) for seed in range(60)]
    for has in ("documents", "images", "audios", "videos"):
        counts = [batch.documents if has == "documents" else len(getattr(batch, has).grid) for batch in found]
        assert min(counts) == 0 < max(counts)
    assert {bool((batch.labels != IGNORE).any()) for batch in found} == {True, False}
    assert {bool(len(batch.slots.pair)) for batch in found} == {True, False}


def test_layouts_are_told_apart_and_allowed():
    assert len(set(map(str, WALL))) == len(set(WALL)) == len(WALL)
    assert [len(cases(ranks)) for ranks in (1, 8)] == [0, len(WALL)]
    assert max(case.layout.ranks for case in cases(4)) == 4
    config = families(load(DEMO))["Llama"]
    refused = [str(case) for case in WALL if next(faults_of(case.layout, case.of(config)), None)]
    assert refused == []
    assert str(cases(8)[-1]) == "2 shards, ring of 2, matrices over 2"


def test_a_cached_contrast_is_that_of_one_batch():
    cached = [case for case in WALL if case.grad_cache]
    assert cached and all(case.reference == Case(layout=case.reference.layout) for case in cached)
    assert {case.reference.accumulate for case in WALL if not case.grad_cache} == {1, 2, 4}
