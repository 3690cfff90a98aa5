"""Encoded video to frames.

    bytes --probe_video--> seconds, fps, width, height; the plan has --frame_count--> frames of a clip
    clip --frame_times--> instants --decode_video--> the frame shown at each, as `images.decode_image` gives a picture

Letters: F frames. Its sound is read by `audio.decode_audio` from the same bytes.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TypeVar

import av
import numpy as np
import PIL.Image
import torch
from av import VideoFrame
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from jaxtyping import UInt8
from torch import Tensor

from mmpt.data.faults import BadMedia
from mmpt.data.media.containers import MAX_SECONDS, container_kind, decoding, open_container, origin
from mmpt.data.media.headers import read_header, webp_frames
from mmpt.data.media.images import MAX_PIXELS, Fit, bring
from mmpt.types import Buffer

MAX_BYTES = 2**30
SLACK = 0.5  # seconds that a video may be shorter than is said of it
MAX_DECODED = 2**35
"""Pixels that are decoded from one key frame on, those between the wanted frames too: some minutes of a core."""

_MAX_WEBP = 2**30  # pixels of all frames of an animated WebP, of which none can be passed over
_MAX_STEPS = 8  # key frames back: in sound files one is enough
_WEBP_DEFAULT = 100  # milliseconds for which browsers show a frame that says 0
_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mjpeg", "prores"})
_ORIENTATIONS = {0: 1, 90: 8, -90: 6, 180: 3, -180: 3}  # degrees counterclockwise -> EXIF's orientation

Seconds = TypeVar("Seconds", float, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    width: int  # pixels, as shown: rotation applied
    height: int  # pixels
    fps: float  # frames a second, on average
    frames: int
    seconds: float
    audio: bool  # whether there is a sound track
    kind: str  # "MP4", "MATROSKA" or "WEBP"


def probe_video(data: Buffer) -> VideoInfo:
    """Size and length of encoded video; one frame is decoded. WebP must be animated.

    Raises BadMedia: "decode" for what is no MP4, Matroska or WebP with a picture track, "limit" for too many bytes, pixels
    or seconds.
    """
    kind = _checked_kind(data)
    if kind == "WEBP":
        header, ends = read_header(data), _webp_ends(data)
        return VideoInfo(
            width=header.width,
            height=header.height,
            fps=len(ends) / ends[-1],
            frames=len(ends),
            seconds=ends[-1],
            audio=False,
            kind=kind,
        )
    with open_container(data, kind, MAX_PIXELS) as container:
        track = _track(container, kind)
        first = next(container.decode(track), None)
        if first is None:
            raise BadMedia("decode", "a video without frames")
        width, height = _shown_size(track, first)
        audio = any(stream.codec_context is not None for stream in container.streams.audio)
        frames, start, end = _extent(container, track)
    if not end > max(start, 0):
        raise BadMedia("decode", "a video of no length")
    if end > MAX_SECONDS:
        raise BadMedia("limit", f"{end:.0f} seconds, more than the {MAX_SECONDS} that are read")
    return VideoInfo(width=width, height=height, fps=frames / (end - start), frames=frames, seconds=end, audio=audio, kind=kind)


def _extent(container: InputContainer, track: VideoStream) -> tuple[int, float, float]:
    """Frames of a track, and the seconds of its start and end: of MP4 from its tables; else its packets are counted."""
    tick, zero = track.time_base, origin(container)
    if track.frames > 0 and track.duration is not None:
        start = track.start_time or 0
        return track.frames, float(start * tick) - zero, float((start + track.duration) * tick) - zero
    container.seek(0)
    usual = 1 / ((track.average_rate or 25) * tick)  # ticks
    stretches = [
        (packet.pts, packet.pts + (packet.duration or usual)) for packet in container.demux(track) if packet.pts is not None
    ]
    if not stretches:
        raise BadMedia("decode", "a video without frames")
    start, end = min(start for start, _ in stretches), max(end for _, end in stretches)
    return len(stretches), float(start * tick) - zero, float(end * tick) - zero


def frame_count(seconds: Seconds, fps: float, max_frames: int) -> Seconds:
    """Frames that are taken of a clip so long. Of arrays too."""
    count = np.clip(np.floor(np.asarray(seconds) * fps + 1e-6).astype(np.int64), 1, max_frames)
    return count if isinstance(seconds, np.ndarray) else int(count)


def frame_times(clip: tuple[float, float], fps: float, max_frames: int) -> list[float]:
    """Instants, seconds into the file, at which a clip is looked at: the middles of so many equal stretches of it."""
    start, stop = clip
    count = frame_count(stop - start, fps, max_frames)
    return [start + (number + 0.5) * (stop - start) / count for number in range(count)]


@dataclass(frozen=True)
class Claim:
    """What a document says of a video."""

    width: int  # pixels, as shown
    height: int  # pixels
    stop: float  # seconds: it lasts at least so long

    def check(self, width: int, height: int, seconds: float) -> None:
        """Raises BadMedia where the video is another."""
        if (width, height) != (self.width, self.height):
            raise BadMedia("size", f"a video of {width} x {height} pixels, where {self.width} x {self.height} were promised")
        if seconds < self.stop - SLACK:
            raise BadMedia("size", f"a video of {seconds:.2f} seconds, where {self.stop:.2f} were promised")


def decode_video(
    data: Buffer, times: Sequence[float], height: int, width: int, *, fit: Fit = "stretch", claim: Claim | None = None
) -> tuple[UInt8[Tensor, "F 4 {height} {width}"], list[float]]:
    """The frames shown at `times` (seconds into the file, ascending), and when each of them began.

    A frame is shown from its time stamp to the next frame's; the first also before, the last also after. Colors and `fit` as
    in `images.decode_image`. Raises BadMedia as `probe_video` does, "decode" for broken bytes, and "size" for a false claim.
    """
    assert len(times) and all(a <= b for a, b in pairwise(times)), times
    kind = _checked_kind(data)
    if kind == "WEBP":
        return _decode_webp(data, times, height, width, fit, claim)
    out = torch.empty(len(times), 4, height, width, dtype=torch.uint8)
    stamps: list[float] = []
    with open_container(data, kind, MAX_PIXELS) as container:
        track, zero, last = _track(container, kind), origin(container), None
        for number, frame in enumerate(_shown(container, track, [time + zero for time in times])):
            if claim and not number:
                claim.check(*_shown_size(track, frame), (container.duration or 0) / av.time_base - zero)
            if frame.is_corrupt:
                raise BadMedia("decode", f"the {kind} has a broken frame at second {frame.time - zero:g}")
            if frame is last:
                out[number] = out[number - 1]
            else:
                rgb = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1)).permute(2, 0, 1)
                out[number] = bring(rgb, _orientation(frame), height, width, fit)
            stamps.append(frame.time - zero)
            last = frame
    return out, stamps


def _checked_kind(data: Buffer) -> str:
    if len(data) > MAX_BYTES:
        raise BadMedia("limit", f"a video of {len(data)} bytes, more than the {MAX_BYTES} that are read")
    kind = container_kind(data)
    if kind not in ("MP4", "MATROSKA", "WEBP"):
        raise BadMedia("decode", f"no MP4, Matroska or animated WebP: it starts with {bytes(data[:8])!r}")
    return kind


def _track(container: InputContainer, kind: str) -> VideoStream:
    if not container.streams.video or container.streams.video[0].codec_context is None:
        raise BadMedia("decode", f"the {kind} has no picture track that can be decoded")
    track = container.streams.video[0]
    if track.codec_context.name not in _CODECS:
        raise BadMedia("decode", f"the {kind} is coded in {track.codec_context.name}, which is not read")
    if track.width < 1 or track.height < 1:
        raise BadMedia("decode", f"the {kind} says that it is {track.width} x {track.height} pixels")
    if track.width * track.height > MAX_PIXELS:
        raise BadMedia("limit", f"{track.width} x {track.height} pixels a frame, more than the {MAX_PIXELS} that are decoded")
    return track


def _orientation(frame: VideoFrame) -> int:
    return _ORIENTATIONS[round(frame.rotation / 90) * 90]


def _shown_size(track: VideoStream, frame: VideoFrame) -> tuple[int, int]:
    return (track.height, track.width) if _orientation(frame) >= 5 else (track.width, track.height)


def _shown(container: InputContainer, track: VideoStream, times: list[float]) -> Iterator[VideoFrame]:
    """For every instant, on the container's clock, the frame that is shown then.

    Frames are decoded in order, but where a key frame lies between the last one and the next instant: then from there.
    """
    frames = _frames_from(container, track, times[0])
    keys: list[float] = []
    shown, ahead = None, next(frames, None)  # the last frame not after the instant, and the one after it
    for time in times:
        # The index is complete only once there was a seek: Matroska keeps the list of its key frames at the end.
        keys = keys or [float(entry.timestamp * track.time_base) for entry in track.index_entries if entry.is_keyframe]
        if ahead and bisect_right(keys, time) > bisect_right(keys, ahead.time):
            frames = _frames_from(container, track, time)
            shown, ahead = None, next(frames, None)
        while ahead and ahead.time <= time:
            shown, ahead = ahead, next(frames, None)
        if not (shown or ahead):
            raise BadMedia("decode", "a video without frames")
        yield shown or ahead


def _frames_from(container: InputContainer, track: VideoStream, time: float) -> Iterator[VideoFrame]:
    """Frames from a key frame on that is shown at `time` or before, in the order in which they are shown."""
    budget = MAX_DECODED // (track.width * track.height)
    for packet in _packets_from(container, track, int(time / track.time_base)):
        for frame in packet.decode():
            if frame.time is not None:
                yield frame
            if (budget := budget - 1) < 0:
                raise BadMedia("limit", f"more than {MAX_DECODED} pixels to decode from one key frame on")


def _packets_from(container: InputContainer, track: VideoStream, wanted: int) -> Iterator[Packet]:
    """Packets from the last key frame that is shown at `wanted`, in ticks of the track, or before; else from the first."""
    target = wanted
    for attempt in range(_MAX_STEPS):
        if target > 0 or attempt:
            container.seek(target, stream=track)
        packets = container.demux(track)
        first = next(packets)
        if first.dts is None or first.pts is None or first.pts <= wanted or first.dts > target:
            break
        target = first.dts - 1  # seeking goes by the time of decoding, which is before that of showing
    return chain((first,), packets)


def _webp_ends(data: Buffer) -> list[float]:
    """Seconds at which each frame of an animated WebP gives way to the next."""
    header, milliseconds = read_header(data), webp_frames(data)
    if not milliseconds:
        raise BadMedia("decode", "a still WebP is no video")
    pixels = header.width * header.height
    if pixels > MAX_PIXELS or pixels * len(milliseconds) > _MAX_WEBP:
        raise BadMedia("limit", f"an animated WebP of {len(milliseconds)} times {header.width} x {header.height} pixels")
    ends = list(accumulate((duration or _WEBP_DEFAULT) / 1000 for duration in milliseconds))
    if ends[-1] > MAX_SECONDS:
        raise BadMedia("limit", f"{ends[-1]:.0f} seconds, more than the {MAX_SECONDS} that are read")
    return ends


def _decode_webp(
    data: Buffer, times: Sequence[float], height: int, width: int, fit: Fit, claim: Claim | None
) -> tuple[UInt8[Tensor, "F 4 {height} {width}"], list[float]]:
    ends, header = _webp_ends(data), read_header(data)
    if claim:
        claim.check(header.width, header.height, ends[-1])
    numbers = [min(bisect_right(ends, time), len(ends) - 1) for time in times]
    frames: dict[int, Tensor] = {}
    with decoding("WEBP"), PIL.Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
        for number in numbers:
            if number not in frames:
                image.seek(number)  # PIL decodes those in between: each is drawn over the one before
                pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1)
                frames[number] = bring(pixels, 1, height, width, fit)
    return torch.stack([frames[number] for number in numbers]), [[0.0, *ends][number] for number in numbers]
