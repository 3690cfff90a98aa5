"""The model of an earlier run, whose next tokens a run learns from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from mmpt.config import ModelConfig, RunConfig
from mmpt.data.tokens import Tokenizer
from mmpt.model.multimodal import MultimodalModel
from mmpt.parallel.apply import apply_layout
from mmpt.parallel.layout import Layout, faults_of
from mmpt.parallel.mesh import World
from mmpt.train.checkpoint import load_model, read_state, step_folder
from mmpt.types import UserError


def load_teacher(config: RunConfig, world: World, step: int | None) -> tuple[MultimodalModel | None, int | None]:
    """The teacher of a run, frozen and laid out as the run is, and the step of its checkpoint: the newest, or the one that a run
    which goes on names.

    None where the run has no teacher. Raises UserError for one that is not there, reads other batches, or has another layout.
    """
    distillation = config.objectives.distillation
    if distillation is None or not distillation.weight:
        return None, None
    run, where = Path(distillation.teacher), f"objectives.distillation.teacher = {distillation.teacher}"
    try:
        model, theirs, step = load_model(run, str(world.device), step)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    fingerprint = read_state(step_folder(run, step))[0].loader.fingerprint
    if fingerprint.get("tokenizer") != Tokenizer.of(config.data).fingerprint:
        raise UserError(f"{where}: it learned with another tokenizer; give this run the teacher's data.tokenizer")
    for name, ours, other in _what_a_batch_depends_on(config, theirs, world.layout):
        if ours != other:
            raise UserError(
                f"{where}: its {name} is {other!r}, and this run's is {ours!r}; both read the same batches, so give this run the "
                f"teacher's"
            )
    longest = min(config.data.pack_tokens, config.model.transformer.max_positions or math.inf)
    if (most := theirs.model.transformer.max_positions) and most < longest:
        raise UserError(
            f"{where}: it has {most} positions, and this run's documents up to {longest} tokens; lower data.pack_tokens"
        )
    for fault in faults_of(world.layout, config.model_copy(update={"model": theirs.model})):
        raise UserError(f"{where}: its {fault}; both are laid out alike, so give this run another section parallel")
    return apply_layout(model.requires_grad_(False), config.train, world), step


def _what_a_batch_depends_on(config: RunConfig, theirs: RunConfig, layout: Layout) -> Iterator[tuple[str, object, object]]:
    yield "data.special_tokens", config.data.special_tokens, theirs.data.special_tokens
    if layout.sequence > 1:  # batches are split for one mask
        yield "model.transformer.mask", config.model.transformer.mask, theirs.model.transformer.mask
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
