from __future__ import annotations

import io
import math
import struct
from itertools import accumulate

import av
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import animated_webp, broken, chirp, encode, number_shown, numbered, photo, video

from mmpt.data.faults import BadMedia
from mmpt.data.media.audio import decode_audio
from mmpt.data.media.images import MAX_PIXELS
from mmpt.data.media.video import VideoInfo, decode_video, frame_count, frame_times, probe_video

WIDTH, HEIGHT = 128, 96
FRAMES = numbered(120, WIDTH, HEIGHT)
UNEVEN = list(accumulate(20 + 61 * (number % 7 == 3) + 300 * (number % 31 == 30) for number in range(90)))
SCENES = {"x264-params": "scenecut=0:open-gop=1:bframes=3"}

VIDEOS = {
    "h264, a key frame in 12": video(FRAMES, gop=12),
    "h264, a key frame in 250": video(FRAMES, gop=250),
    "h264 that orders frames anew, open groups": video(FRAMES, gop=12, coder={"preset": "veryfast"} | SCENES),
    "h264 in fragments": video(FRAMES, gop=12, options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "h264 in Matroska": video(FRAMES, "matroska", gop=12),
    "vp9": video(FRAMES, "webm", "libvpx-vp9", gop=30),
    "vp9, streamed without an index": video(FRAMES, "webm", "libvpx-vp9", gop=30, options={"live": "1"}),
    "vp8": video(FRAMES, "webm", "libvpx", gop=30, coder={"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    "mpeg4": video(FRAMES, "mov", "mpeg4", gop=12),
    "h264 at an uneven pace": video(FRAMES[:90], gop=24, ticks=UNEVEN, coder={"preset": "veryfast"}),
    "vp9 at an uneven pace": video(FRAMES[:90], "webm", "libvpx-vp9", gop=24, ticks=UNEVEN),
}
WEBP = animated_webp(FRAMES[:40], [50 + 70 * (number % 3) for number in range(40)])


def decoded_in_order(data: bytes) -> tuple[list[float], list[np.ndarray]]:
    """The reference: time stamps, from the container's start on, and pixels of every frame."""
    with av.open(io.BytesIO(data)) as container:
        start = container.start_time / av.time_base
        frames = [(frame.time - start, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [time for time, _ in frames], [pixels for _, pixels in frames]


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize(
    ("clip", "fps"), [((0, 4), 2), ((0, 4), 30), ((1.31, 3.7), 5), ((3.9, 4.0), 1), ((0.5, 0.6), 60), ((2, 7), 3)]
)
def test_the_frames_shown_are_those_of_decoding_everything(name: str, clip: tuple[float, float], fps: float):
    stamps, frames = decoded_in_order(VIDEOS[name])
    times = frame_times(clip, fps, 64)
    shown, begun = decode_video(memoryview(VIDEOS[name]), times, HEIGHT, WIDTH)
    wanted = [max(0, sum(stamp <= time for stamp in stamps) - 1) for time in times]
    assert [number_shown(frame) for frame in shown] == wanted
    assert begun == pytest.approx([stamps[number] for number in wanted], abs=1e-6)
    assert np.array_equal(shown[:, :3].numpy(), np.stack([frames[number].transpose(2, 0, 1) for number in wanted]))
    assert (shown[:, 3] == 255).all()


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.floats(0, 6), min_size=1, max_size=12).map(sorted),
    st.sampled_from(["h264 that orders frames anew, open groups", "vp9 at an uneven pace"]),
)
def test_any_instants_may_be_asked_for(times: list[float], name: str):
    stamps, _ = decoded_in_order(VIDEOS[name])
    shown, begun = decode_video(VIDEOS[name], times, HEIGHT, WIDTH)
    wanted = [max(0, sum(stamp <= time for stamp in stamps) - 1) for time in times]
    assert [number_shown(frame) for frame in shown] == wanted and len(begun) == len(times)


def test_animated_webp_is_shown_as_long_as_it_says():
    times = [0.0, 0.049, 0.051, 0.5, 1.7, 3.3, 99.0]
    ends = list(accumulate((50 + 70 * (number % 3)) / 1000 for number in range(40)))
    shown, begun = decode_video(WEBP, times, HEIGHT, WIDTH)
    wanted = [min(sum(end <= time for end in ends), 39) for time in times]
    assert [number_shown(frame) for frame in shown] == wanted
    assert begun == pytest.approx([0, *ends][wanted[0] : 1] + [[0, *ends][number] for number in wanted[1:]])
    assert np.array_equal(shown[:, :3].numpy(), np.stack([FRAMES[number].transpose(2, 0, 1) for number in wanted]))
    assert probe_video(WEBP) == VideoInfo(
        width=WIDTH,
        height=HEIGHT,
        fps=pytest.approx(40 / ends[-1]),
        frames=40,
        seconds=pytest.approx(ends[-1]),
        audio=False,
        kind="WEBP",
    )


def test_transparent_webp_is_premultiplied():
    frames = [np.dstack([photo(16, 16), np.full((16, 16), alpha, dtype=np.uint8)]) for alpha in (255, 102, 0)]
    shown, _ = decode_video(animated_webp(frames), [0.05, 0.15, 0.25], 16, 16)
    assert shown[:, 3].flatten(1).unique(dim=1).flatten().tolist() == [255, 102, 0]
    assert np.abs(shown[1, :3].numpy() - photo(16, 16).transpose(2, 0, 1) * 0.4).max() <= 1 and not shown[2].any()


@pytest.mark.parametrize("name", VIDEOS)
def test_probing_tells_size_and_length(name: str):
    info = probe_video(VIDEOS[name])
    stamps, _ = decoded_in_order(VIDEOS[name])
    assert (info.width, info.height, info.audio) == (WIDTH, HEIGHT, False)
    assert info.kind == ("MATROSKA" if "vp" in name or "Matroska" in name else "MP4")
    assert info.frames == len(stamps)
    assert stamps[-1] < info.seconds < stamps[-1] + 0.1
    assert info.fps == pytest.approx(info.frames / info.seconds)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_is_applied(rotation: int):
    data = video(FRAMES[:12], rotation=rotation)
    info = probe_video(data)
    assert (info.width, info.height) == ((WIDTH, HEIGHT) if rotation == 180 else (HEIGHT, WIDTH))
    shown, _ = decode_video(data, [0.2], info.height, info.width)
    upright = decode_video(video(FRAMES[:12]), [0.2], HEIGHT, WIDTH)[0]
    assert torch.equal(shown, torch.rot90(upright, rotation // 90, (2, 3)))


def test_frames_are_brought_to_size_like_pictures():
    padded, _ = decode_video(VIDEOS["h264, a key frame in 12"], [1.0], 64, 64, fit="pad")
    assert (padded[0, 3, 8:56] == 255).all() and not padded[0, :, :8].any() and not padded[0, :, 56:].any()
    stretched, _ = decode_video(VIDEOS["h264, a key frame in 12"], [1.0], 32, 64)
    assert (stretched[0, 3] == 255).all() and number_shown(stretched[0]) == number_shown(padded[0, :, 8:56]) == 30


def test_a_clip_that_ends_early_repeats_its_last_frame():
    for name in ("h264, a key frame in 250", "vp9"):
        shown, begun = decode_video(VIDEOS[name], [3.9, 4.5, 80.0], HEIGHT, WIDTH)
        assert [number_shown(frame) for frame in shown] == [117, 119, 119] and begun[1] == begun[2]


@settings(deadline=None)
@given(st.floats(0, 1e4), st.floats(0.01, 1e4), st.floats(0.1, 60), st.integers(1, 1024))
def test_instants_are_spread_evenly(start: float, seconds: float, fps: float, most: int):
    times = frame_times((start, start + seconds), fps, most)
    count = min(most, max(1, math.floor(((start + seconds) - start) * fps + 1e-6)))
    assert len(times) == count == frame_count(((start + seconds) - start), fps, most)
    assert frame_count(np.array([(start + seconds) - start, 1e-9]), fps, most).tolist() == [count, 1]
    steps = np.diff([start - seconds / count / 2, *times, start + seconds + seconds / count / 2])
    assert steps == pytest.approx(np.full(count + 1, seconds / count), rel=1e-3, abs=1e-6)


def test_the_sound_track_is_told_and_read():
    wave = chirp(48_000, 2)
    for container, codec in (("mp4", "libx264"), ("webm", "libvpx-vp9")):
        data = video(FRAMES[:60], container, codec, samples=wave)
        info = probe_video(data)
        assert info.audio and info.seconds == pytest.approx(2, abs=0.05)
        assert len(decode_audio(data, start=0.5, seconds=1)) == 16_000
        assert number_shown(decode_video(data, [1.0], HEIGHT, WIDTH)[0][0]) == 30


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_pictures_may_begin_after_the_sound(container: str, codec: str):
    ticks = [500 + 40 * number for number in range(50)]
    data = video(FRAMES[:50], container, codec, ticks=ticks, samples=chirp(48_000, 3))
    info = probe_video(data)
    assert (info.frames, info.fps, info.seconds) == (50, pytest.approx(25, rel=0.02), pytest.approx(2.5, abs=0.05))
    shown, begun = decode_video(data, [0.1, 0.53, 2.0], HEIGHT, WIDTH)
    assert [number_shown(frame) for frame in shown] == [0, 0, 37] and begun == pytest.approx([0.5, 0.5, 1.98], abs=2e-3)


def reason(data: bytes) -> str:
    """Why both `probe_video` and `decode_video` refuse it."""
    with pytest.raises(BadMedia) as probed:
        probe_video(data)
    with pytest.raises(BadMedia) as decoded:
        decode_video(data, [0.1], 16, 16)
    assert probed.value.reason == decoded.value.reason
    return decoded.value.reason


def test_tables_that_claim_billions_are_refused_before_they_are_written_out():
    data = VIDEOS["h264, a key frame in 12"]
    for box, offset in ((b"stsz", 12), (b"stts", 12)):
        at = data.index(box) + offset
        assert reason(data[:at] + b"\x7f\xff\xff\xff" + data[at + 4 :]) == "limit"
    fragments = VIDEOS["h264 in fragments"]
    at = fragments.index(b"trun") + 8
    assert reason(fragments[:at] + b"\x7f\xff\xff\xff" + fragments[at + 4 :]) == "limit"


def test_webp_of_too_many_pixels_is_refused_from_its_headers(monkeypatch: pytest.MonkeyPatch):
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    frame = WEBP[WEBP.index(b"ANMF") :][: 8 + struct.unpack("<I", WEBP[WEBP.index(b"ANMF") + 4 :][:4])[0]]
    large = WEBP[:24] + b"\xe7\x03\0\xe7\x03\0" + WEBP[30:]  # 1000 x 1000
    huge = WEBP[:24] + b"\xff\x3f\0\xff\x3f\0" + WEBP[30:]
    monkeypatch.setattr(PIL.Image, "open", opened)
    assert reason(large + frame * 2000) == "limit"
    assert reason(huge) == "limit"


def test_pictures_over_the_limit_are_refused():
    height, width = 4112, 8192
    assert height * width > MAX_PIXELS
    assert reason(video([np.zeros((height, width, 3), dtype=np.uint8)])) == "limit"


def test_long_videos_are_refused():
    data = video(FRAMES[:3], "matroska", ticks=[0, 40, 5 * 3600 * 1000])
    assert reason(data) == "limit"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no video",
        encode(photo(8, 8), "WEBP"),
        encode(photo(8, 8), "GIF"),
        b"#EXTM3U\nhttp://127.0.0.1/a.ts\n",
        b"ffconcat version 1.0\nfile make.py\n",
    ],
)
def test_what_is_no_video_is_refused(data: bytes):
    assert reason(data) == "decode"


@pytest.mark.parametrize("name", ["h264, a key frame in 12", "h264 in fragments", "vp9", "mpeg4", "webp"])
def test_broken_bytes_end_in_bad_media_or_in_frames(name: str):
    small = {"webp": WEBP} | VIDEOS
    for data in broken(small[name], list(small.values())):
        try:
            assert decode_video(data, [0.1, 1.5], 16, 16)[0].shape == (2, 4, 16, 16)
            assert probe_video(data).frames > 0
        except BadMedia as fault:
            assert fault.reason in ("decode", "limit")
