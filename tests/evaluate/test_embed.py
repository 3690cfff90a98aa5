from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmpt.config import ImageEncoderConfig, RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import sequential_batches
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import captions, embed
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import (
    IMAGE,
    NOTHING,
    TEXT,
    DocumentRef,
    EmbeddingSlots,
    LoaderState,
    LoadReport,
    MediaBatch,
    PackedBatch,
    PlanCursor,
)

STATE = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
NO_IMAGES = MediaBatch(
    values=torch.zeros(0, 3, dtype=torch.uint8),
    cu_seqlens=torch.zeros(1, dtype=torch.long),
    grid=torch.zeros(0, 3).long(),
    times=torch.zeros(0),
)


def slots_only(keys: str, slots: list[tuple[int, int, int]]) -> PackedBatch:
    """A batch of documents `keys` with embedding slots (modality, document, content) and nothing else in it."""
    modality, pair, content = torch.tensor(slots).T
    nothing = torch.zeros(0, dtype=torch.long)
    return PackedBatch(
        tokens=nothing,
        labels=nothing,
        position_ids=nothing,
        document_ids=nothing,
        media_index=nothing,
        pool_index=nothing,
        images=NO_IMAGES,
        slots=EmbeddingSlots(modality=modality, pair=pair, content=content),
        audios=NO_IMAGES,
        videos=NO_IMAGES,
        provenance=tuple(DocumentRef(source="hand", key=key, epoch=0, piece=0, pack=0, position=0, seed=0) for key in keys),
        state=STATE,
        report=LoadReport(milliseconds={}, tokens={}, faults=()),
    )


class ContentModel(nn.Module):
    """The embedding of a slot is its content, in bf16 as under autocast."""

    def forward(self, batch: PackedBatch) -> SimpleNamespace:
        assert not self.training and not torch.is_grad_enabled()
        return SimpleNamespace(embeddings=batch.slots.content[:, None].bfloat16())


def test_owners_are_numbered_over_all_batches():
    batches = [
        slots_only("abc", [(TEXT, 1, 21), (IMAGE, 0, 10), (TEXT, 0, 20), (IMAGE, 1, 11), (IMAGE, 2, 12), (TEXT, 2, 20)]),
        slots_only("de", [(IMAGE, 1, 14), (TEXT, 0, 23), (TEXT, 1, 24), (IMAGE, 0, 13), (TEXT, 1, 25)]),
    ]
    model = ContentModel().train()
    result = embed(model, batches, "cpu")
    assert result.items.flatten().tolist() == [10, 11, 12, 14, 13]
    assert result.keys == ("a", "b", "c", "e", "d")
    assert result.documents.tolist() == [0, 1, 2, 4, 3]
    assert result.texts.flatten().tolist() == [21, 20, 20, 23, 24, 25]  # equal texts are kept
    assert result.owner.tolist() == [1, 0, 2, 4, 3, 3]
    assert result.items.dtype == torch.float32
    assert model.training


def test_documents_with_one_side_are_left_out():
    batches = [slots_only("ab", [(IMAGE, 0, 1)]), slots_only("cde", [(IMAGE, 0, 2), (IMAGE, 2, 3), (TEXT, 2, 4), (TEXT, 1, 5)])]
    result = embed(ContentModel(), batches, "cpu")
    assert (result.keys, result.documents.tolist(), result.owner.tolist()) == (("e",), [4], [0])
    assert (result.items.item(), result.texts.item()) == (3, 4)
    with pytest.raises(ValueError, match="none of 2 documents has both"):
        embed(ContentModel(), batches[:1], "cpu")
    with pytest.raises(ValueError, match="document b of hand has 2 items"):
        embed(ContentModel(), [slots_only("ab", [(IMAGE, 1, 1), (IMAGE, 1, 2), (TEXT, 1, 3)])], "cpu")


class ScriptedModel(nn.Module):
    """Says, for a picture of brightness b, the tokens of script[b]; loves special tokens and rows beyond the vocabulary more."""

    def __init__(self, tokenizer: Tokenizer, script: dict[int, list[int]]) -> None:
        super().__init__()
        self.script, self.vocabulary = script, len(tokenizer) + 5
        self.loved = [tokenizer.pad, tokenizer.bos, tokenizer.media, tokenizer.emb, len(tokenizer) + 2]

    def forward(self, batch: PackedBatch) -> SimpleNamespace:
        hidden = torch.zeros(len(batch.tokens), self.vocabulary)
        hidden[:, self.loved] = 2.0
        for segment in batch.document_ids.unique():
            positions = (batch.document_ids == segment).nonzero().flatten()
            media = int((batch.media_index[positions] >= 0).sum())
            assert batch.position_ids[positions].tolist() == list(range(len(positions)))
            patch = int(batch.images.cu_seqlens[segment])
            said = len(positions) - media - 2
            hidden[positions[-1], self.script[int(batch.images.values[patch, 0])][said]] = 1.0
        return SimpleNamespace(hidden=hidden, output_weight=torch.eye(self.vocabulary))


def test_captions_go_on_until_eos_each_by_itself():
    tokenizer = Tokenizer.train(["red apple", "cat"], vocabulary=270)
    config = ImageEncoderConfig(size=8, patch=4, dim=16, n_heads=1)
    script = {0: tokenizer.encode("cat"), 1: [], 2: tokenizer.encode("red apple"), 3: tokenizer.encode("on and on " * 9)}
    model = ScriptedModel(tokenizer, {brightness: [*tokens, tokenizer.eos] for brightness, tokens in script.items()})
    images = torch.tensor([2, 0, 3, 1, 2], dtype=torch.uint8)[:, None, None, None].expand(5, 3, 8, 8)
    written = captions(model, tokenizer, images, config, "cpu", max_tokens=20)
    assert written == ["red apple", "cat", tokenizer.decode(script[3][:20]), "", "red apple"]


@pytest.fixture
def tiny_model(tiny_config: RunConfig) -> MultimodalModel:
    return MultimodalModel(tiny_config.model).initialize(seed=0)


def test_embeddings_do_not_depend_on_the_batch(tiny_config: RunConfig, tiny_model: MultimodalModel):
    corpus, tokenizer = Corpus.open(load_spec(tiny_config.data.spec), "val"), Tokenizer.load(tiny_config.data.tokenizer)
    together = embed(tiny_model, sequential_batches(corpus, tokenizer, tiny_config), "cpu")
    alone = tiny_config.model_copy(update={"data": tiny_config.data.model_copy(update={"packs_per_batch": 1})})
    apart = embed(tiny_model, sequential_batches(corpus, tokenizer, alone), "cpu")
    assert together.keys == apart.keys == tuple(corpus.read(int(number)).key for number in together.documents)
    torch.testing.assert_close(together.items, apart.items, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.texts, apart.texts, atol=1e-5, rtol=0)
    assert together.owner.equal(apart.owner)
    torch.testing.assert_close(together.items.norm(dim=1), torch.ones(len(together.items)))


def test_the_prompt_of_a_caption_looks_like_a_training_row(tiny_config: RunConfig, tiny_model: MultimodalModel):
    """The state at <bos> is that of the row [picture, <emb>, <bos>, text...]."""
    tokenizer = Tokenizer.load(tiny_config.data.tokenizer)
    batch = next(iter(sequential_batches(Corpus.open(load_spec(tiny_config.data.spec), "train"), tokenizer, tiny_config)))
    media = tiny_config.model.image.tokens_per_image
    begins = (batch.tokens == tokenizer.bos) & (batch.position_ids == media + 1)  # of the text right behind a first picture
    starts = [p for p in begins.nonzero().flatten().tolist() if batch.media_index[p - 2] != NOTHING]
    assert len(starts) > 3
    with torch.no_grad():
        trained = tiny_model(batch).hidden[starts]
    seen = []
    tiny_model.transformer.register_forward_hook(lambda module, arguments, hidden: seen.append(hidden))
    images = torch.stack([unpatchify(batch, start - 1, tiny_config.model.image) for start in starts])
    captions(tiny_model, tokenizer, images, tiny_config.model.image, "cpu", max_tokens=1)
    (hidden,) = seen
    torch.testing.assert_close(hidden.view(len(starts), media + 2, -1)[:, -1], trained, atol=1e-5, rtol=0)
    assert (trained[0] - trained[1:]).abs().amax(dim=1).min() > 1e-3  # no two pictures look alike to the model


def unpatchify(batch: PackedBatch, emb: int, config: ImageEncoderConfig) -> torch.Tensor:
    """The picture whose slots end before position `emb`."""
    item = int(batch.media_index[emb - 1]) // config.tokens_per_image
    patches = batch.images.values[batch.images.cu_seqlens[item] : batch.images.cu_seqlens[item + 1]]
    side = config.patches_per_side
    return patches.view(side, side, config.patch, config.patch, 3).permute(4, 0, 2, 1, 3).reshape(3, config.size, config.size)
