from types import SimpleNamespace

import pytest
import torch
from fakes import slots_only
from torch import nn

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import sequential_batches
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import embed, embed_items, embed_texts
from mmpt.evaluate.prompts import text_batches
from mmpt.evaluate.split import HeldOut
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import AUDIO, IMAGE, TEXT, VIDEO, PackedBatch, Text

CHOSEN = {"level": "tower", "item": IMAGE}


class ContentModel(nn.Module):
    """The tower embedding of a slot is its content, in bf16 as under autocast; that of the backbone its opposite."""

    def forward(self, batch: PackedBatch) -> SimpleNamespace:
        assert not self.training and not torch.is_grad_enabled()
        content = batch.slots.content[:, None].bfloat16()
        return SimpleNamespace(
            embeddings={"tower": SimpleNamespace(vectors=content), "backbone": SimpleNamespace(vectors=-content)}
        )


def test_owners_are_numbered_over_all_batches():
    batches = [
        slots_only("abc", [(TEXT, 1, 21), (IMAGE, 0, 10), (TEXT, 0, 20), (IMAGE, 1, 11), (IMAGE, 2, 12), (TEXT, 2, 20)]),
        slots_only("de", [(IMAGE, 1, 14), (TEXT, 0, 23), (TEXT, 1, 24), (IMAGE, 0, 13), (TEXT, 1, 25)]),
    ]
    model = ContentModel().train()
    result = embed(model, batches, "cpu", **CHOSEN)
    assert result.items.flatten().tolist() == [10, 11, 12, 14, 13]
    assert result.keys == ("a", "b", "c", "e", "d")
    assert result.texts.flatten().tolist() == [21, 20, 20, 23, 24, 25]  # equal texts are kept
    assert result.owner.tolist() == [1, 0, 2, 4, 3, 3]
    assert result.items.dtype == torch.float32
    assert model.training
    assert embed(model, batches, "cpu", level="backbone", item=IMAGE).items.flatten().tolist() == [-10, -11, -12, -14, -13]


def test_each_modality_is_an_item_by_itself():
    mixed = [(IMAGE, 0, 10), (AUDIO, 0, 20), (TEXT, 0, 30), (VIDEO, 1, 41), (TEXT, 1, 31), (AUDIO, 2, 22)]
    for item, items, texts in ((IMAGE, [10], [30]), (AUDIO, [20], [30]), (VIDEO, [41], [31])):
        found = embed(ContentModel(), [slots_only("abc", mixed)], "cpu", level="tower", item=item)
        assert (found.items.flatten().tolist(), found.texts.flatten().tolist()) == (items, texts)
    sounds, keys = embed_items(ContentModel(), [slots_only("abc", mixed)] * 2, "cpu", level="tower", item=AUDIO)
    assert (sounds.flatten().tolist(), keys) == ([20, 22] * 2, ("a", "c") * 2)  # with a text beside them or without


def test_documents_with_one_side_are_left_out():
    batches = [slots_only("ab", [(IMAGE, 0, 1)]), slots_only("cde", [(IMAGE, 0, 2), (IMAGE, 2, 3), (TEXT, 2, 4), (TEXT, 1, 5)])]
    result = embed(ContentModel(), batches, "cpu", **CHOSEN)
    assert (result.keys, result.owner.tolist()) == (("e",), [0])
    assert (result.items.item(), result.texts.item()) == (3, 4)
    with pytest.raises(ValueError, match="none of 2 documents has embeddings of both"):
        embed(ContentModel(), batches[:1], "cpu", **CHOSEN)
    with pytest.raises(ValueError, match=r"none of 5 documents has an embedding of an item \(video\)"):
        embed_items(ContentModel(), batches, "cpu", level="tower", item=VIDEO)
    with pytest.raises(ValueError, match="document b of hand has 2 items"):
        embed(ContentModel(), [slots_only("ab", [(IMAGE, 1, 1), (IMAGE, 1, 2), (TEXT, 1, 3)])], "cpu", **CHOSEN)


def test_texts_are_cut_to_the_longest_segment_and_keep_their_order(tiny_config: RunConfig, tokenizer: Tokenizer):
    config = tiny_config.model_copy(
        update={"data": tiny_config.data.model_copy(update={"pack_tokens": 20, "packs_per_batch": 1})}
    )
    texts = ["a red disc", "then " * 40, "", "a blue box", "another"]
    batches = list(text_batches(texts, tokenizer, config))
    assert 1 < len(batches) < len(texts)
    rows = [batch.tokens[batch.document_ids == segment].tolist() for batch in batches for segment in batch.document_ids.unique()]
    assert rows == [[tokenizer.bos, *tokenizer.encode(text)[:18], tokenizer.emb] for text in texts]
    assert all(batch.slots.modality.tolist() == [TEXT] * len(batch.segments.document) for batch in batches)


@pytest.fixture
def tiny_model(tiny_config: RunConfig) -> MultimodalModel:
    return MultimodalModel(tiny_config.model).initialize(seed=0)


def test_embeddings_do_not_depend_on_the_batch(tiny_config: RunConfig, tiny_model: MultimodalModel):
    corpus, tokenizer = Corpus.open(load_spec(tiny_config.data.spec), "val"), Tokenizer.of(tiny_config.data)
    chosen = {"level": "backbone", "item": IMAGE}
    together = embed(tiny_model, sequential_batches(corpus, tokenizer, tiny_config), "cpu", **chosen)
    alone = tiny_config.model_copy(update={"data": tiny_config.data.model_copy(update={"packs_per_batch": 1})})
    apart = embed(tiny_model, sequential_batches(corpus, tokenizer, alone), "cpu", **chosen)
    assert together.keys == apart.keys
    torch.testing.assert_close(together.items, apart.items, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.texts, apart.texts, atol=1e-5, rtol=0)
    assert together.owner.equal(apart.owner)
    torch.testing.assert_close(together.items.norm(dim=1), torch.ones(len(together.items)))


def test_a_text_by_itself_is_embedded_as_beside_its_picture(tiny_config: RunConfig, tiny_model: MultimodalModel):
    held_out = HeldOut(tiny_config, tiny_config.data.spec, "val")
    found = embed(tiny_model, held_out.batches(), "cpu", level="backbone", item=IMAGE)
    first = [next(p.text for p in held_out.document(key).parts if isinstance(p, Text)) for key in found.keys]
    alone = embed_texts(tiny_model, first, held_out.tokenizer, tiny_config, "cpu", level="backbone")
    torch.testing.assert_close(alone[found.owner], found.texts, atol=1e-5, rtol=0)
    assert (alone[:1] - alone[1:]).abs().amax(dim=1).min() > 1e-3
