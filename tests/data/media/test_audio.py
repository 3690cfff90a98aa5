from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import broken, chirp, numbered, sound, tones, track, video
from transformers import WhisperFeatureExtractor

from mmpt.data.faults import BadMedia
from mmpt.data.media import audio
from mmpt.data.media.audio import HOP, MAX_CHANNELS, SAMPLE_RATE, AudioInfo, decode_audio, frames_of, log_mel, probe_audio

SECONDS = 2.503  # not a whole number of the frames of any codec
WAVE = chirp(48_000, SECONDS)
WAVE_16 = chirp(16_000, SECONDS)

EXACT = {
    "WAV": sound(WAVE, 48_000, "WAV", "FLOAT"),
    "FLAC": sound(WAVE, 48_000, "FLAC", "PCM_24"),
    "WAV of 16 bits": sound(WAVE, 48_000, "WAV", "PCM_16"),
    "WAV of 8 bits": sound(np.stack([WAVE] * 2, 1), 48_000, "WAV", "PCM_U8"),
}
LOSSY = {
    "MP3": sound(WAVE, 48_000, "MP3"),
    "OGG of Opus": track(WAVE, 48_000, "ogg", "libopus"),
    "OGG of Vorbis": sound(WAVE, 48_000, "OGG", "VORBIS"),
    "MP4": track(WAVE, 48_000, "ipod", "aac"),
    "MATROSKA": track(WAVE, 48_000, "webm", "libopus"),
}
KINDS = EXACT | LOSSY


def close(one: torch.Tensor, other: torch.Tensor | np.ndarray, tolerance: float) -> bool:
    difference = one - torch.as_tensor(other)
    return bool(difference.square().mean().sqrt() < tolerance)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_decoded_in_full_and_in_place(name: str):
    data = KINDS[name]
    info = probe_audio(data)
    assert info == AudioInfo(sample_rate=48_000, samples=info.samples, kind=name.split()[0])
    assert abs(info.samples - len(WAVE)) <= (48 if info.kind in ("MATROSKA", "MP4") else 0)
    decoded = decode_audio(memoryview(data), seconds=30)
    assert decoded.dtype == torch.float32
    assert abs(len(decoded) - math.ceil(info.samples / 3)) <= (16 if info.kind == "MATROSKA" else 0)
    inner = slice(200, len(WAVE_16) - 800)  # a codec may fade in or out
    # A chirp at 850 Hz turns by a third of a radian in a sample: one sample too early is an error of 0.1.
    assert close(decoded[inner], WAVE_16[inner], 0.005 if name in EXACT else 0.03)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("start", "seconds"), [(0, 0.5), (0.3, 0.7), (1.23456, 0.5), (2, 30)])
def test_a_stretch_equals_that_of_the_whole(name: str, start: float, seconds: float):
    whole = decode_audio(KINDS[name], seconds=30)
    stretch = decode_audio(KINDS[name], start=start, seconds=seconds)
    # The stretch begins at the source's sample nearest to `start`; of the two that is compared with, at most 1/96,000 s away.
    first, until = start * SAMPLE_RATE, min(len(whole), round((start + seconds) * SAMPLE_RATE))
    assert abs(len(stretch) - (until - first)) <= (16 if name == "MATROSKA" else 1)
    where = torch.arange(20, len(stretch) - 20) + round(start * 48_000) / 3
    low = where.floor().long().clamp(max=len(whole) - 2)
    between = whole[low] * (1 - (where - low)) + whole[low + 1] * (where - low)
    # Matroska's clock counts milliseconds, in which this chirp turns by up to five radians.
    assert name == "MATROSKA" or close(stretch[20:-20], between, 0.03)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 96_000, 44_101, 15_999, 383_999])
def test_any_rate_becomes_sixteen_kilohertz(rate: int):
    frequencies = (220.0, 997.0, 3100.0)
    data = sound(tones(rate, 1, frequencies), rate, "WAV", "FLOAT")
    decoded = decode_audio(data, seconds=30)
    assert len(decoded) == SAMPLE_RATE
    assert close(decoded[300:-300], tones(SAMPLE_RATE, 1, frequencies)[300:-300], 0.01)


def test_frequencies_that_do_not_fit_are_filtered_out():
    data = sound(tones(48_000, 1, (12_000.0, 15_000.0)), 48_000, "WAV", "FLOAT")
    assert decode_audio(data, seconds=1)[300:-300].square().mean().sqrt() < 0.002


def test_channels_are_averaged():
    left, right = chirp(16_000, 1), tones(16_000, 1)
    for kind in ("WAV", "FLAC"):
        decoded = decode_audio(sound(np.stack([left, right], 1), 16_000, kind), seconds=1)
        assert close(decoded, (left + right) / 2, 1e-4)


def test_only_what_is_wanted_is_decoded(monkeypatch: pytest.MonkeyPatch):
    read = []
    original: Callable = audio.soundfile.SoundFile.read

    def counting(self: object, frames: int, **options: object) -> np.ndarray:
        read.append(frames)
        return original(self, frames, **options)

    monkeypatch.setattr(audio.soundfile.SoundFile, "read", counting)
    decode_audio(EXACT["FLAC"], start=1, seconds=0.25)
    assert sum(read) == 12_000


@pytest.mark.parametrize("container", ["mp4", "webm", "matroska"])
def test_the_sound_track_of_a_video_is_read_on_the_clock_of_its_frames(container: str):
    codec = "libvpx-vp9" if container == "webm" else "libx264"
    data = video(numbered(36, 64, 48), container, codec, fps=12, samples=WAVE)  # of which the sound is the shorter
    decoded = decode_audio(data, start=1, seconds=1)
    assert len(decoded) == SAMPLE_RATE
    errors = {
        shift: (decoded[100:-100] - torch.from_numpy(WAVE_16[16_100 + shift : 31_900 + shift])).square().mean().sqrt().item()
        for shift in range(-40, 41)
    }
    shift = min(errors, key=errors.__getitem__)
    assert errors[shift] < 0.05 and abs(shift) <= (0 if container == "mp4" else 16)  # of Matroska's milliseconds one
    assert 7_900 < len(decode_audio(data, start=2, seconds=1)) <= SAMPLE_RATE
    with pytest.raises(BadMedia):
        decode_audio(data, start=2.8, seconds=0.2)


@settings(deadline=None)
@given(st.integers(0, 10**7), st.integers(1_000, 384_000), st.sampled_from([0.5, 30.0, 600.0]))
def test_frames_are_counted_for_arrays_as_for_numbers(samples: int, rate: int, seconds: float):
    frames = frames_of(samples, rate, seconds)
    resampled = min(math.ceil(samples * 16_000 / rate), seconds * 16_000)
    assert frames == max(1, resampled // 160)
    assert frames_of(np.array([samples, 16_000]), np.array([rate, 16_000]), seconds).tolist() == [frames, min(100, 100 * seconds)]


def speech(rate: int, seconds: float) -> np.ndarray:
    """A voice's harmonics of a wandering pitch, in syllables, with hiss between them."""
    time = np.arange(round(rate * seconds)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time)) / rate
    voice = sum(np.sin(k * phase) / k * np.exp(-(((k * 120 - 700) / 900) ** 2)) for k in range(1, 30))
    syllables = np.clip(np.sin(2 * np.pi * 3 * time), 0, 1)
    return (0.3 * voice * syllables + 0.01 * np.random.default_rng(0).standard_normal(len(time))).astype(np.float32)


SIGNALS = {
    "tones": tones(16_000, 3.3),
    "chirp": chirp(16_000, 7),
    "noise": np.random.default_rng(0).standard_normal(50_000).astype(np.float32) * 0.2,
    "speech": speech(16_000, 12.345),
    "silence": np.zeros(16_000, dtype=np.float32),
    "click": np.eye(1, 16_000, 8_000, dtype=np.float32)[0],
    "over 30 seconds": chirp(16_000, 31),
}


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("name", SIGNALS)
def test_log_mel_equals_whispers(name: str, mel_bins: int):
    whisper = WhisperFeatureExtractor(feature_size=mel_bins)
    reference = torch.as_tensor(whisper(SIGNALS[name], sampling_rate=16_000, return_tensors="np").input_features[0].T)
    ours = log_mel(torch.from_numpy(SIGNALS[name]), 3000, mel_bins)
    assert ours.shape == (3000, mel_bins) and ours.is_contiguous()
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_log_mel_of_a_file_equals_whispers_of_the_signal(rate: int):
    data = sound(tones(rate, 2), rate, "WAV", "FLOAT")
    frames = frames_of(probe_audio(data).samples, rate, 30)
    ours = log_mel(decode_audio(data, seconds=30), frames, 80)
    whisper = WhisperFeatureExtractor(feature_size=80)
    reference = whisper(tones(16_000, 2), sampling_rate=16_000, return_tensors="np", padding="longest").input_features[0].T
    assert ours.shape == reference.shape == (200, 80)
    difference = np.abs(ours.numpy() - reference)[5:-5]  # of the interior: a file begins and ends, a tone does not
    # A resampler leaves traces 60 dB below the tones, where their spectrum is empty.
    assert difference[reference[5:-5] > reference.max() - 1].max() < (1e-4 if rate == 16_000 else 0.02)


def test_log_mel_has_the_frames_that_were_planned():
    waveform = torch.from_numpy(speech(16_000, 1))
    whole = log_mel(waveform, 100, 80)
    assert torch.equal(log_mel(torch.cat([waveform, torch.ones(99)]), 100, 80), whole)  # cut
    padded = log_mel(waveform[: -HOP // 2], 100, 80)  # with silence
    torch.testing.assert_close(padded[:98], whole[:98], atol=1e-5, rtol=0)
    assert [log_mel(waveform[:n], frames, 128).shape[0] for n, frames in ((1, 1), (160, 1), (320, 2), (0, 3))] == [1, 1, 2, 3]


def reason(data: bytes, **options: float) -> str:
    """Why both `probe_audio` and `decode_audio` refuse it."""
    with pytest.raises(BadMedia) as probed:
        probe_audio(data)
    with pytest.raises(BadMedia) as decoded:
        decode_audio(data, **{"seconds": 1.0} | options)
    assert probed.value.reason == decoded.value.reason
    return decoded.value.reason


def test_limits_hold_before_decoding():
    assert reason(sound(np.zeros((8, MAX_CHANNELS + 1), dtype=np.float32), 16_000, "WAV")) == "limit"
    assert reason(sound(np.zeros(8, dtype=np.float32), 999, "WAV")) == "limit"
    assert reason(sound(np.zeros(8, dtype=np.float32), 384_001, "WAV")) == "limit"
    flac = bytearray(sound(WAVE, 48_000, "FLAC"))
    flac[22:26] = b"\xff\xff\xff\xff"  # the lower 32 bits of the number of samples: a day
    assert reason(bytes(flac)) == "limit"
    mp4 = bytearray(LOSSY["MP4"].replace(b"edts", b"free"))
    clock = mp4.index(b"mdhd") + 16
    mp4[clock : clock + 4] = b"\0\0\0\1"  # a sample a second
    assert reason(bytes(mp4)) == "limit"


def test_a_wav_that_claims_hours_is_refused_and_a_streamed_one_is_read():
    wav = sound(WAVE_16, 16_000, "WAV", "PCM_16")
    at = wav.index(b"data") + 4
    assert reason(wav[:at] + struct.pack("<I", 2**31 - 1) + wav[at + 4 :]) == "decode"
    streamed = wav[:4] + b"\xff\xff\xff\xff" + wav[8:at] + b"\xff\xff\xff\xff" + wav[at + 4 :]
    assert torch.equal(decode_audio(streamed, seconds=30), decode_audio(wav, seconds=30))


def test_sound_that_is_not_there_is_no_silence():
    for name, data in KINDS.items():
        with pytest.raises(BadMedia, match="no sound at second 3: it ends at 2"):
            decode_audio(data, start=3, seconds=1)
        if name in EXACT or name == "MP4":  # the others do not say how long they should be
            with pytest.raises(BadMedia):
                decode_audio(data[: len(data) * 2 // 3], seconds=30)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_samples_that_are_no_sound_are_refused(value: float):
    wave = WAVE_16.copy()
    wave[1000] = value
    with pytest.raises(BadMedia, match="no numbers"):
        decode_audio(sound(wave, 16_000, "WAV", "FLOAT"), seconds=30)


@pytest.mark.parametrize("data", [b"", b"no sound", sound(WAVE_16, 16_000, "AIFF"), video(numbered(3, 64, 48))])
def test_what_is_no_sound_is_refused(data: bytes):
    assert reason(data) == "decode"


@pytest.mark.parametrize("name", KINDS)
def test_broken_bytes_end_in_bad_media_or_in_sound(name: str):
    for data in broken(KINDS[name], list(KINDS.values())):
        try:
            assert 0 < len(decode_audio(data, seconds=2)) <= 2 * SAMPLE_RATE
            assert probe_audio(data).samples > 0
        except BadMedia as fault:
            assert fault.reason in ("decode", "limit")
