"""Encoded pictures to patches.

    bytes --probe_image--> width, height --native_size--> height, width that fit a budget
    bytes --decode_image--> RGBA --composite, or augment--> RGB --patchify--> rows of MediaBatch.values
    seed --random_crop--> what `decode_image` cuts out, where a run wants it

Colors are premultiplied by alpha from decoding on, so that neither resizing nor turning a picture draws the
invisible color of its transparent parts into view. Letters: B pictures, H and W pixels, N patches.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import PIL.Image
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as read_pixels

from mmpt.config import AugmentConfig
from mmpt.data.faults import BadMedia
from mmpt.data.media.crop import DRAWS, Crop, cut
from mmpt.data.media.headers import Header, read_header
from mmpt.types import Buffer

MAX_PIXELS = 2**25
"""A larger picture is refused from its header: decoding one takes four bytes a pixel."""

MAX_BYTES = 2**26

# A JPEG is decoded at a fraction of its size, by a smaller inverse DCT, where what comes is still so many times the wanted
# size. At 2, colors are 0.4 to 1.1 of 255 from those of the whole picture brought there, on average over photographs, and come
# in 20 to 40 % less time; at 1, they would be 1 to 5 off.
_SPARE = 2
_EIGHTHS = (1, 2, 3, 4)  # the fractions; those above a half are no faster than the whole
_CHUNK = 32  # pictures augmented at once: their floats stay within a core's cache
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}  # of rows (1) and columns (2), once it stands or lies right
_TURNS = {  # the same of PIL's
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_DRAWS = ("angle", "scale", "x", "y", "brightness", "contrast", "saturation", "grayscale", "background", "red", "green", "blue")

Whole = TypeVar("Whole", int, np.ndarray)
Fit = Literal["pad", "stretch"] | Crop


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    width: int  # pixels, as shown: EXIF orientation applied
    height: int  # pixels
    kind: str  # "JPEG", "PNG" or "WEBP"


def probe_image(data: Buffer) -> ImageInfo:
    """Size and kind of an encoded picture, from its header.

    Raises BadMedia: "decode" for what is no JPEG, PNG or WebP, "limit" for over MAX_BYTES or MAX_PIXELS.
    """
    header = _checked_header(data)
    width, height = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
    return ImageInfo(width=width, height=height, kind=header.kind)


def _checked_header(data: Buffer) -> Header:
    if len(data) > MAX_BYTES:
        raise BadMedia("limit", f"a picture of {len(data)} bytes, more than the {MAX_BYTES} that are read")
    header = read_header(data)
    width, height = header.width, header.height
    if width < 1 or height < 1:
        raise BadMedia("decode", f"the {header.kind} says that it is {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadMedia("limit", f"{width} x {height} is {width * height} pixels, more than the {MAX_PIXELS} that are decoded")
    return header


def native_size(width: Whole, height: Whole, *, unit: int, max_pixels: int) -> tuple[Whole, Whole]:
    """Height and width to which a picture is brought: multiples of `unit` next to its own size, scaled down to fit `max_pixels`.

    Whole numbers throughout, so that a plan over arrays and a decoder of one picture agree. `unit` pixels are a side of a
    token: patch times merge. The aspect is kept to within a unit; a very long picture keeps at least one unit of its short side.
    """
    cells = max_pixels // unit**2
    assert cells >= 1, (unit, max_pixels)
    w, h = np.asarray(width, dtype=np.int64), np.asarray(height, dtype=np.int64)
    rows, columns = ((2 * side + unit) // (2 * unit) for side in (h, w))
    fits = np.maximum(rows, 1) * np.maximum(columns, 1) <= cells
    # Below 2**52, which cells * side is, the float square root has the right floor.
    rows = np.maximum(np.where(fits, rows, np.floor(np.sqrt(cells * h // w)).astype(np.int64)), 1)
    columns = np.maximum(np.where(fits, columns, np.floor(np.sqrt(cells * w // h)).astype(np.int64)), 1)
    rows, columns = np.minimum(rows, cells // np.minimum(columns, cells)), np.minimum(columns, cells)
    if isinstance(width, np.ndarray):
        return rows * unit, columns * unit
    return int(rows) * unit, int(columns) * unit


def decode_image(data: Buffer, height: int, width: int, *, fit: Fit = "pad") -> UInt8[Tensor, "4 {height} {width}"]:
    """A picture as red, green, blue, alpha, 0..255, colors premultiplied by alpha, brought to `height` x `width`.

    EXIF orientation is applied, resizing is antialiased. "pad" keeps the proportions, and what is left over is transparent;
    "stretch" does not; a Crop fills a square with a part of the picture, in which transparency is passed over, as CLIP's
    preprocessing does. Raises BadMedia as `probe_image` does, and "decode" for bytes that are broken or cut short.
    """
    header = _checked_header(data)
    stored = (header.height, header.width)
    try:
        if isinstance(fit, Crop):
            return _place(_from_pil(_cut_out(data, header, height, fit)), height, width)
        size = _stored_size(stored, header.orientation, (height, width), fit)
        if header.kind == "JPEG" and header.plain:
            pixels, extent = _read_jpeg(data, stored, size)
        else:
            pixels, extent = _read_others(data, header), stored
    except (RuntimeError, OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise BadMedia("decode", f"the {header.kind} cannot be decoded: {error}") from error
    return _place(_orient(_resize(pixels, extent, size), header.orientation), height, width)


def bring(
    pixels: UInt8[Tensor, "channels h w"], orientation: int, height: int, width: int, fit: Fit
) -> UInt8[Tensor, "4 {height} {width}"]:
    """A stored picture, opaque if it has three channels, turned as EXIF's orientation says and brought to a size.

    As `decode_image` gives it, of whose `fit` this is the meaning.
    """
    if isinstance(fit, Crop):
        image = _turned(PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()), orientation)
        return _place(_from_pil(cut(image, height, fit.box(*image.size))), height, width)
    stored = (pixels.shape[1], pixels.shape[2])
    size = _stored_size(stored, orientation, (height, width), fit)
    pixels = _premultiply(pixels) if len(pixels) == 4 else pixels
    return _place(_orient(_resize(pixels, stored, size), orientation), height, width)


def _cut_out(data: Buffer, header: Header, side: int, crop: Crop) -> PIL.Image.Image:
    """A square of a picture, of `side` pixels.

    For a random box a JPEG is decoded at a fraction of its size, as elsewhere, where the box still has so many pixels; for the
    middle at its whole size, so that nothing differs from CLIP's preprocessing.
    """
    step = -1 if header.orientation >= 5 else 1  # such a picture is turned on its side
    height, width = (header.height, header.width)[::step]
    box = crop.box(width, height)
    if header.kind != "JPEG" or not header.plain:
        return cut(_turned(_open(data, header), header.orientation), side, box)
    least = (height, width)
    if box:
        least = (math.ceil(side * height / (box[3] - box[1])), math.ceil(side * width / (box[2] - box[0])))
    pixels, extent = _read_jpeg(data, (header.height, header.width), least[::step])
    rows = pixels.permute(1, 2, 0).numpy()  # as the decoder gave them: nothing is copied here
    if box and extent[0] < header.height:
        spare = [edge - part for edge, part in zip(rows.shape[:2], extent, strict=True)][::step]  # beyond the picture's edge
        down, right = (spare[axis - 1] * (axis in _FLIPS.get(header.orientation, ())) for axis in (1, 2))
        scale = extent[0] / header.height
        box = (box[0] * scale + right, box[1] * scale + down, box[2] * scale + right, box[3] * scale + down)
    image = PIL.Image.frombuffer("RGB", rows.shape[1::-1], rows, "raw", "RGBX", 0, 1)
    return cut(_turned(image, header.orientation), side, box)


def _turned(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _from_pil(image: PIL.Image.Image) -> UInt8[Tensor, "3 height width"]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _stored_size(stored: tuple[int, int], orientation: int, wanted: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """Height and width to which a picture is scaled before it is turned and set into a wanted size."""
    limits = wanted[::-1] if orientation >= 5 else wanted
    if fit == "stretch":
        return limits
    scale = min(limit / side for limit, side in zip(limits, stored, strict=True))
    height, width = (min(limit, max(1, round(side * scale))) for limit, side in zip(limits, stored, strict=True))
    return height, width


def _read_jpeg(
    data: Buffer, stored: tuple[int, int], size: tuple[int, int]
) -> tuple[UInt8[Tensor, "4 height width"], tuple[float, float]]:
    """As stored, or scaled down to no less than `_SPARE` times `size`; and how many of its rows and columns the picture covers:
    of the last ones perhaps only a part. Raises ValueError also where libjpeg only warns and goes on in gray.

    Four channels, of which alpha is 255, because torch resizes them faster than three.
    """
    least = [_SPARE * side for side in size]
    fits = (n for n in _EIGHTHS if all(-(-side * n // 8) >= low for side, low in zip(stored, least, strict=True)))
    eighths = next(fits, 8)
    extent = (stored[0] * eighths / 8, stored[1] * eighths / 8)
    scaling = {"min_height": least[0], "min_width": least[1], "min_factor": 2} if eighths < 8 else {}
    rows = simplejpeg.decode_jpeg(data, "RGBA", **scaling)
    _check_size(rows.shape[:2], (math.ceil(extent[0]), math.ceil(extent[1])))
    return torch.from_numpy(rows).permute(2, 0, 1), extent


def _read_others(data: Buffer, header: Header) -> UInt8[Tensor, "channels height width"]:
    """As stored: three channels where all is opaque, or four."""
    if header.plain and header.kind != "JPEG":
        mode = ImageReadMode.RGB_ALPHA if header.alpha else ImageReadMode.RGB
        pixels = read_pixels(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        _check_size(pixels.shape[1:], (header.height, header.width))
    else:
        pixels = _read_by_pil(data, header)
    return _premultiply(pixels) if header.alpha else pixels


def _open(data: Buffer, header: Header) -> PIL.Image.Image:
    """A picture in the mode that it is stored in, but for sixteen bits of gray, of which PIL would show most as white."""
    with PIL.Image.open(io.BytesIO(data), formats=(header.kind,)) as image:
        _check_size(image.size[::-1], (header.height, header.width))
        image.load()
        image.info.pop("transparency", None)  # of which PIL would warn that it is passed over
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I;16") else image


def _read_by_pil(data: Buffer, header: Header) -> UInt8[Tensor, "channels height width"]:
    with PIL.Image.open(io.BytesIO(data), formats=(header.kind,)) as image:
        _check_size(image.size[::-1], (header.height, header.width))
        if image.mode.startswith("I;16"):
            wide = np.asarray(image)
            gray = (wide >> 8).astype(np.uint8)
            opaque = np.where(wide == image.info.get("transparency"), 0, 255).astype(np.uint8)
            return torch.from_numpy(np.stack([gray, gray, gray, opaque]))
        return torch.from_numpy(np.array(image.convert("RGBA" if header.alpha else "RGB"))).permute(2, 0, 1)


def _check_size(decoded: tuple[int, ...], promised: tuple[int, ...]) -> None:
    if tuple(decoded) != promised:
        raise ValueError(f"it has {decoded[1]} x {decoded[0]} pixels, not {promised[1]} x {promised[0]}")


def _resize(
    pixels: UInt8[Tensor, "channels h w"], extent: tuple[float, float], size: tuple[int, int]
) -> UInt8[Tensor, "channels height width"]:
    """The first `extent` rows and columns, of which the last may be parts, antialiased to `size`.

    Done before a picture is turned, while it lies in memory pixel by pixel, as decoders give it: torch resizes such without a
    copy, if it knows them by the stride of their batch, which pixels[None] has wrong.
    """
    stored = tuple(pixels.shape[1:])
    if stored == size:
        return pixels
    batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    if stored == extent:
        return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]
    # torch rounds the product of factor and side down: by no more than a hair too large, it comes out at `size`.
    factors = [wanted / side * (1 + 1e-12) for wanted, side in zip(size, extent, strict=True)]
    return F.interpolate(batch, scale_factor=factors, mode="bilinear", antialias=True)[0]


def _premultiply(pixels: UInt8[Tensor, "4 height width"]) -> UInt8[Tensor, "4 height width"]:
    wide = pixels.to(torch.int32)
    color = wide[:3] * wide[3:] + 128
    color += color >> 8  # with the next line: a division by 255, rounded to nearest, exact up to 255 * 255
    color >>= 8
    return torch.cat([color.to(torch.uint8), pixels[3:]])


def _orient(pixels: UInt8[Tensor, "channels h w"], orientation: int) -> UInt8[Tensor, "channels height width"]:
    """Turns a stored picture as EXIF's orientation says."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(_FLIPS[orientation]) if orientation in _FLIPS else pixels


def _place(pixels: UInt8[Tensor, "channels h w"], height: int, width: int) -> UInt8[Tensor, "4 {height} {width}"]:
    """A picture, opaque if it has three channels, in the middle of a transparent one."""
    if pixels.shape == (4, height, width):
        return pixels
    inner_height, inner_width = pixels.shape[1:]
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    out = torch.zeros(4, height, width, dtype=torch.uint8)
    inner = out[:, top : top + inner_height, left : left + inner_width]
    inner[: len(pixels)] = pixels
    if len(pixels) == 3:
        inner[3] = 255
    return out


def composite(images: UInt8[Tensor, "B 4 H W"]) -> UInt8[Tensor, "B 3 H W"]:
    """Premultiplied pictures on white."""
    return images[:, :3] + (255 - images[:, 3:])  # resizing rounds color and alpha alike, so color <= alpha: no wrap


def augment(images: UInt8[Tensor, "B 4 H W"], seeds: Int[Tensor, " B"], config: AugmentConfig) -> UInt8[Tensor, "B 3 H W"]:
    """Premultiplied pictures, randomly turned, scaled, shifted, put on a background and recolored.

    `seeds`: int64. A picture's result depends on its own seed alone, not on its batch mates. Crops were made while decoding.
    With the default config, in which nothing changes, this is `composite`.
    """
    if config == AugmentConfig(crop=config.crop):
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


def random_crop(seed: int, share: float) -> Crop:
    """A square that keeps at least `share` of a picture's area, drawn for this seed. The middle for 1."""
    if share == 1:
        return Crop()
    return Crop(share, uniform(torch.tensor([seed]), len(_DRAWS) + DRAWS)[0, len(_DRAWS) :].tolist())


def uniform(seeds: Int[Tensor, " B"], draws: int) -> Float[Tensor, "B {draws}"]:
    """Numbers in [0, 1): draw d of seed s is a function of (s, d) alone (splitmix64, Steele et al., OOPSLA 2014)."""
    counter = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = seeds.numpy().astype(np.uint64)[:, None] + counter
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(40)).astype(np.float32) / 2**24)


Draw = dict[str, Float[Tensor, "b 1 1 1"]]


def _turn(pixels: Float[Tensor, "b 4 H W"], draw: Draw, config: AugmentConfig) -> Float[Tensor, "b 4 H W"]:
    if not (config.rotate or config.scale or config.shift):
        return pixels
    angle = (2 * draw["angle"] - 1) * math.radians(config.rotate)
    zoom = _each(lambda exponent: (1 + config.scale) ** exponent, 2 * draw["scale"] - 1)
    shift_x, shift_y = (2 * config.shift * (2 * draw[name] - 1) for name in ("x", "y"))  # a side is 2 long here
    height, width = pixels.shape[2:]
    x = (torch.arange(width) * 2 + 1) / width - 1 - shift_x
    y = ((torch.arange(height) * 2 + 1) / height - 1)[:, None] - shift_y
    cos, sin = _each(math.cos, angle) / zoom, _each(math.sin, angle) / zoom
    # Products and sums one by one, no matmul: its rounding may depend on how many pictures there are.
    # A unit of y is height / width units of x in pixels, so that a circle stays a circle.
    grid = torch.stack([cos * x + sin * (y * (height / width)), cos * y - sin * (x * (width / height))], dim=-1)[:, 0]
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _each(function: Callable[[float], float], values: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b 1 1 1"]:
    """One by one: torch computes functions eight at a time, and rounds some, powers, otherwise where fewer are left over."""
    return torch.tensor([function(value) for value in values.flatten().tolist()]).reshape(values.shape)


def _lay_on_background(pixels: Float[Tensor, "b 4 H W"], draw: Draw, config: AugmentConfig) -> Float[Tensor, "b 3 H W"]:
    color = torch.cat([draw["red"], draw["green"], draw["blue"]], dim=1)
    color = torch.where(draw["background"] < config.background, color, torch.ones_like(color))
    return pixels[:, :3] + (255 - pixels[:, 3:]) * color


def _recolor(pixels: Float[Tensor, "b 3 H W"], draw: Draw, config: AugmentConfig) -> Float[Tensor, "b 3 H W"]:
    """Brightness, contrast (about mid gray) and saturation at once: own * color + shared * luminance + offset."""
    if not (config.color or config.grayscale):
        return pixels
    factor = {name: 1 + config.color * (2 * draw[name] - 1) for name in ("brightness", "contrast", "saturation")}
    saturation = torch.where(draw["grayscale"] < config.grayscale, 0.0, factor["saturation"])
    gain = factor["brightness"] * factor["contrast"]
    red, green, blue = pixels.split(1, dim=1)
    luminance = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
    shared = luminance * (gain * (1 - saturation)) + 127.5 * (1 - factor["contrast"])
    return pixels * (gain * saturation) + shared


def patchify(images: UInt8[Tensor, "B 3 H W"], patch: int) -> UInt8[Tensor, "N patch_values"]:
    """Patches of all pictures, raster order within each; values of a patch in (row, column, channel) order."""
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    tiles = images.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # B, 3, row, y, column, x
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(len(images) * rows * columns, patch * patch * 3)
