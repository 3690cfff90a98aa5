"""CLIP's preprocessing: a square of a picture, scaled bicubic and antialiased, as open_clip's `image_transform` cuts it.

    picture of any size --cut--> `side` x `side` pixels: scaled till its shorter side has as many, then the middle;
                                 or in training a random box (Crop.box), stretched

Scaling is PIL's, in the mode that the picture is stored in, so that results equal open_clip's to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image

ATTEMPTS = 10  # at a box that fits the picture
DRAWS = 4 * ATTEMPTS  # random numbers that a crop takes
RATIOS = (3 / 4, 4 / 3)  # of a box's width to its height
_LONGEST = 32  # times the shorter side: what a picture has beyond is cut off before it is scaled, which would take much memory

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels, as PIL's: whole numbers of a picture at its own size."""


@dataclass(frozen=True)
class Crop:
    """Which square of a picture is wanted: the middle, or a random one where `numbers` are given."""

    share: float = 1.0  # of the picture's area that a random box keeps at least
    numbers: Sequence[float] = ()  # DRAWS of them, each in [0, 1), or none

    def box(self, width: int, height: int) -> Box | None:
        """The part of a picture that becomes the square, stretched; None for the middle.

        Area and logarithm of the ratio are uniform, as in torchvision's RandomResizedCrop: ten attempts, then the largest box
        in the middle whose ratio is allowed.
        """
        if not self.numbers:
            return None
        narrowest, widest = RATIOS
        for attempt in range(ATTEMPTS):
            area, ratio, down, right = self.numbers[4 * attempt : 4 * attempt + 4]
            pixels = width * height * (self.share + area * (1 - self.share))
            shape = narrowest * (widest / narrowest) ** ratio
            w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(right * (width - w + 1)), int(down * (height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def cut(image: PIL.Image.Image, side: int, box: Box | None) -> PIL.Image.Image:
    """A square RGB picture of `side` pixels: what lies in `box`, stretched, or the middle."""
    if box:
        left, top, right, lower = box
        whole = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(lower))  # cut first: nothing around it seeps in
        inner = (left - whole[0], top - whole[1], right - whole[0], lower - whole[1])
        return image.crop(whole).resize((side, side), PIL.Image.Resampling.BICUBIC, box=inner).convert("RGB")
    image = _shortened(image)
    width, height = image.size
    short = min(width, height)
    image = _scaled(image, *(side if edge == short else side * edge // short for edge in (width, height)))
    left, top = (round((edge - side) / 2) for edge in image.size)  # to even where it lies between two, as torchvision's
    return image.crop((left, top, left + side, top + side)).convert("RGB")


def _scaled(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), PIL.Image.Resampling.BICUBIC)


def _shortened(image: PIL.Image.Image) -> PIL.Image.Image:
    width, height = image.size
    most = _LONGEST * min(width, height)
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most))) if left or top else image
