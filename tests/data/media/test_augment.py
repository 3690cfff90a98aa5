from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make import encode, noise

from mmpt.config import AugmentConfig
from mmpt.data.media.images import augment, composite, decode_image, patchify, uniform

WILD = AugmentConfig(rotate=30, scale=0.3, shift=0.2, color=0.5, grayscale=0.3, background=0.6)


def some_pictures(count: int, height: int, width: int) -> torch.Tensor:
    pixels = noise(count, height, width, 4)
    return torch.stack([decode_image(encode(picture, "PNG"), height, width) for picture in pixels])


def test_composite_blends_with_white():
    image = torch.tensor([100, 50, 0, 128], dtype=torch.uint8).reshape(1, 4, 1, 1)
    assert composite(image).flatten().tolist() == [227, 177, 127]


def test_augment_without_changes_is_composite():
    pictures = some_pictures(3, 16, 24)
    assert torch.equal(augment(pictures, torch.arange(3), AugmentConfig()), composite(pictures))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.sampled_from([(7, 7), (16, 16), (8, 20)]), st.integers(0, 2**63 - 1))
@example(35, (16, 16), 14851)  # of which torch's power of the last three differs from that of the first 32
def test_a_pictures_change_depends_on_its_own_seed_alone(count: int, size: tuple[int, int], seed: int):
    pictures = some_pictures(count, *size)
    seeds = torch.tensor([seed ^ number for number in range(count)])
    together = augment(pictures, seeds, WILD)
    assert torch.equal(together, augment(pictures.flip(0), seeds.flip(0), WILD).flip(0))
    assert torch.equal(together[-1:], augment(pictures[-1:], seeds[-1:], WILD))


def test_seeds_and_every_setting_matter():
    pictures, seeds = some_pictures(32, 16, 16), torch.arange(32)
    before = composite(pictures)
    assert torch.equal(augment(pictures, seeds, AugmentConfig(crop=0.5)), before)  # which was drawn while decoding
    for name, value in WILD.model_dump(exclude={"crop"}).items():
        changed = augment(pictures, seeds, AugmentConfig(**{name: value}))
        assert not torch.equal(changed, before), name
    assert not torch.equal(augment(pictures, seeds, WILD), augment(pictures, seeds + 32, WILD))


def mass(pictures: torch.Tensor) -> torch.Tensor:
    """How black each pixel is, 0 to 1, of pictures on white."""
    return (255 - pictures[:, 0].double()) / 255


def test_shift_moves_the_picture_and_keeps_it_whole():
    square = torch.zeros(8, 4, 40, 80, dtype=torch.uint8)
    square[:, 3, 16:24, 36:44] = 255  # opaque black
    shifted = mass(augment(square, torch.arange(8), AugmentConfig(shift=0.25)))
    whole = shifted.sum((1, 2))
    torch.testing.assert_close(whole, torch.full_like(whole, 64.0), rtol=0.02, atol=0)
    for axis, side in ((2, 40), (1, 80)):
        center = (shifted.sum(axis) * torch.arange(side)).sum(1) / whole
        assert (center - (side - 1) / 2).abs().max() <= side / 4 and center.unique().numel() == 8


def test_scale_changes_the_size_by_at_most_its_factor():
    square = torch.zeros(32, 4, 40, 60, dtype=torch.uint8)
    square[:, 3, 10:30, 20:40] = 255
    side = mass(augment(square, torch.arange(32), AugmentConfig(scale=0.25))).sum((1, 2)).sqrt()
    assert 15.8 < side.min() < 17 and 24 < side.max() < 25.2


def test_turning_a_wide_picture_does_not_bend_it():
    y, x = torch.arange(40.0)[:, None] - 19.5, torch.arange(100.0) - 49.5
    picture = torch.zeros(16, 4, 40, 100, dtype=torch.uint8)
    picture[:, 3] = 255 * (x**2 + y**2 < 15**2)
    turned = augment(picture, torch.arange(16), AugmentConfig(rotate=180))
    assert (mass(turned) - mass(composite(picture))).abs().mean((1, 2)).max() < 0.01  # a disc stays where it is
    bar = torch.zeros(16, 4, 40, 100, dtype=torch.uint8)
    bar[:, 3, 18:22, 40:60] = 255
    blackness = mass(augment(bar, torch.arange(16), AugmentConfig(rotate=180)))
    spread = (blackness * (x**2 + y**2)).sum((1, 2)) / blackness.sum((1, 2))
    torch.testing.assert_close(spread, torch.full_like(spread, (20**2 + 4**2) / 12), rtol=0.05, atol=0)


def test_grayscale_and_background():
    pictures = some_pictures(2, 8, 8)
    gray = augment(pictures, torch.arange(2), AugmentConfig(grayscale=1))
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
    image = torch.arange(4 * 6).reshape(4, 6) * 10 + torch.tensor([0, 1, 2])[:, None, None]
    patches = patchify(image[None].to(torch.uint8), 2)
    assert patches.shape == (6, 12)
    assert patches[1].tolist() == [20, 21, 22, 30, 31, 32, 80, 81, 82, 90, 91, 92]  # second patch of the first row
    assert patches[3, :3].tolist() == [120, 121, 122]


def test_patchify_puts_picture_behind_picture():
    pictures = torch.from_numpy(noise(3, 3, 8, 12))
    assert torch.equal(patchify(pictures, 4), torch.cat([patchify(picture[None], 4) for picture in pictures]))
    assert patchify(pictures[:0], 4).shape == (0, 48)
