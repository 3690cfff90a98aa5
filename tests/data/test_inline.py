import base64
import io
import unicodedata
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpt.data.inline import Allowance, legible, mel_png, mp3, mp4, png
from mmpt.data.media.audio import SAMPLE_RATE, log_mel

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT)
def test_legible_text_holds_nothing_unseen_and_keeps_the_rest(text: str):
    shown = legible(text)
    shown.encode()  # half a surrogate pair would raise
    unseen = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert all(char in "\n\t\u200c\u200d" or unicodedata.category(char) not in unseen for char in shown)
    seen = [char for char in text if unicodedata.category(char) not in unseen or char in "\n\t\u200c\u200d"]
    rest = iter(shown)
    assert all(char in rest for char in seen)  # in their order


def test_legible_names_what_turns_text_about():
    assert legible("a\u202eb\x00") == "a⟨U+202E⟩b⟨U+0000⟩"
    assert legible("👩\u200d🚀 é") == "👩\u200d🚀 é"


def test_a_full_page_takes_nothing_more():
    room = Allowance(100)
    assert base64.b64decode(room.uri("image/png", b"x" * 30).removeprefix("data:image/png;base64,")) == b"x" * 30
    assert not room.is_full
    assert room.uri("image/png", b"x" * 60) == ""
    assert room.is_full and room.uri("image/png", b"") == ""


def test_text_counts_as_it_will_be_escaped():
    room = Allowance(100)
    assert room.text("<" * 30, most=20).startswith("<" * 20 + " … and 10 characters more")
    assert room.left < 100 - 4 * 20


def test_png_keeps_every_pixel():
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    again = np.asarray(PIL.Image.open(io.BytesIO(png(pixels))))
    np.testing.assert_array_equal(again, pixels.permute(1, 2, 0))


def tone(hertz: float, seconds: float) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)


def brightness(mel: torch.Tensor) -> np.ndarray:
    image = PIL.Image.open(io.BytesIO(mel_png(mel)))
    assert image.size == (mel.shape[0], mel.shape[1])
    return np.asarray(image.convert("L")).astype(float)


def test_the_log_mel_has_high_tones_on_top_and_time_to_the_right():
    low, high = (brightness(log_mel(tone(hertz, 0.5), 50, 80)).mean(axis=1).argmax() for hertz in (200, 6000))
    assert high < 20 < 60 < low
    ending = brightness(log_mel(torch.cat([tone(440, 0.5), torch.zeros(8000)]), 100, 80)).mean(axis=0)
    assert ending[:40].min() > ending[60:].max()


def test_silence_is_dark():
    assert brightness(log_mel(torch.zeros(1600), 10, 80)).max() < 80


@pytest.mark.parametrize("samples", [16_000, 12_345])
def test_mp3_has_the_length_and_the_tone(samples: int):
    wave, rate = soundfile.read(io.BytesIO(mp3(tone(1000, samples / SAMPLE_RATE))))
    assert (rate, len(wave)) == (SAMPLE_RATE, samples)
    assert abs(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave) - 1000) < 5


def test_mp4_shows_each_frame_at_its_time():
    frames = torch.stack([torch.full((3, 33, 47), shade, dtype=torch.uint8) for shade in (0, 80, 160, 240)])
    with av.open(io.BytesIO(mp4(frames, [0.5, 1.5, 1.5, 4.0], end=6.0))) as container:
        assert container.duration == 5_500_000  # microseconds
        shown = [*container.decode(video=0)]
    assert [frame.time for frame in shown] == [0.0, 1.0, 3.5]  # the second frame at 1.5 s cannot be seen
    assert [frame.duration * frame.time_base for frame in shown] == [1, Fraction(5, 2), 2]
    for frame, shade in zip(shown, (0, 80, 240), strict=True):
        pixels = frame.to_ndarray(format="rgb24")
        assert pixels.shape == (34, 48, 3)
        assert abs(pixels[:32, :46].astype(float).mean() - shade) < 4
