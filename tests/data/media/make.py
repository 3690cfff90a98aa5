"""Encoded pictures, sounds and videos, made as they are needed, and ways to break them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import soundfile
import torch

FAST = {"libx264": {"preset": "ultrafast"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}
BITS = 8  # of the number that a frame of `numbered` shows


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def photo(width: int, height: int) -> np.ndarray:
    """Smooth colors, which lossy codecs keep."""
    return np.asarray(PIL.Image.fromarray(noise(4, 5, 3)).resize((width, height), PIL.Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray | PIL.Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *, extra: bytes = b"", interlace: int = 0) -> bytes:
    """A PNG of the kinds that PIL does not write. `rows`: each behind its filter byte; `extra`: chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + end


def tones(rate: int, seconds: float, frequencies: Iterable[float] = (220.0, 997.0, 3100.0)) -> np.ndarray:
    """A sum of sines below 8 kHz, whose value is known at any rate."""
    time = np.arange(round(rate * seconds)) / rate
    return (sum(np.sin(2 * np.pi * f * time + f) for f in frequencies) * 0.2).astype(np.float32)


def chirp(rate: int, seconds: float) -> np.ndarray:
    """From 100 Hz upwards: no two stretches of it are alike."""
    time = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * (100 + 150 * time) * time)).astype(np.float32)


def sound(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    """Encoded by libsndfile. `samples`: one channel, or (samples, channels)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def track(samples: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    """One channel, encoded by FFmpeg."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono", bit_rate=192_000)
        for packet in _encoded_sound(stream, samples, rate):
            output.mux(packet)
    return buffer.getvalue()


def _encoded_sound(stream: av.AudioStream, samples: np.ndarray, rate: int) -> Iterator[av.Packet]:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="flt", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    yield from stream.encode(frame)
    yield from stream.encode(None)


def numbered(count: int, width: int, height: int) -> list[np.ndarray]:
    """Frames that show their number: bit b is white in the b-th of `BITS` columns of the upper half; the lower half is noise."""
    frames = []
    for number in range(count):
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        for bit in range(BITS):
            frame[: height // 2, width * bit // BITS : width * (bit + 1) // BITS] = 255 * (number >> bit & 1)
        frame[height // 2 :] = np.roll(photo(width, height - height // 2), 3 * number, axis=1)
        frames.append(frame)
    return frames


def number_shown(frame: torch.Tensor) -> int:
    """What `numbered` wrote into a frame, RGBA of any size, upright."""
    upper = frame[:3, : frame.shape[1] // 2].float().mean(0)
    columns = [
        upper[2:-2, upper.shape[1] * bit // BITS + 2 : upper.shape[1] * (bit + 1) // BITS - 2].mean() for bit in range(BITS)
    ]
    return sum(1 << bit for bit, value in enumerate(columns) if value > 127)


def video(
    frames: list[np.ndarray],
    container: str = "mp4",
    codec: str = "libx264",
    *,
    gop: int = 12,
    fps: int = 30,
    ticks: list[int] | None = None,
    rotation: int = 0,
    samples: np.ndarray | None = None,
    options: dict[str, str] | None = None,
    coder: dict[str, str] | None = None,
) -> bytes:
    """Encoded frames. `ticks`: when each is shown, in milliseconds, where not evenly; `samples`: a sound track at 48 kHz;
    `options` and `coder`: FFmpeg's, of the container and of the codec."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=fps, options=FAST.get(codec, {}) | (coder or {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.gop_size, stream.codec_context.thread_count = "yuv420p", gop, 1
        if rotation:
            stream.set_display_rotation(rotation)
        sound_codec = "libopus" if container == "webm" else "aac"
        if samples is not None:  # all streams must be there before the first packet
            sound_stream = output.add_stream(sound_codec, rate=48_000, layout="mono", bit_rate=192_000)
        clock = Fraction(1, 1000) if ticks else Fraction(1, fps)
        stream.codec_context.time_base = clock
        for packet in _encoded_frames(stream, frames, ticks or list(range(len(frames))), clock):
            output.mux(packet)
        for packet in _encoded_sound(sound_stream, samples, 48_000) if samples is not None else ():
            output.mux(packet)
    return buffer.getvalue()


def _encoded_frames(stream: av.VideoStream, frames: list[np.ndarray], ticks: list[int], clock: Fraction) -> Iterator[av.Packet]:
    for tick, pixels in zip(ticks, frames, strict=True):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = tick, clock
        yield from stream.encode(frame)
    yield from stream.encode(None)


def animated_webp(frames: list[np.ndarray], milliseconds: int | list[int] = 100) -> bytes:
    first, *others = [PIL.Image.fromarray(frame) for frame in frames]
    return encode(first, "WEBP", save_all=True, append_images=others, duration=milliseconds, lossless=True)


def broken(data: bytes, others: list[bytes], count: int = 40) -> Iterator[bytes]:
    """The same bytes cut, with flipped bits, with zeros, and with the start or the end of another file."""
    draw = random.Random(len(data))
    for number in range(count):
        at = draw.randrange(len(data)) if number % 3 else draw.randrange(min(256, len(data)))  # headers more often
        other = draw.choice(others)
        flipped = bytearray(data)
        for _ in range(1 + number % 5):
            flipped[draw.randrange(at, min(at + 64, len(data)))] ^= 1 << draw.randrange(8)
        length = draw.randrange(1, 64)
        yield (
            data[:at],
            bytes(flipped),
            data[:at] + bytes(length) + data[at + length :],
            other[: draw.randrange(8, 40)] + data[at:],
            data[:at] + other[at:],
        )[number % 5]
