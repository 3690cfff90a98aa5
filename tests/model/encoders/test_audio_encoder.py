"""The audio encoder: Whisper's on the same weights, and sounds that do not see one another."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from media_batches import assert_close, dtype_of_blocks, gradients, pack_sounds, sounds
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmpt.config import AudioEncoderConfig
from mmpt.model.encoders import AudioEncoder
from mmpt.model.encoders.audio import convolve, sinusoids

WHISPER = {
    "dim": 32,
    "layers": 2,
    "n_heads": 4,
    "ffn_dim": 64,
    "activation": "gelu",
    "norm": "layer",
    "norm_eps": 1e-5,
    "bias": True,
    "qk_norm": False,
    "positions": "sinusoidal",
    "frames_per_token": 8,
}
OURS = {"dim": 24, "layers": 2, "n_heads": 2, "ffn_dim": 32, "frames_per_token": 4}
FRAMES = [8, 20, 4, 8]


def encoder(out_dim: int | None = 20, embedding_dim: int | None = 8, **changes) -> AudioEncoder:
    torch.manual_seed(0)
    built = AudioEncoder(AudioEncoderConfig(**{**OURS, **changes}), out_dim=out_dim, embedding_dim=embedding_dim)
    built.initialize()
    return built


def from_whisper(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their parameters, or gradients of them, under our names: queries, keys and values head by head; the projection to keys
    has no bias there, and here one of 0."""
    names = {
        "layers.": "transformer.blocks.",
        "self_attn_layer_norm": "attention_norm",
        "self_attn.out_proj": "attention.out",
        "final_layer_norm": "ffn_norm",
        "fc1": "ffn.up",
        "fc2": "ffn.down",
        "layer_norm": "transformer.norm",
    }
    ours = {}
    for name, tensor in theirs.items():
        for old, new in names.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name.replace(f".{old}", f".{new}")
        ours[name] = tensor
    for name in [name for name in ours if name.endswith("self_attn.q_proj.weight")]:
        stem = name.removesuffix("q_proj.weight")
        for part in ("weight", "bias"):
            q, v = ours.pop(f"{stem}q_proj.{part}"), ours.pop(f"{stem}v_proj.{part}")
            k = ours.pop(f"{stem}k_proj.{part}", torch.zeros_like(q))
            ours[f"{stem.replace('self_attn', 'attention')}qkv.{part}"] = rearrange(
                [q, k, v], "three (h d) ... -> (h three d) ...", h=4
            )
    return ours


def test_is_whispers():
    """The states behind the last norm and every gradient, on the same weights and log-mel frames of three sounds."""
    torch.manual_seed(0)
    reference = WhisperEncoder(
        WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=80, max_source_positions=20
        )
    ).eval()
    torch.testing.assert_close(reference.embed_positions.weight, sinusoids(torch.arange(20), 32), rtol=0, atol=0)
    drawn = {name: parameter for name, parameter in reference.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in drawn.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = AudioEncoder(AudioEncoderConfig(**WHISPER), out_dim=None, embedding_dim=None)
    ours.load_state_dict(from_whisper(drawn))

    items = sounds([40, 40, 40], 80)
    expected = reference(torch.stack(items).transpose(1, 2)).last_hidden_state.flatten(0, 1)
    found = ours.encode(pack_sounds(items))
    assert_close({"states": found}, {"states": expected})
    upstream = torch.randn(expected.shape)
    their_gradients = dict(zip(drawn, torch.autograd.grad((expected * upstream).sum(), drawn.values()), strict=True))
    assert_close(gradients(ours, (found * upstream).sum()), from_whisper(their_gradients))


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_torchs_item_by_item(stride: int):
    torch.manual_seed(0)
    conv = nn.Conv1d(5, 7, 3, stride=stride, padding=1, dtype=torch.float64)
    items = [item.double() for item in sounds([2, 10, 4, 4, 2], 5)]
    packed = torch.cat(items).requires_grad_()
    found = convolve(packed, conv, torch.tensor([0, 2, 12, 16, 20, 22]))
    pieces = packed.split([len(item) for item in items])
    expected = torch.cat([conv(piece.T[None])[0].T for piece in pieces])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    wanted = (packed, conv.weight, conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


KINDS = {
    "rotary": {},
    "sinusoidal": {"positions": "sinusoidal", "norm": "layer", "activation": "gelu", "bias": True},
    "attention pool": {"pool": "attention"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_sounds_of_several_lengths_are_encoded_as_if_alone(kind: str):
    ours = encoder(**KINDS[kind])
    items = sounds(FRAMES, 80)
    alone = [ours(pack_sounds([item])) for item in items]
    together = ours(pack_sounds(items))
    expected = {
        "features": torch.cat([found.features for found in alone]),
        "pooled": torch.cat([found.pooled for found in alone]),
    }
    assert len(together.features) == sum(FRAMES) // 4
    assert_close(vars(together), expected, 3e-6)
    weigh = {name: torch.randn(x.shape) for name, x in expected.items()}

    def loss(found: dict[str, Tensor]) -> Tensor:
        return sum((found[name] * weigh[name]).sum() for name in weigh)

    assert_close(gradients(ours, loss(vars(together))), gradients(ours, loss(expected)))


def test_a_sound_does_not_move_the_others():
    """Not by one bit: neither its first frame nor its last leaks through the convolutions."""
    ours = encoder()
    items = sounds(FRAMES, 80)
    with torch.no_grad():
        before = ours(pack_sounds(items))
        for changed in range(len(items)):
            after = ours(pack_sounds([x + 1 if i == changed else x for i, x in enumerate(items)]))
            rows = [frames // 4 for frames in FRAMES]
            for i, (old, new) in enumerate(zip(before.features.split(rows), after.features.split(rows), strict=True)):
                assert torch.equal(old, new) == (i != changed)
            assert (before.pooled != after.pooled).any(1).tolist() == [i == changed for i in range(len(items))]


def test_features_are_means_of_neighbouring_states():
    ours = encoder()
    media = pack_sounds(sounds(FRAMES, 80))
    states = ours.encode(media)
    by_hand = [ours.project((states[i] + states[i + 1]) / 2) for i in range(0, len(states), 2)]
    torch.testing.assert_close(ours(media).features, torch.stack(by_hand))
    first = states[: FRAMES[0] // 2]
    torch.testing.assert_close(ours(media).pooled[0], ours.head(first.mean(0)))


def test_sinusoids_on_literal_numbers():
    """Four numbers a position: frequencies 1 and 1 / 10,000."""
    expected = [[0.0, 0.0, 1.0, 1.0], [math.sin(3), math.sin(3e-4), math.cos(3), math.cos(3e-4)]]
    torch.testing.assert_close(sinusoids(torch.tensor([0, 3]), 4), torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_the_blank_sound_reaches_every_parameter(kind: str):
    ours = encoder(**KINDS[kind])
    found = ours(ours.blank(torch.device("cpu")))
    assert found.features.shape == (1, 20) and found.pooled.shape == (1, 8)
    gradients(ours, found.features.sum() + found.pooled.sum())


def test_parts_of_sounds_that_nobody_reads_are_left_out():
    towers, features = encoder(out_dim=None), encoder(embedding_dim=None, pool="attention")
    media = pack_sounds(sounds(FRAMES, 80))
    assert towers(media).features is None and towers(media).pooled.shape == (4, 8)
    assert features(media).pooled is None and features(media).features.shape == (10, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_sounds_in_bf16_and_without_gradients(kind: str):
    ours = encoder(**KINDS[kind])
    media = pack_sounds(sounds(FRAMES, 80))
    with torch.no_grad():
        exact = ours(media).pooled
        with torch.autocast("cpu", torch.bfloat16):
            rough = ours(media).pooled
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)
    assert dtype_of_blocks(ours, media) == torch.float32


def test_gelu_is_exact():
    """Whisper's convolutions are followed by the exact GELU, as its blocks."""
    ours = encoder(layers=0, positions="sinusoidal", norm_placement="post")
    item = sounds([4], 80)[0]
    x = F.gelu(ours.conv2(F.gelu(ours.conv1(item.T[None]))))[0].T
    torch.testing.assert_close(ours.encode(pack_sounds([item])), x + sinusoids(torch.arange(2), 24))
