"""BERT against transformers' BertForPreTraining: masked words and next sentence, packed against padded, every gradient."""

from pathlib import Path

import torch
import torch.nn.functional as F
from references import (
    assert_all_near,
    assert_near,
    assert_same_bytes,
    built,
    file_tensors,
    our_gradients,
    packed,
    randomized,
    rows_of,
    shrunk,
    their_gradients,
)
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining

from mmpt.config import ModelConfig
from mmpt.model.convert import write_checkpoint
from mmpt.model.convert.bert import BERT
from mmpt.model.convert.rules import to_ours, to_theirs
from mmpt.types import IGNORE

CONFIG = (
    "vocabulary=97",
    "transformer.dim=32",
    "transformer.layers=2",
    "transformer.n_heads=4",
    "transformer.ffn_dim=48",
    "transformer.max_positions=40",
)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
PACKS = ((7, 20), (31, 3, 12))  # tokens of each pair of texts

generator = torch.Generator().manual_seed(5)
DOCUMENTS = [torch.randint(1, 97, (n,), generator=generator) for pack in PACKS for n in pack]
LABELS = [torch.where(torch.rand(len(d), generator=generator) < 0.5, d.roll(1), IGNORE) for d in DOCUMENTS]
TYPES = [(torch.arange(len(d)) > len(d) // 2).long() for d in DOCUMENTS]
FOLLOWS = torch.tensor([0, 1, 1, 0, 1])


def pair() -> tuple[ModelConfig, BertForPreTraining]:
    return shrunk("bert_base", CONFIG), randomized(BertForPreTraining(BertConfig(**SIZES)))


def by_pack(rows: list[torch.Tensor]) -> list[list[list[int]]]:
    plain = iter(row.tolist() for row in rows)
    return [[next(plain) for _ in pack] for pack in PACKS]


def test_logits_losses_and_every_gradient(tmp_path: Path):
    config, theirs = pair()
    file_tensors(theirs, tmp_path)
    ours = built(config, model={"hf": str(tmp_path)})
    batch = packed(by_pack(DOCUMENTS), by_pack(LABELS))
    types = torch.zeros_like(batch.tokens)
    types[batch.document_ids >= 0] = torch.cat(TYPES)
    output = ours(packed(by_pack(DOCUMENTS), by_pack(LABELS), token_types=types))
    logits = output.output_hidden @ output.output_weight.T + output.output_bias
    pad = torch.nn.utils.rnn.pad_sequence
    wanted = theirs(
        pad(DOCUMENTS, batch_first=True),
        attention_mask=pad([torch.ones_like(d) for d in DOCUMENTS], batch_first=True),
        token_type_ids=pad(TYPES, batch_first=True),
        labels=pad(LABELS, batch_first=True, padding_value=IGNORE),
        next_sentence_label=FOLLOWS,
    )
    for number, found in enumerate(rows_of(batch, logits)):
        assert_near(found, wanted.prediction_logits[number, : len(found)], "logits")
    assert_near(output.sentence_logits, wanted.seq_relationship_logits, "sentence logits")
    loss = F.cross_entropy(logits, batch.labels) + F.cross_entropy(output.sentence_logits, FOLLOWS)
    assert_near(loss, wanted.loss, "loss")
    loss.backward()
    wanted.loss.backward()
    assert_all_near(our_gradients(ours, BERT), their_gradients(theirs, tmp_path), zero="self.key.bias")


def test_files_come_back_to_the_byte(tmp_path: Path):
    config, theirs = pair()
    (tmp_path / "out").mkdir()
    tensors = file_tensors(theirs, tmp_path / "in")
    rules = BERT.rules(config)
    assert_same_bytes(to_theirs(rules, to_ours(rules, tensors)), tensors)
    write_checkpoint(built(config, model={"hf": str(tmp_path / "in")}), config, "hf", tmp_path / "out")
    assert_same_bytes(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    read = BertForPreTraining.from_pretrained(tmp_path / "out").eval()
    assert_same_bytes(file_tensors(read, tmp_path / "again"), tensors)
    with torch.no_grad():
        assert_near(read(DOCUMENTS[0][None]).prediction_logits, theirs(DOCUMENTS[0][None]).prediction_logits, "logits", 1e-6)


def test_the_spelling_of_berts_own_files(tmp_path: Path):
    """bert-base's norms have a gamma and a beta; older files count positions out, and repeat what is tied."""
    config, theirs = pair()
    tensors = file_tensors(theirs, tmp_path)
    older = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    older["bert.embeddings.position_ids"] = torch.arange(40)[None]
    older["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    older["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    assert older.keys().isdisjoint({"bert.embeddings.LayerNorm.weight"})
    save_file(older, tmp_path / "model.safetensors")
    ours = built(config, model={"hf": str(tmp_path)})
    assert_same_bytes(to_theirs(BERT.rules(config), dict(ours.named_parameters())), tensors)
