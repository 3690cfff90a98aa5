"""What a page that opens offline may hold of strangers' data: their text made legible, their media encoded anew.

    pixels --png, mp4-->, waveform --mp3-->, log-mel --mel_png--> bytes --Allowance.uri--> data URI
    text --Allowance.text--> characters that all can be seen

Letters: F frames, H and W pixels.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import soundfile
import torch.nn.functional as F
from av.codec.codec import UnknownCodecError
from jaxtyping import Float, UInt8
from markupsafe import escape
from torch import Tensor

from mmpt.data.media.audio import SAMPLE_RATE

_TICKS = 1000  # of the clock of a clip, a second
_SHADES = 64  # of a drawn log-mel: fewer compress better, more cannot be told apart
_STOPS = np.array([(12, 10, 34), (74, 26, 108), (170, 51, 106), (240, 122, 72), (252, 238, 176)])  # quiet to loud
_JOINERS = "\u200c\u200d"  # parts of words and of emoji


class Allowance:
    """The bytes that a page may still take. Once they are used up it is full, also for what is small."""

    def __init__(self, size: int) -> None:
        self.left = size

    @property
    def is_full(self) -> bool:
        return self.left <= 0

    def uri(self, kind: str, data: bytes) -> str:
        """A data URI; empty where the page is full."""
        uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        self.left -= len(uri)
        return "" if self.is_full else uri

    def text(self, text: str, most: int) -> str:
        """The first `most` characters, legible."""
        shown = legible(text[:most]) + (f" … and {len(text) - most:,} characters more" if len(text) > most else "")
        self.left -= len(escape(shown).encode())
        return shown


def legible(text: str) -> str:
    """Characters that cannot be seen, or that turn what follows them about, by their numbers; new lines and tabs stay."""
    return "".join(char if _is_seen(char) else f"⟨U+{ord(char):04X}⟩" for char in text)


def _is_seen(char: str) -> bool:
    if char in "\n\t" or char in _JOINERS:
        return True
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def png(pixels: UInt8[Tensor, "3 H W"]) -> bytes:
    return _png(PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))


def _png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mel_png(mel: Float[Tensor, "frames bins"]) -> bytes:
    """A log-mel as a PNG of one pixel a value: time to the right, high tones on top, quiet dark."""
    loudest = max(float(mel.max()), 0.0)  # else the noise of a silence would shine
    shades = ((mel.T.flip(0) - loudest) / 2 + 1).clamp(0, 1) * (_SHADES - 1)  # `log_mel` spans 2 below its loudest
    at = np.linspace(0, len(_STOPS) - 1, _SHADES)
    palette = np.stack([np.interp(at, range(len(_STOPS)), channel) for channel in _STOPS.T], axis=1)
    image = PIL.Image.fromarray(shades.round().byte().numpy())
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    return _png(image)


def mp3(waveform: Float[Tensor, " samples"]) -> bytes:
    """Sound at 16 kHz as an MP3, which all browsers play, of about 4 KB a second."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.clamp(-1, 1).numpy(), SAMPLE_RATE, format="MP3")
    return buffer.getvalue()


def mp4(frames: UInt8[Tensor, "F 3 H W"], times: Sequence[float], end: float) -> bytes | None:
    """A silent H.264 clip: each frame from its time, in seconds, to the next one's, the last until `end`.

    A frame that begins when the one before it does is left out. None where FFmpeg has no encoder for it.
    """
    ticks = [round((time - times[0]) * _TICKS) for time in times]
    kept = [0, *(i for i in range(1, len(ticks)) if ticks[i] > ticks[i - 1])]
    starts = [ticks[i] for i in kept]
    stops = [*starts[1:], max(round((end - times[0]) * _TICKS), starts[-1] + 1)]
    frames = F.pad(frames[kept], (0, frames.shape[3] % 2, 0, frames.shape[2] % 2))  # H.264 wants even sides
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        try:
            stream = container.add_stream("h264", rate=25, options={"crf": "18", "preset": "veryfast"})
        except UnknownCodecError:
            return None
        stream.width, stream.height, stream.pix_fmt = frames.shape[3], frames.shape[2], "yuv420p"
        stream.codec_context.time_base, stream.codec_context.max_b_frames = Fraction(1, _TICKS), 0
        packets = [*(packet for frame in _timed(frames, starts) for packet in stream.encode(frame)), *stream.encode(None)]
        for packet, start, stop in zip(packets, starts, stops, strict=True):
            packet.duration = stop - start  # the encoder does not know how long the last frame is shown
        container.mux(packets)
    return buffer.getvalue()


def _timed(frames: UInt8[Tensor, "F 3 H W"], starts: Sequence[int]) -> Iterator[av.VideoFrame]:
    for pixels, start in zip(frames, starts, strict=True):
        frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        frame.pts, frame.time_base = start, Fraction(1, _TICKS)
        yield frame
