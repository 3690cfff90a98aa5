"""The whole model on batches made by the real packing: what may see what, what is counted, what costs nothing."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mmpt.config import ModelConfig, RunConfig, load, parse
from mmpt.data.loader import Loader
from mmpt.model.multimodal import MAX_LOG_SCALE, MultimodalModel, parameter_counts
from mmpt.types import IGNORE, IMAGE, MODALITIES, NOTHING, TEXT, VIDEO, EmbeddingSlots, MediaBatch, PackedBatch

VARIANTS = {
    "plain": {},
    "towers as well": {"levels": ["backbone", "tower"]},
    "mean": {"pool": "mean"},
    "media see themselves": {"transformer": {"mask": "media"}},
    "three axes": {"transformer": {"rope_sections": [2, 3, 3]}},
    "experts": {"transformer": {"experts": {"count": 4, "top_k": 2, "shared": 1}}},
    "window": {"transformer": {"window": 9}},
}


def varied(config: RunConfig, changes: dict) -> RunConfig:
    tree = config.model_dump()
    for name, value in changes.items():
        tree["model"][name] = {**tree["model"][name], **value} if isinstance(value, dict) else value
    return parse(tree, where="variant")


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest, four_config: RunConfig) -> RunConfig:
    return varied(four_config, VARIANTS[request.param])


@pytest.fixture
def batch(config: RunConfig) -> PackedBatch:
    return next(iter(Loader(config, rank=0, world_size=1)))


@pytest.fixture
def model(config: RunConfig) -> MultimodalModel:
    return MultimodalModel(config.model).initialize(seed=1)


def with_other_values(media: MediaBatch) -> MediaBatch:
    """Every pixel inverted; every log-mel frame changed."""
    return replace(media, values=255 - media.values if media.values.dtype == torch.uint8 else 0.5 - media.values)


def with_other_media(batch: PackedBatch) -> PackedBatch:
    names = {"images": batch.images, "audios": batch.audios, "videos": batch.videos}
    return replace(batch, **{name: with_other_values(media) for name, media in names.items()})


def vectors(model: MultimodalModel, batch: PackedBatch) -> dict[str, torch.Tensor]:
    return {level: found.vectors for level, found in model(batch).embeddings.items()}


def test_a_texts_embedding_does_not_move_with_the_media(model: MultimodalModel, batch: PackedBatch):
    """The leak test: all media are changed; no text's embedding moves by one bit, every medium's does."""
    before, after = vectors(model, batch), vectors(model, with_other_media(batch))
    texts = batch.slots.modality == TEXT
    assert set(batch.slots.modality.tolist()) == set(range(len(MODALITIES)))
    for level in before:
        assert torch.equal(before[level][texts], after[level][texts]), level
        assert (before[level][~texts] != after[level][~texts]).any(dim=1).all(), level


def test_a_mediums_embedding_does_not_move_with_the_text(model: MultimodalModel, batch: PackedBatch):
    """Every text token is changed, media slots and <emb> are not: no medium's embedding moves."""
    plain = (batch.media_index == NOTHING) & (batch.pool_index == NOTHING) & (batch.document_ids != NOTHING)
    other = replace(batch, tokens=torch.where(plain, (batch.tokens + 7) % model.config.vocabulary, batch.tokens))
    before, after = vectors(model, batch), vectors(model, other)
    media = batch.slots.modality != TEXT
    for level in before:
        torch.testing.assert_close(before[level][media], after[level][media], rtol=1e-5, atol=1e-6)
        if model.config.pool == "last":
            assert (before[level][~media] != after[level][~media]).any(dim=1).all()


def test_one_document_does_not_touch_another(model: MultimodalModel, batch: PackedBatch):
    """Perturb the tokens of one segment: the hidden states of all others stay as they are."""
    inside = batch.document_ids == batch.document_ids[0]
    other = replace(batch, tokens=torch.where(inside, (batch.tokens + 1) % model.config.vocabulary, batch.tokens))
    before, after = model(batch).hidden, model(other).hidden
    if model.config.transformer.experts is None:
        assert torch.equal(before[~inside], after[~inside])
    else:  # experts that get other numbers of rows may sum in another order
        torch.testing.assert_close(before[~inside], after[~inside], rtol=1e-5, atol=1e-6)
    assert not torch.equal(before[inside], after[inside])


def test_texts_follow_from_their_media(model: MultimodalModel, batch: PackedBatch):
    """Hidden states behind media move with them: captions are predicted given what they describe."""
    seen = torch.zeros_like(batch.tokens, dtype=torch.bool)
    last = -1
    for position, (segment, shown) in enumerate(zip(batch.document_ids.tolist(), batch.media_index.tolist(), strict=True)):
        last = segment if shown >= 0 else last
        seen[position] = segment == last and segment >= 0
    near = torch.zeros_like(seen)  # within reach of a window
    near[1:] = (batch.media_index[:-1] >= 0) & (batch.media_index[1:] < 0)
    behind = seen & (near if model.config.transformer.window else batch.labels != IGNORE)
    assert behind.any()
    before, after = model(batch).hidden, model(with_other_media(batch)).hidden
    assert (before[behind] != after[behind]).any(dim=1).all()


def test_a_batch_without_media_reaches_every_parameter(model: MultimodalModel, batch: PackedBatch):
    """Ranks without pictures, sounds or clips run the encoders all the same, with gradients of exactly zero."""
    empty = {
        name: MediaBatch(
            values=media.values[:0], cu_seqlens=torch.zeros(1, dtype=torch.int64), grid=media.grid[:0], times=torch.empty(0)
        )
        for name, media in (("images", batch.images), ("audios", batch.audios), ("videos", batch.videos))
    }
    nothing = torch.full_like(batch.tokens, NOTHING)
    none = torch.empty(0, dtype=torch.int64)
    slots = EmbeddingSlots(modality=none, item=none, pair=none, content=none)
    output = model(replace(batch, **empty, media_index=nothing, pool_index=nothing, slots=slots))
    loss = output.hidden.sum() + sum(found.vectors.sum() + found.scale.sum() * 0 for found in output.embeddings.values())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "encoder" in name:
            assert (parameter.grad == 0).all(), name


def test_every_parameter_has_a_gradient(model: MultimodalModel, batch: PackedBatch):
    output = model(batch)
    loss = output.hidden.square().sum() + output.output_weight.square().sum()
    for found in output.embeddings.values():
        loss = loss + (found.scale * found.vectors @ found.vectors.T).square().sum()
    loss.backward()
    bare = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Keys and values of an item that is one row wide, and an expert that nobody chose, may have none.
    assert all("experts" in name or "ffn.shared" in name for name in bare), bare


def test_two_copies_end_to_end_give_everything_twice(model: MultimodalModel, batch: PackedBatch):
    output, twice = model(batch), model(doubled(batch))
    torch.testing.assert_close(twice.hidden, output.hidden.repeat(2, 1), rtol=1e-4, atol=1e-5)
    for level, found in output.embeddings.items():
        torch.testing.assert_close(twice.embeddings[level].vectors, found.vectors.repeat(2, 1), rtol=1e-4, atol=1e-5)


def doubled(batch: PackedBatch) -> PackedBatch:
    def shifted(index: torch.Tensor) -> torch.Tensor:
        return torch.cat([index, torch.where(index >= 0, index + index.max() + 1, index)])

    def media(found: MediaBatch) -> MediaBatch:
        return MediaBatch(
            values=found.values.repeat(2, 1),
            cu_seqlens=torch.cat([found.cu_seqlens, found.cu_seqlens[1:] + found.cu_seqlens[-1]]),
            grid=found.grid.repeat(2, 1),
            times=found.times.repeat(2),
        )

    # media_index counts through images, sounds and clips: rows of the second copy stand behind those of the first, by modality.
    order, rows = [], media_rows(batch)
    for copy in (0, 1):
        start = 0
        for count in rows:
            order.append(torch.arange(count) + 2 * start + copy * count)
            start += count
    first, second = (torch.cat([*order[copy * len(rows) : (copy + 1) * len(rows)], torch.tensor([NOTHING])]) for copy in (0, 1))
    item = batch.slots.item.clone()
    for modality, found in batch.media.items():
        item[batch.slots.modality == modality] += len(found.grid)
    slots = EmbeddingSlots(
        modality=batch.slots.modality.repeat(2),
        item=torch.cat([batch.slots.item, item]),
        pair=shifted(batch.slots.pair),
        content=batch.slots.content.repeat(2),
    )
    segments = replace(
        batch.segments,
        document=shifted(batch.segments.document),
        task=batch.segments.task.repeat(2),
        next_sentence=batch.segments.next_sentence.repeat(2),
        pack=torch.cat([batch.segments.pack, batch.segments.pack + batch.packs]),
        first=torch.cat([batch.segments.first, batch.segments.first + len(batch.tokens)]),
    )
    return replace(
        batch,
        **{name: torch.cat([getattr(batch, name)] * 2) for name in ("tokens", "labels", "token_types")},
        position_ids=batch.position_ids.repeat(1, 2),
        document_ids=shifted(batch.document_ids),
        media_index=torch.cat([first[batch.media_index], second[batch.media_index]]),
        pool_index=shifted(batch.pool_index),
        span_ids=shifted(batch.span_ids),
        images=media(batch.images),
        audios=media(batch.audios),
        videos=media(batch.videos),
        slots=slots,
        segments=segments,
        packs=2 * batch.packs,
        kinds=batch.kinds.repeat(2),
        provenance=batch.provenance * 2,
    )


def media_rows(batch: PackedBatch) -> list[int]:
    """Feature rows of each modality: pictures and frames of 2 x 2 patches a token, eight log-mel frames a token."""
    grids = {modality: media.grid for modality, media in batch.media.items()}
    areas = {modality: int((grid.prod(1) // (4 if modality in (IMAGE, VIDEO) else 8)).sum()) for modality, grid in grids.items()}
    return list(areas.values())


def test_a_frozen_encoder_keeps_its_weights_and_its_projections_learn(four_config: RunConfig):
    config = varied(four_config, {"image": {"frozen": True}, "levels": ["backbone", "tower"]})
    batch = next(iter(Loader(config, rank=0, world_size=1)))
    model = MultimodalModel(config.model).initialize(seed=1)
    output = model(batch)
    loss = output.hidden.square().sum() + sum(found.vectors.sum() for found in output.embeddings.values())
    loss.backward()
    learning = {name for name, p in model.image_encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"project.weight", "project.bias", "head.weight"}
    assert model.embed_tokens.weight.grad.any()


def test_a_frozen_transformer_still_leads_gradients_to_the_encoders(four_config: RunConfig):
    config = varied(four_config, {"transformer": {"frozen": True}})
    batch = next(iter(Loader(config, rank=0, world_size=1)))
    model = MultimodalModel(config.model).initialize(seed=1)
    model(batch).hidden.square().sum().backward()
    assert all(p.grad is None for p in (*model.transformer.parameters(), model.embed_tokens.weight))
    assert model.image_encoder.project.weight.grad.any()


def test_scales_return_from_beyond_their_bounds(tiny_config: RunConfig):
    """A clamp in the forward pass would have no gradient back; the parameter itself is clamped, after the step."""
    model = MultimodalModel(tiny_config.model).initialize(seed=0)
    model.log_scale["backbone"].data.fill_(9.0)
    model.after_step(None)
    assert model.log_scale["backbone"].item() == pytest.approx(MAX_LOG_SCALE)
    model.log_scale["backbone"].data.fill_(-1.0)
    model.after_step(None)
    assert model.log_scale["backbone"].item() == 0.0


def test_the_real_size_builds_on_meta_and_is_counted_by_hand():
    config = ModelConfig.model_validate(load("configs/demo.yaml").model.model_dump() | {"tie_embeddings": False})
    with torch.device("meta"):
        counts = parameter_counts(MultimodalModel(config))
    c, i = config.transformer, config.image

    def body(dim: int, layers: int, kv_dim: int, ffn: int, head_dim: int) -> int:
        attention = dim * (dim + 2 * kv_dim) + dim * dim + 2 * head_dim
        return layers * (attention + 3 * dim * ffn + 2 * dim) + dim

    assert counts["transformer"] == body(c.dim, c.layers, c.kv_heads * c.head_dim, c.ffn_dim, c.head_dim)
    channels = (3, *i.stem_dims)
    convs = sum(9 * a * b + b for a, b in pairwise(channels))
    stem = convs + i.stem_dims[-1] + i.stem_dims[-1] * i.dim + i.dim
    project = i.merge**2 * i.dim * c.dim + c.dim
    assert counts["image_encoder"] == stem + body(i.dim, i.layers, i.dim, i.ffn_dim, i.dim // i.n_heads) + project
    assert counts["embed_tokens"] == counts["output"] == config.vocabulary * c.dim
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")
