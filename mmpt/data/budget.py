"""How large the media of one source arrive at the encoders, and how many tokens they take: arithmetic on the index alone.

PART rows --Budget.media--> (tokens, rows) of every part, which plans are made of
a part    --Budget.frame, sound, clip--> the size to which it is decoded
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mmpt.config import ModelConfig
from mmpt.data.media.audio import frames_of
from mmpt.data.media.images import native_size
from mmpt.data.media.video import frame_count, frame_times
from mmpt.data.spec import DataSpec
from mmpt.types import AUDIO, IMAGE, VIDEO, Audio, Image, UserError, Video


@dataclass(frozen=True)
class Budget:
    model: ModelConfig
    spec: DataSpec

    @property
    def unit(self) -> int:
        """Side in pixels of the square that becomes one token."""
        return self.model.image.patch * self.model.image.merge

    def __post_init__(self) -> None:
        if self.spec.image.max_pixels < self.unit**2:
            raise UserError(
                f"spec {self.spec.path}: image.max_pixels = {self.spec.image.max_pixels} is less than one token of "
                f"{self.unit} x {self.unit} pixels; raise it"
            )

    def frame(self, part: Image | Video) -> tuple[int, int]:
        """Height and width in pixels to which a picture, or a frame, is brought."""
        side = self.model.frame_size if isinstance(part, Video) else self.model.image.size
        heights, widths = self._sizes(np.array([part.width]), np.array([part.height]), side)
        return int(heights[0]), int(widths[0])

    @property
    def fit(self) -> str:
        """Square frames are filled up with nothing; native ones have the picture's own shape, to within half a unit."""
        return "pad" if self.model.image.resize == "square" else "stretch"

    def sound(self, part: Audio) -> int:
        """Log-mel frames of a sound."""
        return int(self._frames(np.array([part.samples]), np.array([part.sample_rate]))[0])

    def clip(self, part: Video) -> list[float]:
        """Seconds into the file of the frames that are taken of a clip."""
        return frame_times(part.clip, self.spec.video.fps, self.spec.video.max_frames)

    def media(self, parts: np.ndarray) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " parts"]]:
        """Tokens of every PART, and rows (patches, log-mel frames) that the encoders read for it; 0 for texts.

        A picture below the source's `min_side` has none of either: it is left out of its document.
        """
        tokens = np.zeros(len(parts), dtype=np.int64)
        rows = np.zeros(len(parts), dtype=np.int64)
        image, merge = self.model.image, self.model.image.merge
        for kind, side in ((IMAGE, image.size), (VIDEO, self.model.frame_size)):
            chosen = parts["kind"] == kind
            width, height = parts["width"][chosen].astype(np.int64), parts["height"][chosen].astype(np.int64)
            heights, widths = self._sizes(width, height, side)
            patches = (heights // image.patch) * (widths // image.patch)
            if kind == IMAGE:
                patches = np.where(np.minimum(width, height) < self.spec.image.min_side, 0, patches)
            else:
                seconds = parts["stop"][chosen] - parts["start"][chosen]
                patches = patches * frame_count(seconds, self.spec.video.fps, self.spec.video.max_frames)
            rows[chosen], tokens[chosen] = patches, patches // merge**2
        chosen = parts["kind"] == AUDIO
        rows[chosen] = self._frames(parts["samples"][chosen], parts["rate"][chosen])
        tokens[chosen] = rows[chosen] // self.model.audio.frames_per_token
        return tokens, rows

    def _sizes(self, width: np.ndarray, height: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        if self.model.image.resize == "square":
            return np.full_like(height, side), np.full_like(width, side)
        return native_size(width, height, unit=self.unit, max_pixels=min(side**2, self.spec.image.max_pixels))

    def _frames(self, samples: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """Rounded up to whole tokens: what a sound lacks of its last one is silence."""
        frames, whole = frames_of(samples, rate, self.spec.audio.max_seconds), self.model.audio.frames_per_token
        return -(-frames // whole) * whole

    @property
    def signature(self) -> str:
        """Everything that the sizes depend on, beside the index."""
        image, audio = self.model.image, self.model.audio
        ours = (image.size, image.resize, image.patch, image.merge, audio.frames_per_token, self.model.frame_size)
        limits = (str(section.model_dump()) for section in (self.spec.image, self.spec.audio, self.spec.video))
        return " ".join(map(str, (*ours, *limits)))
