"""`mmpt export`: a run's model, opened by the library that it was written for, says what ours says."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import PIL.Image
import pytest
import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForPreTraining, LlamaForCausalLM, MixtralForCausalLM

from mmpt.cli.export import export
from mmpt.config import RunConfig, dump, load_model, parse
from mmpt.data.tokens import Tokenizer
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.mesh import join_world
from mmpt.train import checkpoint
from mmpt.train.optimizer import make_optimizer
from mmpt.types import (
    IGNORE,
    IMAGE,
    NOTHING,
    TEXT,
    EmbeddingSlots,
    LoaderState,
    LoadReport,
    MediaBatch,
    PackedBatch,
    PlanCursor,
    Segments,
    TrainState,
    UserError,
)

BLOCKS = {"dim": 32, "layers": 2, "n_heads": 2, "ffn_dim": 48, "qk_norm": False}
CLASSIC = {"activation": "gelu", "norm": "layer", "norm_eps": 1e-5, "bias": True}
LLAMA = {"vocabulary": 300, "levels": [], "transformer": BLOCKS}
MIXTRAL = {"vocabulary": 300, "levels": [], "transformer": {**BLOCKS, "experts": {"count": 4}, "window": 5}}
BERT = {
    "vocabulary": 300,
    "levels": [],
    "token_types": 2,
    "embedding_norm": True,
    "head": "bert",
    "transformer": {
        **BLOCKS,
        **CLASSIC,
        "norm_placement": "post",
        "mask": "bidirectional",
        "positions": "learned",
        "max_positions": 40,
    },
}
CLIP = {
    "vocabulary": 300,
    "fusion": False,
    "levels": ["tower"],
    "embedding_dim": 16,
    "image": {**BLOCKS, **CLASSIC, "size": 32, "patch": 8, "stem_bias": False, "class_token": True, "stem_norm": True}
    | {"pool": "class", "positions": "learned", "resize": "crop"},
    "transformer": {**BLOCKS, **CLASSIC, "positions": "learned", "max_positions": 30},
}
WORDS = "a red disc then another"


def written(config: RunConfig, model: dict, folder: Path, **data: object) -> tuple[Path, MultimodalModel]:
    """The folder of a run that stopped after seven steps, and the model that it stopped at."""
    tree = config.model_dump() | {"model": model}
    tree["data"] |= data
    config = parse(tree, where="export")
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(config))
    built = MultimodalModel(config.model).initialize(seed=5)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    loader = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
    with join_world(config) as world:
        state = TrainState(step=7, loader=loader, samples=0)
        checkpoint.save(run, built, make_optimizer(built, config.optimizer), state, config, world)
    return run, built.eval()


def one_text(tokens: list[int], emb: int | None = None) -> PackedBatch:
    """A batch of one text; with `emb` its embedding is taken there."""
    count, none = len(tokens), torch.empty(0, dtype=torch.int64)
    zero, nothing = torch.zeros(count, dtype=torch.int64), torch.full((count,), NOTHING)
    empty = MediaBatch(
        values=torch.empty(0, 0), cu_seqlens=zero[:1], grid=torch.empty(0, 3, dtype=torch.int64), times=torch.empty(0)
    )
    row = torch.tensor(tokens)
    slots = none if emb is None else torch.tensor([TEXT])
    return PackedBatch(
        tokens=row,
        labels=torch.full((count,), IGNORE),
        position_ids=torch.arange(count)[None],
        token_types=zero,
        document_ids=zero,
        media_index=nothing,
        pool_index=nothing if emb is None else torch.where(row == emb, 0, NOTHING),
        span_ids=nothing,
        images=empty,
        audios=empty,
        videos=empty,
        slots=EmbeddingSlots(modality=slots, item=slots - 1, pair=slots, content=slots),
        segments=Segments(document=none, task=none, next_sentence=none, pack=zero[:1], first=zero[:1]),
        packs=1,
        kinds=none,
        provenance=(),
        state=LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0),
        report=LoadReport(milliseconds={}, tokens={}, faults=()),
    )


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("model", "library"), [(LLAMA, LlamaForCausalLM), (MIXTRAL, MixtralForCausalLM), (BERT, BertForPreTraining)]
)
@torch.no_grad()
def test_transformers_opens_it(tiny_config: RunConfig, tokenizer: Tokenizer, tmp_path: Path, model: dict, library: type):
    run, ours = written(tiny_config, model, tmp_path)
    export(run, to="hf")
    folder = run / "export" / "hf-00000007"
    assert not list(folder.parent.glob("*.tmp"))
    words = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.encode(WORDS)
    assert words(WORDS, add_special_tokens=False).input_ids == tokens
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    theirs = library.from_pretrained(folder).eval()
    assert theirs.config.eos_token_id == tokenizer.eos
    found = ours(one_text(tokens))
    logits = found.output_hidden @ found.output_weight.T + (0 if found.output_bias is None else found.output_bias)
    wanted = theirs(torch.tensor([tokens]))
    assert_near(logits, wanted.prediction_logits[0] if library is BertForPreTraining else wanted.logits[0])


@pytest.mark.parametrize("kind", ["tokenizer.json", "open_clip"])
@torch.no_grad()
def test_open_clip_opens_it(tiny_config: RunConfig, tokenizer: Tokenizer, tmp_path: Path, kind: str):
    """Texts through open_clip's own call of the tokenizer, which pads them; a picture through its own preprocessing."""
    data = {"tokenizer": "open_clip:ViT-B-32"} if kind == "open_clip" else {}
    model = CLIP | {"vocabulary": 49408} if kind == "open_clip" else CLIP
    run, ours = written(tiny_config, model, tmp_path, **data)
    tokenizer = Tokenizer.load("open_clip:ViT-B-32") if kind == "open_clip" else tokenizer
    folder = tmp_path / "for open_clip"
    export(run, to="open_clip", out=folder)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    words = open_clip.get_tokenizer(f"local-dir:{folder}")([WORDS])
    tokens = [tokenizer.bos, *tokenizer.encode(WORDS), tokenizer.emb]
    assert words.shape == (1, 30) and words[0, : len(tokens)].tolist() == tokens
    text = one_text(tokens, tokenizer.emb)
    assert_near(ours(text).embeddings["tower"].vectors, theirs.eval().encode_text(words, normalize=True))

    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    images = MediaBatch(
        values=rearrange(pixels, "(h p) (w q) c -> (h w) (p q c)", p=8, q=8),
        cu_seqlens=torch.tensor([0, 16]),
        grid=torch.tensor([[1, 4, 4]]),
        times=torch.zeros(1),
    )
    zero = torch.tensor([0])
    slots = EmbeddingSlots(modality=torch.tensor([IMAGE]), item=zero, pair=zero, content=zero)
    shown = ours(replace(one_text([tokenizer.pad]), images=images, slots=slots)).embeddings["tower"].vectors
    assert_near(shown, theirs.encode_image(preprocess(PIL.Image.fromarray(pixels.numpy()))[None], normalize=True))


def test_our_own_names(tiny_config: RunConfig, tmp_path: Path):
    """Of any model: here one of pictures and texts, with experts balanced by buffers."""
    model = tiny_config.model.model_dump()
    model["transformer"] |= {"experts": {"count": 4, "balance": "bias"}}
    run, ours = written(tiny_config, model, tmp_path)
    export(run, to="safetensors", out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == ours.state_dict().keys() and "transformer.blocks.0.ffn.bias" in tensors
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in tensors.items())
    assert load_model(tmp_path / "out" / "model.yaml") == ours.config
    assert yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())["vocabulary"] == 300


def test_a_model_that_the_library_lacks(tiny_config: RunConfig, tmp_path: Path):
    """The first reason is told, and nothing is left behind."""
    run, _ = written(tiny_config, tiny_config.model.model_dump(), tmp_path)
    with pytest.raises(UserError, match=r"^this model is no Llama: levels is \['backbone'\] here, and \[\] there \(Llama's\)"):
        export(run, to="hf")
    with pytest.raises(UserError, match=r"^this model is no CLIP: fusion is True here, and False there"):
        export(run, to="open_clip")
    assert not list((run / "export").iterdir())


def test_what_is_there_is_kept(tiny_config: RunConfig, tmp_path: Path):
    run, _ = written(tiny_config, LLAMA, tmp_path)
    export(run, to="hf", out=tmp_path / "out")
    before = json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(UserError, match="is there already"):
        export(run, to="hf", out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before
    assert before["max_position_embeddings"] == tiny_config.data.pack_tokens
