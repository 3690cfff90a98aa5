"""The audio encoder from Whisper's, against transformers' on the same weights: states and every gradient."""

from pathlib import Path

import pytest
import torch
from references import TOLERANCE, assert_all_near, assert_near, built, randomized, shrunk
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

from mmpt.config import ModelConfig
from mmpt.model.convert.rules import to_theirs
from mmpt.model.convert.whisper import WHISPER
from mmpt.types import MediaBatch, UserError

LENGTHS = (24, 80, 48)  # frames
SIZES = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 40,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
TINY = ("audio.dim=32", "audio.layers=2", "audio.n_heads=4", "audio.ffn_dim=48")
OTHERS = ("image=null", "video=null", "transformer.layers=0", "transformer.dim=32", "transformer.n_heads=2", "vocabulary=9",
          "transformer.n_kv_heads=2", "transformer.rope_sections=[2,3,3]", "levels=[]")  # fmt: skip

generator = torch.Generator().manual_seed(7)
SOUNDS = [torch.randn(80, n, generator=generator) for n in LENGTHS]
TOWARDS = [torch.randn(n // 2, 32, generator=generator) for n in LENGTHS]


def model_config() -> ModelConfig:
    """The audio encoder of the model of four modalities, made tiny, and nearly nothing else."""
    return shrunk("base_1b", (*TINY, *OTHERS))


def randomized_encoder(kind: type) -> WhisperModel:
    theirs = kind(WhisperConfig(**SIZES))
    positions = theirs.get_encoder().embed_positions.weight.clone()  # sines: no weights
    randomized(theirs)
    theirs.get_encoder().embed_positions.weight.data = positions
    return theirs


def their_states(theirs: WhisperModel) -> list[torch.Tensor]:
    """Whisper wants all sounds padded to one length, where silence is heard: each is run at a length of its own instead."""
    encoder, found = theirs.get_encoder(), []
    positions = encoder.embed_positions.weight.data
    for sound in SOUNDS:
        encoder.config.max_source_positions = sound.shape[1] // 2
        encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions[: sound.shape[1] // 2])
        found.append(encoder(sound[None]).last_hidden_state[0])
    return found


def test_states_and_every_gradient(tmp_path: Path):
    theirs = randomized_encoder(WhisperModel)
    theirs.save_pretrained(tmp_path)
    ours = built(model_config(), audio={"hf": str(tmp_path)})
    lengths = torch.tensor(LENGTHS)
    media = MediaBatch(
        values=torch.cat([sound.T for sound in SOUNDS]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        grid=torch.stack([lengths, torch.ones_like(lengths), torch.ones_like(lengths)], dim=1),
        times=torch.zeros(sum(LENGTHS)),
    )
    states = ours.audio_encoder.encode(media)
    wanted = their_states(theirs)
    for found, state in zip(states.split([n // 2 for n in LENGTHS]), wanted, strict=True):
        assert_near(found, state, "states")
    (states * torch.cat(TOWARDS)).sum().backward()
    sum((state * towards).sum() for state, towards in zip(wanted, TOWARDS, strict=True)).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    encoder = {f"encoder.{name}": p.grad for name, p in theirs.get_encoder().named_parameters() if p.requires_grad}
    assert_all_near(to_theirs(WHISPER.rules(model_config()), gradients), encoder)
    bias = gradients["audio_encoder.transformer.blocks.0.attention.qkv.bias"]
    of_keys = bias.view(4, 3, 8)[:, 1]
    assert of_keys.abs().max() < TOLERANCE * bias.abs().max(), "keys have no bias there, and here one without effect"


def test_published_files_hold_the_whole_model(tmp_path: Path):
    """A prefix before all names, a decoder with them, and 16 bits."""
    theirs = randomized_encoder(WhisperForConditionalGeneration)
    theirs.half().save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "model.encoder.conv1.weight" in names and "model.decoder.layer_norm.bias" in names
    ours = built(model_config(), audio={"hf": str(tmp_path)})
    encoder = {f"encoder.{name}": tensor.float() for name, tensor in theirs.get_encoder().named_parameters()}
    del encoder["encoder.embed_positions.weight"]
    written = to_theirs(WHISPER.rules(model_config()), dict(ours.named_parameters()))
    assert written.keys() == encoder.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in encoder.items())


def test_other_positions_are_refused(tmp_path: Path):
    randomized_encoder(WhisperModel).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.embed_positions.weight"][3, 5] += 0.1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"encoder\.embed_positions\.weight is another table"):
        built(model_config(), audio={"hf": str(tmp_path)})
