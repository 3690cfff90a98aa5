"""CLIP against open_clip on the same weights: both towers' features, ClipLoss, every gradient; captions packed, not padded."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIP
from references import assert_all_near, assert_near, assert_same_bytes, built, our_gradients, packed, randomized, shrunk
from safetensors.torch import load_file, save_file

from mmpt.config import ModelConfig
from mmpt.model.convert import write_checkpoint
from mmpt.model.convert.open_clip import OPEN_CLIP, describe
from mmpt.model.convert.rules import to_ours, to_theirs
from mmpt.types import IMAGE, NOTHING, TEXT, EmbeddingSlots, MediaBatch, PackedBatch

CONTEXT, SIDE, PATCH = 12, 24, 8
END = 96  # the largest id: open_clip pools there
TINY = (
    "vocabulary=97",
    f"image.size={SIDE}",
    f"image.patch={PATCH}",
    "image.dim=32",
    "image.layers=2",
    "image.n_heads=2",
    "image.ffn_dim=72",
    f"transformer.max_positions={CONTEXT}",
    "transformer.dim=24",
    "transformer.layers=2",
    "transformer.n_heads=3",
    "transformer.ffn_dim=96",
    "embedding_dim=16",
)
VISION = {"image_size": SIDE, "patch_size": PATCH, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.25}
TEXT_CFG = {"context_length": CONTEXT, "vocab_size": 97, "width": 24, "layers": 2, "heads": 3}
QUICK = ("image.activation=quick_gelu", "transformer.activation=quick_gelu")
ATTENTION = {"attentional_pool": True, "attn_pooler_queries": 1}
VARIANTS = {
    "as published": ((), {}, {}),
    "QuickGELU": (QUICK, {}, {"quick_gelu": True}),
    "mean": (("image.pool=mean", "image.stem_norm=false"), {"pool_type": "avg", "no_ln_pre": True}, {}),
    "attention": (("image.pool=attention",), ATTENTION, {}),
    "attention of one width, bias": (("image.pool=attention", "embedding_dim=32", "logit_bias_init=-3", *QUICK), ATTENTION,
                                     {"embed_dim": 32, "init_logit_bias": -3.0, "quick_gelu": True}),
    "eps": (("image.norm_eps=1e-3", "transformer.norm_eps=1e-4"), {"norm_kwargs": {"eps": 1e-3}}, {"text_eps": 1e-4}),
}  # fmt: skip

generator = torch.Generator().manual_seed(6)
PIXELS = torch.randint(0, 256, (4, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
CAPTIONS = [[95, *torch.randint(1, 90, (n,), generator=generator).tolist(), END] for n in (3, 10, 1, 6)]


@pytest.fixture(params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> tuple[ModelConfig, dict, CLIP]:
    overrides, vision, others = VARIANTS[request.param]
    others = dict(others)
    text = {"norm_kwargs": {"eps": others.pop("text_eps")}} if "text_eps" in others else {}
    described = {"embed_dim": 16, "vision_cfg": VISION | vision, "text_cfg": TEXT_CFG | text, **others}
    return shrunk("clip_vit_b32", (*TINY, *overrides)), described, randomized(CLIP(**described))


def saved(folder: Path, described: dict, theirs: CLIP) -> dict:
    """A folder as open_clip has it, and the `init` that names it."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    return {"open_clip": f"local-dir:{folder}", "pretrained": str(folder / "open_clip_model.safetensors")}


def clip_batch() -> PackedBatch:
    """Two packs of two documents each, a picture and its caption: the pictures take no tokens."""
    count, side = len(CAPTIONS), SIDE // PATCH
    batch = packed([CAPTIONS[:2], CAPTIONS[2:]])
    numbers = torch.arange(count)
    images = MediaBatch(
        values=rearrange(PIXELS, "m c (h p) (w q) -> (m h w) (p q c)", p=PATCH, q=PATCH),
        cu_seqlens=torch.arange(count + 1) * side**2,
        grid=torch.tensor([[1, side, side]] * count),
        times=torch.zeros(count),
    )
    slots = EmbeddingSlots(
        modality=torch.tensor([IMAGE, TEXT] * count),
        item=torch.stack([numbers, torch.full_like(numbers, NOTHING)], dim=1).flatten(),
        pair=numbers.repeat_interleave(2),
        content=torch.arange(2 * count),
    )
    pool_index = torch.where(batch.tokens == END, 2 * batch.document_ids + 1, NOTHING)
    return packed([CAPTIONS[:2], CAPTIONS[2:]], images=images, slots=slots, pool_index=pool_index)


def their_inputs(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image.mean, config.image.std))
    captions = torch.tensor([[*caption, *[0] * (CONTEXT - len(caption))] for caption in CAPTIONS])
    return (PIXELS / 255 - mean) / std, captions


def test_features_loss_and_every_gradient(pair, tmp_path: Path):
    config, described, theirs = pair
    ours = built(config, model=saved(tmp_path, described, theirs))
    found = ours(clip_batch()).embeddings["tower"]
    pictures, captions = their_inputs(config)
    image, text = theirs.encode_image(pictures), theirs.encode_text(captions)
    assert_near(found.vectors[0::2], F.normalize(image, dim=-1), "image features")
    assert_near(found.vectors[1::2], F.normalize(text, dim=-1), "text features")
    assert_near(found.norms, torch.stack([image, text], dim=1).flatten(0, 1).norm(dim=-1), "norms")
    logits = found.scale * found.vectors[0::2] @ found.vectors[1::2].T
    features = F.normalize(image, dim=-1), F.normalize(text, dim=-1), theirs.logit_scale.exp()
    if found.bias is None:
        numbers = torch.arange(len(CAPTIONS))
        loss = (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2
        their_loss = ClipLoss()(*features)
    else:
        same = 2 * torch.eye(len(CAPTIONS)) - 1
        loss = -F.logsigmoid(same * (logits + found.bias)).sum() / len(CAPTIONS)
        their_loss = SigLipLoss()(*features, theirs.logit_bias)
    assert_near(loss, their_loss, "loss")
    loss.backward()
    their_loss.backward()
    assert_all_near(our_gradients(ours, OPEN_CLIP), {name: p.grad for name, p in theirs.named_parameters()})


def test_files_come_back_to_the_byte(pair, tmp_path: Path):
    """Theirs into ours and back; ours, written, opened by open_clip itself: the same weights, features and preprocessing."""
    config, described, theirs = pair
    (tmp_path / "out").mkdir()
    tensors = dict(theirs.state_dict())
    rules = OPEN_CLIP.rules(config)
    assert_same_bytes(to_theirs(rules, to_ours(rules, tensors)), tensors)
    ours = built(config, model=saved(tmp_path, described, theirs))
    write_checkpoint(ours, config, "open_clip", tmp_path / "out")
    assert_same_bytes(load_file(tmp_path / "out" / "open_clip_model.safetensors"), tensors)
    read, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert_same_bytes(dict(read.state_dict()), tensors)
    with torch.no_grad():
        for found, wanted in zip(read.eval()(*their_inputs(config)), theirs(*their_inputs(config)), strict=True):
            assert_near(found, wanted, "outputs", 1e-6)
    normalize = preprocess.transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == (config.image.mean, config.image.std)


def test_towers_alone(tmp_path: Path):
    """Into a model whose towers meet in one transformer, the image tower goes by itself; so does the text tower."""
    described = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT_CFG}
    theirs = randomized(CLIP(**described))
    init = saved(tmp_path, described, theirs)
    config = shrunk("clip_vit_b32", (*TINY, "fusion=true", "levels=[backbone]", "transformer.mask=media"))
    image, text = built(config, image=init), built(config, transformer=init)
    assert torch.equal(image.image_encoder.positions, theirs.visual.positional_embedding)
    assert torch.equal(text.embed_tokens.weight, theirs.token_embedding.weight)
    assert not torch.equal(text.image_encoder.positions, theirs.visual.positional_embedding)
    for name, of_image, of_text in (
        ("transformer.norm.weight", False, True),
        ("image_encoder.transformer.norm.weight", True, False),
    ):
        wanted = theirs.ln_final.weight if of_text else theirs.visual.ln_post.weight
        assert torch.equal(image.get_parameter(name), wanted) == of_image
        assert torch.equal(text.get_parameter(name), wanted) == of_text


def test_weights_as_training_code_saves_them(tmp_path: Path):
    """PyTorch's files, under DistributedDataParallel and beside an epoch; and models whose text tower stands by itself."""
    described = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT_CFG}
    theirs = randomized(CLIP(**described))
    init = saved(tmp_path, described, theirs)
    state = theirs.state_dict()
    inside = {name: name if name.startswith(("visual.", "logit_")) else f"text.{name}" for name in state}
    for number, names in enumerate(({name: f"module.{name}" for name in state}, inside)):
        path = tmp_path / f"epoch_{number}.pt"
        torch.save({"epoch": 3, "state_dict": {names[name]: tensor for name, tensor in state.items()}}, path)
        config = shrunk("clip_vit_b32", TINY)
        ours = built(config, model={**init, "pretrained": str(path)})
        assert_same_bytes(to_theirs(OPEN_CLIP.rules(config), dict(ours.named_parameters())), state)


@pytest.mark.parametrize(("name", "architecture"), [("clip_vit_b32", "ViT-B-32"), ("clip_vit_l14", "ViT-L-14")])
def test_what_is_written_is_open_clips_own_config(name: str, architecture: str):
    """As open_clip builds it: the same modules, all of the same shapes."""
    described = describe(shrunk(name, ()))
    del described["preprocess_cfg"]
    with torch.device("meta"):
        ours, theirs = CLIP(**described), CLIP(**open_clip.get_model_config(architecture))
    assert repr(ours) == repr(theirs)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
