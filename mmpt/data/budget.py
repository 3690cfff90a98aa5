"""How large the media of one source arrive at the encoders, and how many tokens they take: arithmetic on the index alone.

PART rows --Budget.media--> (tokens, rows) of every part, which plans are made of
a part    --Budget.frame, sound, clip--> the size to which it is decoded

Without fusion (CLIP) media take no tokens, as they stay out of the shared transformer; their rows are the encoders' work as ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mmpt.config import AugmentConfig, ModelConfig
from mmpt.data.media.audio import frames_of
from mmpt.data.media.images import Fit, native_size, random_crop
from mmpt.data.media.video import frame_count, frame_times
from mmpt.data.spec import DataSpec
from mmpt.types import AUDIO, IMAGE, VIDEO, Audio, Image, UserError, Video


@dataclass(frozen=True)
class Budget:
    model: ModelConfig
    spec: DataSpec

    def __post_init__(self) -> None:
        if self.model.image and self.spec.image.max_pixels < self.unit**2:
            raise UserError(
                f"spec {self.spec.path}: image.max_pixels = {self.spec.image.max_pixels} is less than one token of "
                f"{self.unit} x {self.unit} pixels; raise it"
            )

    @property
    def unit(self) -> int:
        """Side in pixels of the square that becomes one token."""
        return self.model.image.patch * self.model.image.merge

    def reads(self, kind: int) -> bool:
        """Whether the model has an encoder for IMAGE, AUDIO or VIDEO. Sizes are asked of such media alone."""
        return {IMAGE: self.model.image, AUDIO: self.model.audio, VIDEO: self.model.video}[kind] is not None

    def frame(self, part: Image | Video) -> tuple[int, int]:
        """Height and width in pixels to which a picture, or a frame, is brought."""
        side = self.model.frame_size if isinstance(part, Video) else self.model.image.size
        heights, widths = self._sizes(np.array([part.width]), np.array([part.height]), side)
        return int(heights[0]), int(widths[0])

    def fit(self, seed: int, augmentation: AugmentConfig) -> Fit:
        """How pictures are brought there. Square frames are filled up with nothing, or with a part of the picture; native ones
        have the picture's own shape, to within half a unit."""
        if self.model.image.resize == "crop":
            return random_crop(seed, augmentation.crop)
        return "pad" if self.model.image.resize == "square" else "stretch"

    def sound(self, part: Audio) -> int:
        """Log-mel frames of a sound."""
        return int(self._frames(np.array([part.samples]), np.array([part.sample_rate]))[0])

    def clip(self, part: Video) -> list[float]:
        """Seconds into the file of the frames that are taken of a clip."""
        return frame_times(part.clip, self.spec.video.fps, self.spec.video.max_frames)

    def media(self, parts: np.ndarray) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " parts"]]:
        """Tokens of every PART, and rows (patches, log-mel frames) that the encoders read for it; 0 for texts.

        A medium without rows is left out of its document: a picture below the source's `min_side`, and what the model does
        not read.
        """
        tokens = np.zeros(len(parts), dtype=np.int64)
        rows = np.zeros(len(parts), dtype=np.int64)
        for kind, measure in ((IMAGE, self._pictures), (AUDIO, self._sounds), (VIDEO, self._clips)):
            if self.reads(kind):
                chosen = parts["kind"] == kind
                tokens[chosen], rows[chosen] = measure(parts[chosen])
        return tokens if self.model.fusion else np.zeros_like(tokens), rows

    def _pictures(self, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        patches = self._patches(parts, self.model.image.size)
        patches = np.where(np.minimum(parts["width"], parts["height"]) < self.spec.image.min_side, 0, patches)
        return patches // self.model.image.merge**2, patches

    def _clips(self, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frames are merged in time before they become tokens; the last of them may be fewer."""
        patches = self._patches(parts, self.model.frame_size)
        frames = frame_count(parts["stop"] - parts["start"], self.spec.video.fps, self.spec.video.max_frames)
        steps = -(-frames // self.model.video.merge_frames)
        return steps * (patches // self.model.image.merge**2), frames * patches

    def _sounds(self, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frames = self._frames(parts["samples"], parts["rate"])
        return frames // self.model.audio.frames_per_token, frames

    def _patches(self, parts: np.ndarray, side: int) -> np.ndarray:
        """Of a frame."""
        heights, widths = self._sizes(parts["width"].astype(np.int64), parts["height"].astype(np.int64), side)
        return (heights // self.model.image.patch) * (widths // self.model.image.patch)

    def _sizes(self, width: np.ndarray, height: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        if self.model.image.resize == "native":
            return native_size(width, height, unit=self.unit, max_pixels=min(side**2, self.spec.image.max_pixels))
        return np.full_like(height, side), np.full_like(width, side)

    def _frames(self, samples: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """Rounded up to whole tokens: what a sound lacks of its last one is silence."""
        frames, whole = frames_of(samples, rate, self.spec.audio.max_seconds), self.model.audio.frames_per_token
        return -(-frames // whole) * whole

    @property
    def signature(self) -> str:
        """Everything that the sizes depend on, beside the index."""
        image, audio, video = self.model.image, self.model.audio, self.model.video
        pictures = (image.size, image.resize, image.patch, image.merge) if image else ()
        clips = (self.model.frame_size, video.merge_frames) if video else ()
        ours = self.model.fusion, pictures, audio.frames_per_token if audio else (), clips
        limits = (str(section.model_dump()) for section in (self.spec.image, self.spec.audio, self.spec.video))
        return " ".join(map(str, (*ours, *limits)))
