from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmpt.config import ModelConfig, RunConfig, TransformerConfig, parse
from mmpt.data.collate import Item
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.captions import captions
from mmpt.evaluate.split import HeldOut
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import IMAGE, NOTHING, PackedBatch


def flat_picture(brightness: int, rows: int, columns: int) -> Item:
    """Of `rows` x `columns` patches of 4 pixels."""
    return Item(values=torch.full((rows * columns, 48), brightness, dtype=torch.uint8), grid=(1, rows, columns), times=(0.0,))


class ScriptedModel(nn.Module):
    """Says, for a picture of brightness b, the tokens of script[b]; loves special tokens and rows beyond the vocabulary more."""

    def __init__(self, tokenizer: Tokenizer, script: dict[int, list[int]]) -> None:
        super().__init__()
        self.script, self.vocabulary = script, len(tokenizer) + 5
        self.loved = [tokenizer.pad, tokenizer.bos, tokenizer.media, tokenizer.emb, len(tokenizer) + 2]

    def forward(self, batch: PackedBatch) -> SimpleNamespace:
        assert not self.training and not torch.is_grad_enabled()
        hidden = torch.zeros(len(batch.tokens), self.vocabulary)
        hidden[:, self.loved] = 2.0
        for segment in batch.document_ids.unique():
            positions = (batch.document_ids == segment).nonzero().flatten()
            media = int((batch.media_index[positions] >= 0).sum())
            assert batch.position_ids[0, positions].tolist() == list(range(len(positions)))
            assert media == batch.images.grid[segment].prod() // 4
            patch = int(batch.images.cu_seqlens[segment])
            said = len(positions) - media - 2
            hidden[positions[-1], self.script[int(batch.images.values[patch, 0])][said]] = 1.0
        return SimpleNamespace(output_hidden=hidden, output_weight=torch.eye(self.vocabulary), output_bias=None)


def test_captions_go_on_until_eos_each_by_itself():
    tokenizer = Tokenizer.train(["red apple", "cat"], vocabulary=270)
    config = ModelConfig(image={"size": 16, "patch": 4, "merge": 2, "dim": 16, "n_heads": 1, "resize": "native"})
    script = {0: tokenizer.encode("cat"), 1: [], 2: tokenizer.encode("red apple"), 3: tokenizer.encode("on and on " * 9)}
    model = ScriptedModel(tokenizer, {brightness: [*tokens, tokenizer.eos] for brightness, tokens in script.items()})
    sizes = ((2, 4), (4, 4), (2, 2), (2, 4), (4, 2))  # pictures of several shapes side by side
    pictures = [flat_picture(brightness, *size) for brightness, size in zip((2, 0, 3, 1, 2), sizes, strict=True)]
    written = captions(model, tokenizer, pictures, config, "cpu", max_tokens=20)
    assert written == ["red apple", "cat", tokenizer.decode(script[3][:20]), "", "red apple"]
    assert captions(model, tokenizer, [], config, "cpu") == []
    learned = config.model_copy(update={"transformer": TransformerConfig(positions="learned", max_positions=10)})
    cut = captions(model, tokenizer, pictures[2:3], learned, "cpu")
    assert cut == [tokenizer.decode(script[3][:8])]  # a slot, <emb> and <bos>, and seven tokens before the last one


@pytest.mark.parametrize("changes", [{}, {"rope_sections": [4, 2, 2]}, {"mask": "media"}], ids=["", "sections", "media"])
def test_the_prompt_of_a_caption_looks_like_a_training_row(tiny_config: RunConfig, changes: dict):
    """The state at <bos> is that of the row [picture, <emb>, <bos>, text...]."""
    tree = tiny_config.model_dump(mode="json")
    tree["model"]["transformer"] |= changes
    config = parse(tree, where="changed")
    model = MultimodalModel(config.model).initialize(seed=0)
    held_out = HeldOut(config, config.data.spec, "train")
    batch, tokenizer = next(held_out.batches()), held_out.tokenizer
    begins = (batch.tokens == tokenizer.bos).nonzero().flatten().tolist()
    # of the text right behind a first picture
    starts = [p for p in begins if p > 1 and batch.media_index[p - 2] != NOTHING and batch.tokens[p - 1] == tokenizer.emb]
    assert len(starts) > 3
    with torch.no_grad():
        trained = model(batch).hidden[starts]
    seen = []
    model.register_forward_hook(lambda module, arguments, output: seen.append(output.hidden))
    pictures = [picture_before(batch, start, config.model) for start in starts]
    captions(model, tokenizer, pictures, config.model, "cpu", max_tokens=1)
    (hidden,) = seen
    media = config.model.image.tokens_per_image
    torch.testing.assert_close(hidden.view(len(starts), media + 2, -1)[:, -1], trained, atol=1e-5, rtol=0)
    assert (trained[0] - trained[1:]).abs().amax(dim=1).min() > 1e-3  # no two pictures look alike to the model


def picture_before(batch: PackedBatch, start: int, config: ModelConfig) -> Item:
    """The picture whose slots end two places before `start`."""
    number = int(batch.media_index[start - 2]) // config.image.tokens_per_image
    assert batch.slots.modality[batch.pool_index[start - 1]] == IMAGE
    values = batch.images.values[batch.images.cu_seqlens[number] : batch.images.cu_seqlens[number + 1]]
    return Item(values=values, grid=tuple(batch.images.grid[number].tolist()), times=(0.0,))
