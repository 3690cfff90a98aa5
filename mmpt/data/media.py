"""Encoded pictures to patches.

    bytes --decode_image--> RGBA --composite, or augment--> RGB --patchify--> rows of MediaBatch.patches

Colours are premultiplied by alpha from decoding on, so that neither resizing nor turning a picture draws the
invisible colour of its transparent parts into view. Letters: B pictures, S side in pixels.
"""

from __future__ import annotations

import io
import math

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as read_pixels

from mmpt.config import AugmentConfig

MAX_PIXELS = 2**25
"""A larger picture is refused from its header: decoding one takes four bytes a pixel."""

_CHUNK = 32  # pictures augmented at once: their floats stay within a core's cache
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_DRAWS = ("angle", "scale", "x", "y", "brightness", "contrast", "saturation", "grayscale", "background", "red", "green", "blue")


def check_header(data: bytes) -> tuple[int, int, str]:
    """Width, height (pixels, as stored) and format of an encoded picture, nothing decoded.

    Raises ValueError for bytes that are no PNG, JPEG or WebP, and for more than MAX_PIXELS pixels.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            (width, height), kind = image.size, str(image.format)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"no readable PNG, JPEG or WebP: {error}") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} is {width * height} pixels, more than the {MAX_PIXELS} that are decoded")
    return width, height, kind


def decode_image(data: bytes, size: int) -> UInt8[Tensor, "4 size size"]:
    """A picture as red, green, blue, alpha, 0..255, colours premultiplied by alpha, brought to `size` x `size`.

    The longer side becomes `size` (antialiased, EXIF orientation applied); what is left of the square is transparent.
    Raises ValueError for bytes that are no picture, or a picture too large to decode.
    """
    kind = check_header(data)[2]
    mode = ImageReadMode.RGB if kind == "JPEG" else ImageReadMode.RGB_ALPHA  # torchvision gives a JPEG no alpha
    try:
        pixels = read_pixels(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode, apply_exif_orientation=True)
    except RuntimeError as error:
        raise ValueError(f"the {kind} cannot be decoded: {error}") from error
    if pixels.dtype == torch.uint16:
        pixels = (pixels.to(torch.int32) >> 8).to(torch.uint8)
    opaque = len(pixels) == 3
    return _fit(torch.cat([pixels, torch.full_like(pixels[:1], 255)]) if opaque else _premultiply(pixels), size)


def _premultiply(pixels: UInt8[Tensor, "4 height width"]) -> UInt8[Tensor, "4 height width"]:
    wide = pixels.to(torch.int32)
    color = wide[:3] * wide[3:] + 128
    color += color >> 8  # with the next line: a division by 255, rounded to nearest, exact up to 255 * 255
    color >>= 8
    return torch.cat([color.to(torch.uint8), pixels[3:]])


def _fit(pixels: UInt8[Tensor, "4 height width"], size: int) -> UInt8[Tensor, "4 size size"]:
    height, width = pixels.shape[1:]
    longer = max(height, width)
    inner = (max(1, round(height * size / longer)), max(1, round(width * size / longer)))
    if inner != (height, width):
        pixels = F.interpolate(pixels[None], inner, mode="bilinear", antialias=True)[0]
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    return F.pad(pixels, (left, size - inner[1] - left, top, size - inner[0] - top)).contiguous()


def composite(images: UInt8[Tensor, "B 4 S S"]) -> UInt8[Tensor, "B 3 S S"]:
    """Premultiplied pictures on white."""
    return images[:, :3] + (255 - images[:, 3:])  # resizing rounds colour and alpha alike, so colour <= alpha: no wrap


def augment(images: UInt8[Tensor, "B 4 S S"], seeds: Int[Tensor, " B"], config: AugmentConfig) -> UInt8[Tensor, "B 3 S S"]:
    """Premultiplied pictures, randomly turned, scaled, shifted, put on a background and recoloured.

    `seeds`: int64. A picture's result depends on its own seed alone, not on its batch mates.
    With the default config, in which nothing changes, this is `composite`.
    """
    if not any(config.model_dump().values()):
        return composite(images)
    draws = uniform(seeds, len(_DRAWS))
    out = torch.empty_like(images[:, :3], memory_format=torch.contiguous_format)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        draw = {name: draws[part, column, None, None, None] for column, name in enumerate(_DRAWS)}
        pixels = _turn(images[part].float(), draw, config)
        pixels = _recolor(_lay_on_background(pixels, draw, config), draw, config)
        out[part] = pixels.clamp_(0, 255).round_().to(torch.uint8)
    return out


def uniform(seeds: Int[Tensor, " B"], draws: int) -> Float[Tensor, "B {draws}"]:
    """Numbers in [0, 1): draw d of seed s is a function of (s, d) alone (splitmix64, Steele et al., OOPSLA 2014)."""
    counter = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = seeds.numpy().astype(np.uint64)[:, None] + counter
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(40)).astype(np.float32) / 2**24)


Draw = dict[str, Float[Tensor, "b 1 1 1"]]


def _turn(pixels: Float[Tensor, "b 4 S S"], draw: Draw, config: AugmentConfig) -> Float[Tensor, "b 4 S S"]:
    if not (config.rotate or config.scale or config.shift):
        return pixels
    angle = (2 * draw["angle"] - 1) * math.radians(config.rotate)
    zoom = (1 + config.scale) ** (2 * draw["scale"] - 1)
    shift_x, shift_y = (2 * config.shift * (2 * draw[name] - 1) for name in ("x", "y"))  # a side is 2 long here
    size = pixels.shape[-1]
    centres = (torch.arange(size) * 2 + 1) / size - 1
    x, y = centres - shift_x, centres[:, None] - shift_y
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    # Products and sums one by one, no matmul: its rounding may depend on how many pictures there are.
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1)[:, 0]
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _lay_on_background(pixels: Float[Tensor, "b 4 S S"], draw: Draw, config: AugmentConfig) -> Float[Tensor, "b 3 S S"]:
    color = torch.cat([draw["red"], draw["green"], draw["blue"]], dim=1)
    color = torch.where(draw["background"] < config.background, color, torch.ones_like(color))
    return pixels[:, :3] + (255 - pixels[:, 3:]) * color


def _recolor(pixels: Float[Tensor, "b 3 S S"], draw: Draw, config: AugmentConfig) -> Float[Tensor, "b 3 S S"]:
    """Brightness, contrast (about mid grey) and saturation at once: own * colour + shared * luminance + offset."""
    if not (config.color or config.grayscale):
        return pixels
    factor = {name: 1 + config.color * (2 * draw[name] - 1) for name in ("brightness", "contrast", "saturation")}
    saturation = torch.where(draw["grayscale"] < config.grayscale, 0.0, factor["saturation"])
    gain = factor["brightness"] * factor["contrast"]
    red, green, blue = pixels.split(1, dim=1)
    luminance = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
    shared = luminance * (gain * (1 - saturation)) + 127.5 * (1 - factor["contrast"])
    return pixels * (gain * saturation) + shared


def patchify(images: UInt8[Tensor, "B 3 S S"], patch: int) -> UInt8[Tensor, "N patch_values"]:
    """Patches of all pictures, raster order within each; values of a patch in (row, column, channel) order."""
    side = images.shape[-1] // patch
    tiles = images.unflatten(3, (side, patch)).unflatten(2, (side, patch))  # B, 3, row, y, column, x
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(len(images) * side * side, patch * patch * 3)
