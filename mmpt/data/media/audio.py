"""Encoded sound to log-mel frames.

    bytes --probe_audio--> samples, sample_rate --frames_of--> frames that the plan makes room for
    bytes --decode_audio--> mono at 16 kHz --log_mel--> rows of MediaBatch.values

The log-mel is Whisper's (Radford et al., 2022): 80 or 128 bins, a frame every 10 ms.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal, TypeVar

import av
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from av.audio.stream import AudioStream
from av.container import InputContainer
from jaxtyping import Float
from torch import Tensor
from torchaudio.functional import resample
from torchaudio.transforms import Spectrogram

from mmpt.data.faults import BadMedia
from mmpt.data.media.containers import MAX_SECONDS, container_kind, decoding, open_container, origin
from mmpt.data.media.headers import riff_chunks
from mmpt.types import Buffer

SAMPLE_RATE = 16000
HOP = 160
N_FFT = 400

MAX_BYTES = 2**30
MAX_CHANNELS = 8
MIN_RATE, MAX_RATE = 1_000, 384_000
MAX_SAMPLES = 2**28  # that are decoded at once, per channel: 1 GiB in fp32

_BLOCK = 2**20  # samples read at once, before the channels are mixed
_MP3_LEAD = 16 * 1152  # samples: the frames that a frame may borrow bits from
_PREROLL = 0.25  # seconds before the start from which a compressed track is decoded, so that its decoder has settled
_MAX_KERNEL = 2**20  # elements of torchaudio's resampling kernel: an odd rate such as 44,101 Hz would take gigabytes
_MAX_COVER = 2**25  # pixels of a picture track, which is passed over
_LIBSNDFILE = {"WAV": ("WAV", "WAVEX"), "FLAC": ("FLAC",), "MP3": ("MP3",)}  # the kinds that libsndfile decodes, as it calls them
_KINDS = (*_LIBSNDFILE, "OGG", "MP4", "MATROSKA")
_LOUDEST = 1e6  # full scale is 1; far beyond it the power of a spectrum overflows
_SLACK = 0.1  # seconds that a track may be shorter than its container says

Count = TypeVar("Count", int, np.ndarray)
MelBins = Literal[80, 128]


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    sample_rate: int  # Hz
    samples: int  # at that rate, of one channel: what `decode_audio` gives of the whole
    kind: str  # "WAV", "FLAC", "MP3", "OGG", "MP4" or "MATROSKA"


def probe_audio(data: Buffer) -> AudioInfo:
    """Rate and length of encoded sound; nothing is decoded. The length is exact, but of Matroska, which counts milliseconds.

    Raises BadMedia: "decode" for what is none of the kinds, "limit" for too many bytes, seconds or channels, or an odd rate.
    """
    kind = _checked_kind(data)
    if kind in _LIBSNDFILE:
        with decoding(kind), _open_sound(data, kind) as file:
            rate, samples = file.samplerate, file.frames
    else:
        with open_container(data, kind, max_pixels=_MAX_COVER) as container:
            track = _track(container, kind)
            rate, samples = track.rate, _track_samples(container, track)
            if track.duration is None:
                samples = min(samples or MAX_SECONDS * rate, _count_samples(container, track))
    if samples < 1:
        raise BadMedia("decode", f"the {kind} holds no sound")
    return AudioInfo(sample_rate=rate, samples=samples, kind=kind)


def frames_of(samples: Count, sample_rate: Count, max_seconds: float) -> Count:
    """Log-mel frames that a plan makes room for: 100 for each second, up to `max_seconds`, at least one. Of arrays too."""
    resampled = np.minimum(-(-np.asarray(samples, dtype=np.int64) * SAMPLE_RATE // sample_rate), round(max_seconds * SAMPLE_RATE))
    frames = np.maximum(resampled // HOP, 1)
    return frames if isinstance(samples, np.ndarray) else int(frames)


def decode_audio(data: Buffer, *, start: float = 0.0, seconds: float) -> Float[Tensor, " samples"]:
    """Sound as fp32, 16 kHz, the mean of its channels: at most `seconds` of it from second `start` on.

    Of a video it is the first sound track, on the clock of its frames. What lies after the wanted stretch is not decoded.
    Raises BadMedia as `probe_audio` does, and "decode" for bytes that are broken or cut short, or no sound at `start`.
    """
    kind = _checked_kind(data)
    if kind in _LIBSNDFILE:
        with decoding(kind), _open_sound(data, kind) as file:
            rate = file.samplerate
            waveform = _read_sound(file, *_stretch(start, seconds, rate, file.frames))
    else:
        with open_container(data, kind, max_pixels=_MAX_COVER) as container:
            track = _track(container, kind)
            rate = track.rate
            samples = _track_samples(container, track) or MAX_SECONDS * rate  # a streamed Matroska says none
            waveform = _read_track(container, track, *_stretch(start, seconds, rate, samples))
    if not waveform.abs().max() < _LOUDEST:  # nor is NaN
        raise BadMedia("decode", f"the {kind} has samples that are no numbers, or beyond {_LOUDEST:g}")
    return _to_sample_rate(waveform, rate)[: round(seconds * SAMPLE_RATE)]


def _checked_kind(data: Buffer) -> str:
    if len(data) > MAX_BYTES:
        raise BadMedia("limit", f"a sound of {len(data)} bytes, more than the {MAX_BYTES} that are read")
    kind = container_kind(data)
    if kind not in _KINDS:
        raise BadMedia("decode", f"no WAV, FLAC, MP3, Ogg, MP4 or Matroska: it starts with {bytes(data[:8])!r}")
    return kind


def _check_limits(rate: int, channels: int, samples: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadMedia("limit", f"{rate} samples a second; {MIN_RATE} to {MAX_RATE} are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadMedia("limit", f"{channels} channels; 1 to {MAX_CHANNELS} are read")
    if samples > MAX_SECONDS * rate:
        raise BadMedia("limit", f"{samples // rate} seconds, more than the {MAX_SECONDS} that are read")


def _stretch(start: float, seconds: float, rate: int, samples: int) -> tuple[int, int]:
    """First sample and number of samples of what is wanted and there."""
    first = round(start * rate)
    count = min(math.ceil(seconds * rate), samples - first)
    if count <= 0:
        raise BadMedia("decode", f"no sound at second {start:g}: it ends at {samples / rate:g}")
    if count > MAX_SAMPLES:
        raise BadMedia("limit", f"{count} samples, more than the {MAX_SAMPLES} that are decoded at once")
    return first, count


def _open_sound(data: Buffer, kind: str) -> soundfile.SoundFile:
    if kind == "WAV":
        _check_wav(data)
    file = soundfile.SoundFile(io.BytesIO(data))
    try:
        if file.format not in _LIBSNDFILE[kind]:
            raise BadMedia("decode", f"the {kind} holds {file.format}")
        _check_limits(file.samplerate, file.channels, file.frames)
    except BadMedia:
        file.close()
        raise
    return file


def _check_wav(data: Buffer) -> None:
    """libsndfile takes what there is of a WAV that was cut; one that was streamed says that it does not know its length."""
    for name, claimed, body in riff_chunks(memoryview(data)):
        if name == b"data" and claimed > len(body) and claimed != 0xFFFFFFFF:
            raise BadMedia("decode", f"the WAV claims {claimed} bytes of sound and holds {len(body)}")


def _read_sound(file: soundfile.SoundFile, first: int, count: int) -> Float[Tensor, " samples"]:
    # Behind a seek an MP3 is silent for some frames, and soundfile seeks after each read: so it is read from before, at once.
    lead, block_size = (min(first, _MP3_LEAD), count + _MP3_LEAD) if file.format == "MP3" else (0, _BLOCK)
    file.seek(first - lead)
    out = np.empty(lead + count, dtype=np.float32)
    done = 0
    while done < len(out):
        block = file.read(min(block_size, len(out) - done), dtype="float32", always_2d=True)
        if not len(block):
            raise BadMedia("decode", f"the {file.format} ends at sample {first - lead + done} of {file.frames}")
        out[done : done + len(block)] = block.mean(axis=1)
        done += len(block)
    return torch.from_numpy(out[lead:])


def _track(container: InputContainer, kind: str) -> AudioStream:
    if not container.streams.audio or container.streams.audio[0].codec_context is None:
        raise BadMedia("decode", f"the {kind} has no sound track that can be decoded")
    track = container.streams.audio[0]
    _check_limits(track.rate or 0, track.channels or 0, 0)
    _check_limits(track.rate, track.channels, _track_samples(container, track))
    return track


def _track_samples(container: InputContainer, track: AudioStream) -> int:
    """Length of a track as its container says: exact in Ogg and MP4; Matroska gives the longest track's, in milliseconds."""
    exact = track.duration is not None
    seconds = track.duration * track.time_base if exact else Fraction(container.duration or 0, av.time_base)
    head = track.codec_context.extradata or b""
    if head.startswith(b"OpusHead") and "mp4" not in container.format.name:
        seconds -= Fraction(int.from_bytes(head[10:12], "little"), 48_000)  # what an Opus decoder drops at its start
    return math.ceil(seconds * track.rate)


def _count_samples(container: InputContainer, track: AudioStream) -> int:
    """Up to the end of the last packet: of a track without a length of its own."""
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(track) if packet.pts is not None]
    return math.ceil((max(ends, default=0) * track.time_base - Fraction(origin(container))) * track.rate)


def _read_track(container: InputContainer, track: AudioStream, first: int, count: int) -> Float[Tensor, " samples"]:
    rate, zero = track.rate, origin(container)
    out = np.zeros(count, dtype=np.float32)
    if first > _PREROLL * rate:
        container.seek(int((first / rate - _PREROLL + zero) / track.time_base), stream=track)
    at, end = None, 0  # where the next frame goes, and where what was decoded ends
    for block, time in _blocks(container, track):
        if at is None:
            at = round((time - zero) * rate) - first
        inside = block[max(-at, 0) : max(count - at, 0)]
        out[max(at, 0) : max(at, 0) + len(inside)] = inside
        at += len(block)
        end = min(at, count)
        if at >= count:
            break
    if end <= 0 or (track.duration is not None and end < count - _SLACK * rate):
        raise BadMedia("decode", f"the sound track ends {(count - end) / rate:.2f} seconds before its container says")
    return torch.from_numpy(out if track.duration is not None else out[:end])


def _blocks(container: InputContainer, track: AudioStream) -> Iterator[tuple[np.ndarray, float]]:
    """Every frame from here on, its channels mixed, and its time in seconds on the container's clock."""
    planar = av.AudioResampler(format="fltp")  # of the same rate and channels
    for frame in container.decode(track):
        if frame.sample_rate != track.rate:
            raise BadMedia("decode", f"the rate changes from {track.rate} Hz to {frame.sample_rate} Hz within the track")
        for piece in (frame,) if frame.format.name == "fltp" else planar.resample(frame):  # which most codecs give
            channels = piece.to_ndarray()
            yield channels[0] if len(channels) == 1 else channels.mean(axis=0), frame.time or 0.0


def _to_sample_rate(waveform: Float[Tensor, " samples"], rate: int) -> Float[Tensor, " resampled"]:
    """ceil(samples * 16000 / rate) samples."""
    shared = math.gcd(rate, SAMPLE_RATE)
    if (rate // shared) * (SAMPLE_RATE // shared) <= _MAX_KERNEL:
        return resample(waveform, rate, SAMPLE_RATE)
    frame = av.AudioFrame.from_ndarray(waveform.numpy()[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    pieces = [piece.to_ndarray()[0] for source in (frame, None) for piece in resampler.resample(source)]
    length = -(-len(waveform) * SAMPLE_RATE // rate)
    out = torch.from_numpy(np.concatenate(pieces))[:length]
    return F.pad(out, (0, length - len(out)))


def log_mel(waveform: Float[Tensor, " samples"], frames: int, mel_bins: MelBins) -> Float[Tensor, "{frames} {mel_bins}"]:
    """Whisper's log-mel spectrogram of sound at 16 kHz, which is cut, or padded with silence, to `frames` of 10 ms."""
    padded = max(frames, 2) * HOP  # the first and last windows reflect 200 samples
    waveform = F.pad(waveform[: frames * HOP], (0, padded - min(len(waveform), frames * HOP)))
    spectrogram, filters = _transforms(mel_bins)
    power = spectrogram(waveform)[:, :frames].contiguous()
    logs = (filters @ power).clamp_(min=1e-10).log10_()
    return ((logs.maximum(logs.max() - 8) + 4) / 4).T.contiguous()


@cache
def _transforms(mel_bins: int) -> tuple[Spectrogram, Float[Tensor, "mel_bins frequencies"]]:
    """The power spectrogram, and Slaney's triangles of unit area: evenly spaced up to 1 kHz, then by equal ratios.

    In fp64: torchaudio's fp32 bank is off by 2e-7, which beside a loud tone makes 3e-4 of a log-mel.
    """
    highest = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000) / math.log(6.4)
    mels = np.linspace(0, highest, mel_bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))[:, None]
    frequencies = np.arange(N_FFT // 2 + 1) * (SAMPLE_RATE / N_FFT)
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return Spectrogram(N_FFT, hop_length=HOP), torch.from_numpy(triangles).float()
