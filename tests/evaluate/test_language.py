import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from fakes import Speller, shade, write_corpus
from rich.console import Console

from mmpt.config import RunConfig, load_model, parse
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate import language as module
from mmpt.evaluate.language import Language, evaluate_language, language_json, language_table
from mmpt.evaluate.split import HeldOut
from mmpt.model.convert import write_checkpoint
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import Text, UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def changed(config: RunConfig, **data) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def by_hand(model: Speller, held_out: HeldOut, tokenizer: Tokenizer) -> Language:
    """Each text by itself, in double precision: the model sees one token back, so no packing is wanted."""
    logits = model.rows.double() @ model.weight.double().T + model.bias.double()
    nats, tokens, spelled, documents = 0.0, 0, 0, 0
    for number in range(len(held_out.corpus)):
        documents += 1
        for part in held_out.corpus.document(number).parts:
            if isinstance(part, Text) and part.predict:
                ids = tokenizer.encode(part.text)
                seen, said = torch.tensor([tokenizer.bos, *ids]), torch.tensor([*ids, tokenizer.eos])
                nats -= logits[seen].log_softmax(dim=1).gather(1, said[:, None]).sum().item()
                tokens, spelled = tokens + len(said), spelled + len(part.text.encode())
    return Language(nats=nats, tokens=tokens, bytes=spelled, documents=documents)


@pytest.mark.parametrize("chunk", [1024, 7])
def test_every_token_counts_once(tiny_config: RunConfig, tokenizer: Tokenizer, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = Speller(tiny_config.model.vocabulary)
    found = evaluate_language(model, tiny_config, tiny_config.data.spec, "val", "cpu")["tiny"]
    expected = by_hand(model, HeldOut(tiny_config, tiny_config.data.spec, "val"), tokenizer)
    assert (found.tokens, found.bytes, found.documents) == (expected.tokens, expected.bytes, expected.documents)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found.nats_per_token == pytest.approx(expected.nats / expected.tokens, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected.nats / expected.tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected.nats / math.log(2) / expected.bytes, rel=1e-6)


@pytest.mark.parametrize("pack_tokens", [24, 64, 512])
def test_packing_changes_nothing_for_a_model_that_sees_nothing(tiny_config: RunConfig, tmp_path: Path, pack_tokens: int):
    """Texts longer than a pack go in pieces; those that are not to be predicted are passed over."""
    long = "then another, " * 30
    spec = write_corpus(tmp_path, [([long], {}), (["zwölf Bäume", shade(1), "a disc"], {}), ([shade(2), long, "end"], {})])
    config = changed(tiny_config, pack_tokens=pack_tokens)
    model = Speller(config.model.vocabulary, blind=True)
    held_out = HeldOut(config, spec, "val")
    found = evaluate_language(model, config, spec, "val", "cpu")["small"]
    expected = by_hand(model, held_out, held_out.tokenizer)
    assert (found.tokens, found.bytes, found.documents) == (expected.tokens, expected.bytes, expected.documents)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)


def test_the_loss_is_that_of_transformers(tiny_config: RunConfig, tiny_data: Path, tmp_path: Path):
    """A tiny Llama, which transformers reads as we export it: each document by itself there, packed and in the batch here."""
    shape = ("vocabulary=300", "transformer.dim=32", "transformer.layers=2", "transformer.n_heads=4", "transformer.n_kv_heads=2")
    llama = load_model(CONFIGS / "models" / "llama_3_1_8b.yaml", [*shape, "transformer.ffn_dim=48"])
    config = changed(tiny_config.model_copy(update={"model": llama}), pack_tokens=100, packs_per_batch=2)
    model = MultimodalModel(config.model).initialize(seed=0)
    write_checkpoint(model, config.model, "hf", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    words = [f"a {color} disc, {'then ' * number}another" for number, color in enumerate(("red", "green", "blue", "zwölf"))]
    documents = [(words[:1], {}), (words[1:3], {}), (words[3:], {}), (words, {})]
    spec = write_corpus(tmp_path, documents)
    held_out, nats, tokens = HeldOut(config, spec, "val"), 0.0, 0
    tokenizer = held_out.tokenizer
    for texts, _ in documents:
        row = [token for text in texts for token in (tokenizer.bos, *tokenizer.encode(text), tokenizer.eos)]
        labels = [-100 if token == tokenizer.bos else token for token in row]  # what comes behind a text is not asked for
        said = sum(label != -100 for label in labels)
        with torch.no_grad():
            mean = theirs(input_ids=torch.tensor([row]), labels=torch.tensor([labels])).loss.item()
        nats, tokens = nats + said * mean, tokens + said
    found = evaluate_language(model, config, spec, "val", "cpu")["small"]
    assert (found.tokens, found.documents) == (tokens, 4)
    assert found.nats == pytest.approx(nats, rel=1e-6)


def test_sources_are_told_apart_and_added_up(four_config: RunConfig):
    model = Speller(four_config.model.vocabulary)
    found = evaluate_language(model, four_config, four_config.data.spec, "train", "cpu")
    assert list(found) == ["four", "tiny"]
    tree = json.loads(json.dumps(language_json(found)))
    assert tree["tokens"] == sum(source["tokens"] for source in tree["sources"].values())
    nats = sum(source["tokens"] * source["nats_per_token"] for source in tree["sources"].values())
    assert tree["nats_per_token"] == pytest.approx(nats / tree["tokens"])
    console = Console(width=100)
    with console.capture() as shown:
        console.print(language_table(found))
    assert [line.split()[1] for line in shown.get().splitlines() if line.startswith("│")] == ["four", "tiny", "all"]


def test_what_cannot_be_asked_is_refused(tiny_config: RunConfig, tmp_path: Path):
    model, spec = Speller(tiny_config.model.vocabulary), tiny_config.data.spec
    tree = tiny_config.model_dump(mode="json")
    towers = parse(tree | {"model": tree["model"] | {"fusion": False, "levels": ["tower"]}}, where="towers")
    with pytest.raises(UserError, match="fusion is false"):
        evaluate_language(model, towers, spec, "val", "cpu")
    tree["model"]["transformer"]["mask"] = "bidirectional"
    with pytest.raises(UserError, match="mask is bidirectional"):
        evaluate_language(model, parse(tree, where="sees"), spec, "val", "cpu")
    pictures = write_corpus(tmp_path, [([shade(1)], {})])
    with pytest.raises(UserError, match="split 'val': no document has a text to predict"):
        evaluate_language(model, tiny_config, pictures, "val", "cpu")
    assert Language(nats=1e6, tokens=2, bytes=1, documents=1).perplexity == math.inf
