"""Files that do not fit, are broken or mean harm: each is refused by name, before anything is read or run."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from references import built, randomized, shrunk
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, LlamaConfig, LlamaForCausalLM

from mmpt.config import ModelConfig
from mmpt.model.convert import files, initialize_from
from mmpt.model.convert.files import open_file
from mmpt.model.multimodal import MultimodalModel
from mmpt.types import UserError

TINY = (
    "vocabulary=50",
    "transformer.dim=16",
    "transformer.layers=1",
    "transformer.n_heads=2",
    "transformer.n_kv_heads=1",
    "transformer.ffn_dim=24",
    "transformer.rope_scaling=null",
    "transformer.rope_theta=10000",
    "transformer.norm_eps=1e-6",
)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def config() -> ModelConfig:
    return shrunk("llama_3_1_8b", TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    randomized(LlamaForCausalLM(LlamaConfig(**SIZES))).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


def refusal(config: ModelConfig, folder: Path, place: str = "model") -> str:
    with pytest.raises(UserError) as refused:
        built(config, **{place: {"hf": str(folder)}})
    return str(refused.value)


def shard(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    """The weights in two files and an index; `weight_map` for another index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    files = {name: file for file, inside in parts.items() for name in inside}
    index = {"metadata": {"total_size": 1}, "weight_map": files if weight_map is None else files | weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read_as_one(config: ModelConfig, folder: Path):
    whole = built(config, model={"hf": str(folder)})
    shard(folder)
    parts = built(config, model={"hf": str(folder)})
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/hostname", "sub/model.safetensors", "a\nb", ".."])
def test_an_index_names_files_beside_it_alone(config: ModelConfig, folder: Path, file: str):
    shard(folder, {"lm_head.weight": file})
    assert "does not lie beside it" in refusal(config, folder)


def test_an_index_must_be_right(config: ModelConfig, folder: Path):
    shard(folder, {"lm_head.weight": "model-3-of-2.safetensors"})
    assert "model-3-of-2.safetensors" in refusal(config, folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-2-of-2.safetensors"}}))
    assert "'lm_head.weight' is not in model-2-of-2.safetensors" in refusal(config, folder)
    index.write_text(json.dumps({"weight_map": ["model-2-of-2.safetensors"]}))
    assert "weight_map, from names to files, is wanted" in refusal(config, folder)


def test_names_and_shapes_are_told(config: ModelConfig, folder: Path):
    def change(tensors: dict) -> None:
        tensors["model.norm.weight"] = torch.ones(17)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(16)

    rewrite(folder, change)
    said = refusal(config, folder)
    assert "model.norm.weight is (17) there, and (16) here" in said
    assert "model.layers.0.mlp.up_proj.weight (24, 16) is missing there" in said
    assert "'model.layers.0.self_attn.q_proj.bias' (16) has no place here" in said


def test_a_handful_is_told(config: ModelConfig, folder: Path):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[1:]])
    said = refusal(config, folder)
    assert said.count("is missing there") == 5 and said.endswith("; and 6 more")


def test_nothing_is_copied_before_all_fits(config: ModelConfig, folder: Path):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(17)}))
    config = ModelConfig.model_validate(config.model_dump() | {"init": {"hf": str(folder)}})
    model, before = (MultimodalModel(config).initialize(seed=2) for _ in range(2))
    with pytest.raises(UserError):
        initialize_from(model, config)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters(), strict=True))


def test_other_types_are_refused(config: ModelConfig, folder: Path):
    for dtype in (torch.int32, torch.float8_e4m3fn):
        rewrite(folder, lambda tensors, dtype=dtype: tensors.update({"model.norm.weight": torch.ones(16).to(dtype)}))
        assert "model.norm.weight does not hold numbers of 16 or 32 bits there" in refusal(config, folder)


def test_what_is_tied_must_be_one_tensor(folder: Path):
    tied = shrunk("llama_3_1_8b", (*TINY, "tie_embeddings=true"))
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | {"tie_word_embeddings": True}))
    assert "lm_head.weight and model.embed_tokens.weight differ there" in refusal(tied, folder)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert built(tied, model={"hf": str(folder)})


def test_two_spellings_of_one_name(tmp_path: Path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}
    BertForPreTraining(BertConfig(**sizes)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"bert.embeddings.LayerNorm.gamma": torch.ones(16)}))
    overrides = ("transformer.dim=16", "transformer.layers=1", "transformer.n_heads=2", "transformer.ffn_dim=24", "vocabulary=50")
    assert "are two names of one tensor" in refusal(shrunk("bert_base", overrides), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a JSON file that reads"),
        ("[1]", "a JSON object is wanted"),
        ("[" * 100_000, "not a JSON file that reads"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not a JSON file that reads"),
        ('{"model_type": "gpt2"}', "model_type = 'gpt2': known here are llama, mixtral, bert, whisper"),
        ('{"model_type": {}}', "model_type = {}"),
        (" " * (1 << 24) + " ", "bytes; such a file has fewer"),
    ],
)
def test_configs_that_do_not_read(config: ModelConfig, folder: Path, text: str, said: str):
    (folder / "config.json").write_text(text)
    assert said in refusal(config, folder)


def test_places_without_weights(config: ModelConfig, folder: Path, tmp_path: Path):
    model = shrunk("base_1b", ("image.layers=0", "audio.layers=0", "transformer.layers=0", "vocabulary=9"))
    said = refusal(model, folder, "audio")
    assert said == "model.audio: Llama has nothing for it; its weights go into transformer"
    assert "transformer.layers is 0 here, and 1 there (num_hidden_layers)" in refusal(model, folder)
    assert "config.json: no such file" in refusal(config, tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(config, folder)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


class Memory:
    def __reduce__(self):
        return bytearray, (1 << 40,)


@pytest.mark.parametrize(("thing", "said"), [(Harm(), "mkdir"), (Memory(), "bytearray")], ids=["code", "memory"])
def test_pickles_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: object, said: str):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2), "other": thing}, "weights.pt")
    with pytest.raises(UserError, match=rf"{said}', for which weights have no need"):
        open_file(Path("weights.pt"))
    assert not Path("harm").exists()
    with zipfile.ZipFile("protocol_4.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"other": thing}, protocol=4))
    with pytest.raises(UserError, match=r"a pickle as torch\.save does not write it"):
        open_file(Path("protocol_4.pt"))
    assert not Path("harm").exists()


def test_pickles_do_nothing_to_torch_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Behind the check of names stands torch's own unpickler, which builds nothing but tensors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "_check_archive", lambda path: None)
    torch.save({"weight": torch.ones(2), "other": Harm()}, "weights.pt")
    with pytest.raises(UserError, match="not weights that read safely"):
        open_file(Path("weights.pt"))
    assert not Path("harm").exists()


def test_archives_do_not_grow(tmp_path: Path):
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1 << 16)}, buffer)
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    with pytest.raises(UserError, match="a compressed archive"):
        open_file(path)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"weight": 3}, "a dictionary of tensors by name"),
        ([torch.ones(2)], "a dictionary of tensors by name"),
        ({"state_dict": [torch.ones(2)]}, "a dictionary of tensors by name"),
        ({"weight": torch.eye(2).to_sparse()}, "for which weights have no need"),
        ({"weight": torch.ones(2, device="meta")}, "for which weights have no need"),
    ],
)
def test_other_contents(tmp_path: Path, found: object, said: str):
    torch.save(found, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=said):
        open_file(tmp_path / "weights.pt")


def test_a_tensor_of_nearly_no_bytes_is_refused(tmp_path: Path):
    """Four bytes that say they are a million million numbers."""
    torch.save({"weight": torch.ones(1).expand(1_000_000, 1_000_000)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="'weight' says more numbers than the file holds"):
        open_file(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 100])
def test_broken_files(tmp_path: Path, content: bytes):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(UserError):
        open_file(tmp_path / "weights")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_truncated_files(folder: Path, cut: float):
    torch.save(load_file(folder / "model.safetensors"), folder / "weights.pt")
    for name in ("model.safetensors", "weights.pt"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(cut * len(whole))])
        with pytest.raises(UserError):
            open_file(folder / name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused(tmp_path: Path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "weights.pt")
    with pytest.raises(UserError):
        open_file(tmp_path / "weights.pt")


def clip(**init: str) -> ModelConfig:
    return shrunk("clip_vit_b32", [f"init.{key}={value}" for key, value in init.items()])


def refusal_of_clip(config: ModelConfig) -> str:
    with torch.device("meta"):
        model = MultimodalModel(config)
    with pytest.raises(UserError) as refused:
        initialize_from(model, config)
    return str(refused.value)


def test_names_that_open_clip_lacks():
    assert "init.open_clip = 'ViT-B-33': no architecture of open_clip" in refusal_of_clip(
        clip(open_clip="ViT-B-33", pretrained="x")
    )
    said = refusal_of_clip(clip(open_clip="ViT-B-32", pretrained="laion3b"))
    assert "no weights of open_clip's ViT-B-32, which has: openai, laion400m_e31" in said


def test_named_weights_say_what_they_were_trained_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """OpenAI's weights want QuickGELU, which no shape and no name of an architecture shows."""
    save_file({"logit_scale": torch.ones(())}, tmp_path / "downloaded.safetensors")
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda said: str(tmp_path / "downloaded.safetensors"))
    said = refusal_of_clip(clip(open_clip="ViT-B-32", pretrained="openai"))
    assert "image.activation is 'gelu' here, and 'quick_gelu' there" in said
    said = refusal_of_clip(clip(open_clip="ViT-B-32", pretrained="laion2b_s34b_b79k"))
    assert "visual.conv1.weight (768, 3, 32, 32) is missing there" in said


def test_a_download_that_fails_is_told(monkeypatch: pytest.MonkeyPatch):
    def fail(said: dict) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", fail)
    said = refusal_of_clip(clip(open_clip="ViT-B-32", pretrained="openai"))
    assert said == "init.pretrained = 'openai': open_clip could not download it (no route to host)"
