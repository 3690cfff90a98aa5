"""The image encoder: open_clip's towers on the same weights, and items that do not see one another."""

import math

import open_clip
import pytest
import torch
from einops import rearrange
from media_batches import assert_close, dtype_of_blocks, gradients, pack, pictures
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from mmpt.config import ImageEncoderConfig
from mmpt.model.encoders import Encoded, ImageEncoder
from mmpt.model.encoders.stems import normalize as normalize_patches
from mmpt.types import MediaBatch

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
DIM, EMBEDDING, PATCH, SIDE = 32, 24, 4, 4
CLIP = {
    "dim": DIM,
    "layers": 2,
    "n_heads": 4,
    "ffn_dim": 64,
    "activation": "gelu",
    "norm": "layer",
    "norm_eps": 1e-5,
    "bias": True,
    "qk_norm": False,
    "size": SIDE * PATCH,
    "mean": MEAN,
    "std": STD,
    "patch": PATCH,
    "stem_bias": False,
    "positions": "learned",
    "class_token": True,
    "stem_norm": True,
    "pool": "class",
}
OURS = {"dim": 24, "layers": 2, "n_heads": 2, "ffn_dim": 32, "patch": 4, "size": 16}
SHAPES = [(1, 2, 4), (1, 4, 2), (1, 2, 4), (1, 6, 2)]


def encoder(out_dim: int | None = 20, embedding_dim: int | None = 8, **changes) -> ImageEncoder:
    torch.manual_seed(0)
    built = ImageEncoder(ImageEncoderConfig(**{**OURS, **changes}), out_dim=out_dim, embedding_dim=embedding_dim)
    built.initialize()
    return built


def from_open_clip(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their parameters, or gradients of them, under our names and in our shapes."""
    plain = {
        "class_embedding": "class_token",
        "positional_embedding": "positions",
        "ln_pre": "stem_norm",
        "ln_post": "transformer.norm",
        "attn.in_proj_": "attention.qkv.",
        "attn.out_proj": "attention.out",
        "transformer.resblocks": "transformer.blocks",
        "ln_1": "attention_norm",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn.up",
        "mlp.c_proj": "ffn.down",
    }
    pool = {name: theirs.pop(name) for name in list(theirs) if name.startswith("attn_pool.")}
    ours = {}
    for name, tensor in theirs.items():
        for old, new in plain.items():
            name = name.replace(old, new)
        ours[name] = rearrange(tensor, "(three h d) ... -> (h three d) ...", three=3, h=4) if "qkv" in name else tensor
    ours["stem.project.weight"] = rearrange(ours.pop("conv1.weight"), "d c p q -> d (p q c)")
    ours["head.weight"] = ours.pop("proj").T
    if not pool:
        return ours
    for part in ("weight", "bias"):
        ours[f"pool.norm.{part}"] = ours[f"transformer.norm.{part}"]
        ours[f"transformer.norm.{part}"] = pool[f"attn_pool.ln_k.{part}"]
        ours[f"pool.query_norm.{part}"] = pool[f"attn_pool.ln_q.{part}"]
        ours[f"pool.out.{part}"] = pool[f"attn_pool.attn.out_proj.{part}"]
    ours["pool.query"] = pool["attn_pool.query"][0]
    stacked = pool.get("attn_pool.attn.in_proj_weight")
    weights = stacked.chunk(3) if stacked is not None else [pool[f"attn_pool.attn.{x}_proj_weight"] for x in "qkv"]
    for letter, weight, bias in zip("qkv", weights, pool["attn_pool.attn.in_proj_bias"].chunk(3), strict=True):
        ours[f"pool.{letter}.weight"], ours[f"pool.{letter}.bias"] = weight, bias
    return ours


def randomized(module: nn.Module) -> nn.Module:
    """Every parameter drawn, norms and biases as well, so that none can be forgotten."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_gain else noise / math.sqrt(parameter.shape[-1]))
    return module


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(
    ("pool", "embedding_dim", "theirs"),
    [
        ("class", EMBEDDING, {}),
        ("mean", EMBEDDING, {"pool_type": "avg"}),
        ("attention", EMBEDDING, {"attentional_pool": True, "attn_pooler_queries": 1}),
        ("attention", DIM, {"attentional_pool": True, "attn_pooler_queries": 1}),
    ],
)
def test_is_open_clips_tower(pool: str, embedding_dim: int, theirs: dict, activation: str):
    """Pooled vectors and every gradient, on the same weights and pictures."""
    act = QuickGELU if activation == "quick_gelu" else nn.GELU
    sizes = {"image_size": SIDE * PATCH, "patch_size": PATCH, "width": DIM, "layers": 2, "heads": 4, "mlp_ratio": 2.0}
    reference = randomized(VisionTransformer(**sizes, output_dim=embedding_dim, act_layer=act, **theirs))
    config = ImageEncoderConfig(**{**CLIP, "activation": activation, "pool": pool})
    ours = ImageEncoder(config, out_dim=None, embedding_dim=embedding_dim)
    ours.load_state_dict(from_open_clip(dict(reference.named_parameters())))

    shown = torch.randint(0, 256, (3, 3, SIDE * PATCH, SIDE * PATCH), dtype=torch.uint8)
    patches = rearrange(shown, "m c (h p) (w q) -> (m h w) (p q c)", p=PATCH, q=PATCH)
    expected = reference(normalize(shown / 255, MEAN, STD))
    found = ours(pack(list(patches.chunk(3)), [(1, SIDE, SIDE)] * 3))
    assert found.features is None
    upstream = torch.randn(expected.shape)
    assert_close({"pooled": found.pooled}, {"pooled": expected})
    their_gradients = gradients(reference, (expected * upstream).sum())
    assert_close(gradients(ours, (found.pooled * upstream).sum()), from_open_clip(their_gradients))


def test_learned_positions_are_resized_as_open_clips():
    sizes = {"patch_size": PATCH, "width": DIM, "layers": 0, "heads": 4, "mlp_ratio": 2.0, "output_dim": EMBEDDING}
    small = VisionTransformer(image_size=SIDE * PATCH, **sizes)
    holder = nn.Module()
    holder.visual = VisionTransformer(image_size=(3 * PATCH, 7 * PATCH), **sizes)
    state = {"visual.positional_embedding": small.positional_embedding.detach()}
    open_clip.model.resize_pos_embed(state, holder)

    ours = ImageEncoder(ImageEncoderConfig(**CLIP), out_dim=None, embedding_dim=EMBEDDING)
    with torch.no_grad():
        ours.positions.copy_(small.positional_embedding)
    torch.testing.assert_close(ours.position_table(3, 7), state["visual.positional_embedding"][1:])
    assert torch.equal(ours.position_table(SIDE, SIDE), small.positional_embedding[1:])


def test_pixels_are_normalized_by_color():
    config = ImageEncoderConfig(**CLIP)
    shown = torch.randint(0, 256, (3, PATCH, PATCH), dtype=torch.uint8)
    expected = rearrange(normalize(shown / 255, MEAN, STD), "c p q -> 1 (p q c)")
    found = normalize_patches(rearrange(shown, "c p q -> 1 (p q c)"), config)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_conv_stem_reads_whole_pictures():
    """As torch's convolutions over the picture before it was cut into patches: no border shows between patches."""
    ours = encoder(stem="conv", stem_dims=(6, 8), mean=MEAN, std=STD)
    shown = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8)
    media = pack([rearrange(shown, "c (h p) (w q) -> (h w) (p q c)", p=4, q=4)], [(1, 2, 3)])
    expected = ours.stem.convs(normalize(shown / 255, MEAN, STD)[None])[0].permute(1, 2, 0)
    expected = ours.stem.project(ours.stem.norm(expected)).flatten(0, 1)
    torch.testing.assert_close(ours.stem(normalize_patches(media.values, ours.config), media.grid), expected)


KINDS = {
    "rotary": {},
    "class and rotary": {"class_token": True, "pool": "class", "stem_norm": True},
    "learned": {"positions": "learned"},
    "class and learned": {"positions": "learned", "class_token": True, "pool": "class", "norm": "layer", "bias": True},
    "attention pool": {"class_token": True, "pool": "attention", "bias": True},
    "conv stem": {"stem": "conv", "stem_dims": (6, 8)},
    "merged": {"merge": 2},
    "merged with class": {"merge": 2, "class_token": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_several_shapes_are_encoded_as_if_alone(kind: str):
    """Features, pooled vectors, and gradients, which are the sums of those of the items alone."""
    ours = randomized(encoder(**KINDS[kind]))
    items = pictures(SHAPES, 4)
    alone = [ours(pack([item], [shape])) for item, shape in zip(items, SHAPES, strict=True)]
    together = ours(pack(items, SHAPES))
    expected = Encoded(
        features=torch.cat([found.features for found in alone]), pooled=torch.cat([found.pooled for found in alone])
    )
    assert together.features.shape == (sum(h * w for _, h, w in SHAPES) // ours.config.merge**2, 20)
    assert_close(vars(together), vars(expected), 1e-6)
    weigh = [torch.randn(x.shape) for x in (expected.features, expected.pooled)]

    def loss(found: Encoded) -> Tensor:
        return sum((x * y).sum() for x, y in zip((found.features, found.pooled), weigh, strict=True))

    assert_close(gradients(ours, loss(together)), gradients(ours, loss(expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_does_not_move_the_others(kind: str):
    """Not by one bit, where the shapes stay; nor do items of other shapes, beyond rounding (tested above)."""
    ours = encoder(**KINDS[kind])
    items = pictures(SHAPES, 4)
    rows = [h * w // ours.config.merge**2 for _, h, w in SHAPES]
    with torch.no_grad():
        before = ours(pack(items, SHAPES))
        for changed in range(len(items)):
            after = ours(pack([255 - x if i == changed else x for i, x in enumerate(items)], SHAPES))
            for i, (old, new) in enumerate(zip(before.features.split(rows), after.features.split(rows), strict=True)):
                assert torch.equal(old, new) == (i != changed)
            assert (before.pooled != after.pooled).any(1).tolist() == [i == changed for i in range(len(items))]


def test_frames_stand_side_by_side():
    """An item of two frames: patches of both see one another, but none is merged with one of the other frame.

    Without blocks a frame's features are those of the frame as an item of its own.
    """
    ours = encoder(merge=2, layers=0)
    shapes = [(2, 4, 2), (1, 2, 2), (3, 2, 4)]
    items = pictures(shapes, 4)
    frames = [frame for item, (t, _, _) in zip(items, shapes, strict=True) for frame in item.chunk(t)]
    alone = pack(frames, [(1, h, w) for t, h, w in shapes for _ in range(t)])
    torch.testing.assert_close(ours(pack(items, shapes)).features, ours(alone).features)


@pytest.mark.parametrize("kind", KINDS)
def test_the_blank_reaches_every_parameter(kind: str):
    ours = encoder(**KINDS[kind])
    blank = ours.blank(torch.device("cpu"))
    found = ours(blank)
    assert found.features.shape == (1, 20) and found.pooled.shape == (1, 8)
    assert set(gradients(ours, found.features.sum() + found.pooled.sum())) == {name for name, _ in ours.named_parameters()}


def test_parts_that_nobody_reads_are_left_out():
    towers, features = encoder(out_dim=None), encoder(embedding_dim=None, class_token=True, pool="attention")
    media = pack(pictures(SHAPES, 4), SHAPES)
    assert towers(media).features is None and towers(media).pooled.shape == (4, 8)
    assert features(media).pooled is None and features(media).features.shape == (36, 20)
    assert towers.project is None and features.head is None and features.pool is None


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_and_without_gradients(kind: str):
    """Matrix products in bf16; what the blocks add to stays in fp32."""
    ours = encoder(**KINDS[kind])
    media = pack(pictures(SHAPES, 4), SHAPES)
    with torch.no_grad():
        exact = ours(media)
        with torch.autocast("cpu", torch.bfloat16):
            rough = ours(media)
    torch.testing.assert_close(rough.pooled.float(), exact.pooled, rtol=0.1, atol=0.1)
    torch.testing.assert_close(rough.features.float(), exact.features, rtol=0.1, atol=0.1)
    assert dtype_of_blocks(ours, media) == torch.float32


def test_builds_on_meta():
    with torch.device("meta"):
        ours = ImageEncoder(ImageEncoderConfig(**CLIP), out_dim=8, embedding_dim=8)
    assert all(parameter.is_meta for parameter in ours.parameters())
    ours.to_empty(device="cpu").initialize()
    media: MediaBatch = pack(pictures([(1, 4, 4)], PATCH), [(1, 4, 4)])
    assert ours(media).features.isfinite().all()


def test_has_as_many_parameters_as_the_published_tower():
    """The image tower of open_clip's ViT-B-32."""
    sizes = {"dim": 768, "layers": 12, "n_heads": 12, "ffn_dim": 3072, "size": 224, "patch": 32}
    with torch.device("meta"):
        ours = ImageEncoder(ImageEncoderConfig(**{**CLIP, **sizes}), out_dim=None, embedding_dim=512)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 87_849_216
