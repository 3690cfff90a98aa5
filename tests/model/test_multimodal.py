"""The whole model on batches made by the real packing: what may see what, what is counted, what costs nothing."""

from dataclasses import replace

import pytest
import torch

from mmpt.config import ModelConfig, RunConfig, load
from mmpt.data.loader import Loader
from mmpt.model.multimodal import MultimodalModel, parameter_counts
from mmpt.types import IMAGE, NOTHING, TEXT, EmbeddingSlots, MediaBatch, PackedBatch


@pytest.fixture
def batch(tiny_config: RunConfig) -> PackedBatch:
    return next(iter(Loader(tiny_config, rank=0, world_size=1)))


@pytest.fixture
def model(tiny_config: RunConfig) -> MultimodalModel:
    return MultimodalModel(tiny_config.model).initialize(seed=1)


def with_other_picture(batch: PackedBatch, item: int) -> PackedBatch:
    """The same batch with every pixel of one picture inverted."""
    start, stop = batch.images.cu_seqlens[item : item + 2]
    patches = batch.images.values.clone()
    patches[start:stop] = 255 - patches[start:stop]
    return replace(batch, images=replace(batch.images, values=patches))


def test_a_captions_embedding_does_not_move_with_the_picture(model: MultimodalModel, batch: PackedBatch):
    """The leak test: every picture is changed; no text's embedding moves by one bit, every picture's does."""
    changed = batch
    for item in range(len(batch.images.grid)):
        changed = with_other_picture(changed, item)
    before, after = model(batch).embeddings, model(changed).embeddings
    texts = batch.slots.modality == TEXT
    assert texts.any() and (~texts).any()
    assert torch.equal(before[texts], after[texts])
    assert (before[~texts] != after[~texts]).any(dim=1).all()


def test_a_pictures_embedding_does_not_move_with_the_text(model: MultimodalModel, batch: PackedBatch):
    """Every text token is changed, media slots and <emb> are not: no picture's embedding moves."""
    plain = (batch.media_index == NOTHING) & (batch.pool_index == NOTHING) & (batch.document_ids != NOTHING)
    other = replace(batch, tokens=torch.where(plain, (batch.tokens + 7) % model.config.vocabulary, batch.tokens))
    before, after = model(batch).embeddings, model(other).embeddings
    images = batch.slots.modality == IMAGE
    assert torch.equal(before[images], after[images])
    assert (before[~images] != after[~images]).any(dim=1).all()


def test_one_document_does_not_touch_another(model: MultimodalModel, batch: PackedBatch):
    """Perturb the tokens of one segment: the hidden states of all others stay equal bit for bit."""
    inside = batch.document_ids == batch.document_ids[0]
    other = replace(batch, tokens=torch.where(inside, (batch.tokens + 1) % model.config.vocabulary, batch.tokens))
    before, after = model(batch).hidden, model(other).hidden
    assert torch.equal(before[~inside], after[~inside])
    assert not torch.equal(before[inside], after[inside])


def test_the_caption_follows_from_the_picture(model: MultimodalModel, batch: PackedBatch):
    """Hidden states at labelled positions of a picture's row do move with the picture: captions are predicted given it."""
    row = batch.document_ids == batch.document_ids[batch.media_index == 0]
    labelled = row & (batch.labels != -100)
    assert labelled.any()
    before, after = model(batch).hidden, model(with_other_picture(batch, 0)).hidden
    assert (before[labelled] != after[labelled]).any(dim=1).all()


def test_a_batch_without_pictures_reaches_every_parameter(model: MultimodalModel, batch: PackedBatch):
    """Ranks without a picture run the encoder all the same, with gradients of exactly zero."""
    empty = MediaBatch(
        values=batch.images.values[:0],
        cu_seqlens=torch.zeros(1, dtype=torch.int64),
        grid=batch.images.grid[:0],
        times=torch.empty(0),
    )
    nothing = torch.full_like(batch.tokens, NOTHING)
    none = torch.empty(0, dtype=torch.int64)
    blind = replace(
        batch,
        images=empty,
        media_index=nothing,
        pool_index=nothing,
        slots=EmbeddingSlots(modality=none, pair=none, content=none),
    )
    model(blind).hidden.sum().backward()
    gradients = {name: p.grad for name, p in model.image_encoder.named_parameters()}
    assert all(grad is not None and (grad == 0).all() for grad in gradients.values()), gradients


def test_the_order_of_documents_in_a_batch_changes_nothing(model: MultimodalModel, batch: PackedBatch):
    """Two copies of a batch end to end give the same embeddings twice."""
    slots, media, documents = len(batch.slots.pair), int(batch.media_index.max()) + 1, int(batch.document_ids.max()) + 1

    def shifted(index: torch.Tensor, by: int) -> torch.Tensor:
        return torch.where(index >= 0, index + by, index)

    double = replace(
        batch,
        **{name: torch.cat([getattr(batch, name)] * 2) for name in ("tokens", "labels", "position_ids")},
        document_ids=torch.cat([batch.document_ids, shifted(batch.document_ids, documents)]),
        media_index=torch.cat([batch.media_index, shifted(batch.media_index, media)]),
        pool_index=torch.cat([batch.pool_index, shifted(batch.pool_index, slots)]),
        images=MediaBatch(
            values=torch.cat([batch.images.values] * 2),
            cu_seqlens=torch.cat([batch.images.cu_seqlens, batch.images.cu_seqlens[1:] + batch.images.cu_seqlens[-1]]),
            grid=torch.cat([batch.images.grid] * 2),
            times=torch.cat([batch.images.times] * 2),
        ),
        slots=EmbeddingSlots(
            modality=batch.slots.modality.repeat(2), pair=batch.slots.pair.repeat(2), content=batch.slots.content.repeat(2)
        ),
    )
    once, twice = model(batch).embeddings, model(double).embeddings
    torch.testing.assert_close(twice, once.repeat(2, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_pictures_of_several_shapes_are_encoded_as_if_alone(tiny_config: RunConfig, stem: str):
    image = tiny_config.model.image.model_copy(update={"stem": stem, "stem_dims": (8, 8, 8) if stem == "conv" else ()})
    encoder = MultimodalModel(ModelConfig(**{**dict(tiny_config.model), "image": image})).initialize(seed=0).image_encoder
    shapes = [(2, 4), (4, 2), (2, 4), (6, 2)]
    items = [torch.randint(0, 256, (h * w, 3 * 8 * 8), dtype=torch.uint8) for h, w in shapes]

    def pack(chosen: list[int]) -> MediaBatch:
        lengths = torch.tensor([0, *(len(items[i]) for i in chosen)])
        grid = torch.tensor([[1, *shapes[i]] for i in chosen])
        values = torch.cat([items[i] for i in chosen])
        return MediaBatch(values=values, cu_seqlens=lengths.cumsum(0), grid=grid, times=torch.zeros(len(chosen)))

    alone = torch.cat([encoder(pack([i])) for i in range(4)])
    torch.testing.assert_close(encoder(pack([0, 1, 2, 3])), alone, rtol=1e-4, atol=1e-5)


def test_the_real_size_builds_on_meta_and_is_counted_by_hand():
    config = load("configs/base_1b.yaml").model
    with torch.device("meta"):
        counts = parameter_counts(MultimodalModel(config))
    c, i = config.transformer, config.image

    def body(dim: int, layers: int, kv_dim: int, ffn: int, head_dim: int) -> int:
        attention = dim * (dim + 2 * kv_dim) + dim * dim + 2 * head_dim
        return layers * (attention + 3 * dim * ffn + 2 * dim) + dim

    assert counts["transformer"] == body(c.dim, c.layers, c.n_kv_heads * c.head_dim, c.ffn_dim, c.head_dim)
    stem = 3 * i.patch**2 * i.dim + i.dim
    project = i.merge**2 * i.dim * c.dim + c.dim
    assert counts["image_encoder"] == stem + body(i.dim, i.layers, i.dim, i.ffn_dim, i.dim // i.n_heads) + project
    assert counts["embed_tokens"] == config.vocabulary * c.dim
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")
