"""The model of an earlier run, whose next tokens a run learns from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mmpt.config import ModelConfig, RunConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.train.checkpoint import load_model
from mmpt.types import UserError


def load_teacher(config: RunConfig, device: torch.device) -> MultimodalModel | None:
    """The teacher of a run, frozen; None where the run has none. Raises UserError for one that reads other batches."""
    distillation = config.objectives.distillation
    if distillation is None or not distillation.weight:
        return None
    model, theirs, _ = load_model(Path(distillation.teacher), str(device))
    for name, ours, other in _what_a_batch_depends_on(config, theirs):
        if ours != other:
            raise UserError(
                f"objectives.distillation.teacher = {distillation.teacher}: its {name} is {other!r}, and this run's is {ours!r}; "
                f"both read the same batches, so give this run the teacher's"
            )
    return model.requires_grad_(False)


def _what_a_batch_depends_on(config: RunConfig, theirs: RunConfig) -> Iterator[tuple[str, object, object]]:
    yield "data.tokenizer", Path(config.data.tokenizer).name, Path(theirs.data.tokenizer).name
    yield from ((f"model.{name}", a, b) for (name, a), (_, b) in zip(_sizes(config.model), _sizes(theirs.model), strict=True))


def _sizes(model: ModelConfig) -> list[tuple[str, object]]:
    """Settings of the model that decide how long documents are and where their media stand."""
    image, audio, video = model.image, model.audio, model.video
    return [
        ("vocabulary", model.vocabulary),
        ("fusion", model.fusion),
        ("image.patch", image and image.patch),
        ("image.merge", image and image.merge),
        ("audio.mel_bins", audio and audio.mel_bins),
        ("audio.frames_per_token", audio and audio.frames_per_token),
        ("video.merge_frames", video and video.merge_frames),
        ("transformer.rope_sections", model.transformer.rope_sections),
    ]
