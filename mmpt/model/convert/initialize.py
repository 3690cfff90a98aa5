"""Published weights into a model: every `init` of its config.

init --open--> their config, their weights' headers --compare fields, then names and shapes--> copy, one tensor after another
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpt.config import InitConfig, ModelConfig
from mmpt.model.convert.architecture import Architecture, Part
from mmpt.model.convert.bert import BERT
from mmpt.model.convert.files import Weights, open_file, open_folder, read_json
from mmpt.model.convert.llama import LLAMA, MIXTRAL
from mmpt.model.convert.open_clip import OPEN_CLIP
from mmpt.model.convert.settings import SHORT, SHOWN, Theirs, differences
from mmpt.model.convert.whisper import WHISPER
from mmpt.types import UserError

HUGGING_FACE = {"llama": LLAMA, "mixtral": MIXTRAL, "bert": BERT, "whisper": WHISPER}
"""By `model_type`, as a config.json says it."""

TABLE_ATOL = 1e-3  # of what is computed here and stored there, perhaps in 16 bits
LOCAL = "local-dir:"  # open_clip's own prefix for a folder with open_clip_config.json


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published model: what it says of itself, and its weights under their own names."""

    name: str
    architecture: Architecture
    config: Theirs
    weights: Weights


@torch.no_grad()
def initialize_from(model: nn.Module, config: ModelConfig) -> list[str]:
    """Fill a drawn model with the weights that the `init`s of its config name: first the model's, then those of its parts.

    Returns a line for every part that was filled: what, and from where. Raises UserError, before anything is filled, where a
    file does not read, or an architecture, a name or a shape differs.
    """
    places = {"": config.init, "transformer": config.transformer.init}
    places |= {name: part.init for name, part in (("image", config.image), ("audio", config.audio)) if part}
    opened = {place: open_checkpoint(init) for place, init in places.items() if init}
    filled = [(checkpoint, part) for place, checkpoint in opened.items() for part in _parts(checkpoint, place, config)]
    for checkpoint, part in filled:
        _refuse_what_differs(model, config, checkpoint, part)
    lines = []
    for checkpoint, part in filled:
        count = _fill(model, config, checkpoint, part)
        lines.append(f"{part.into}: {count:,} weights of {checkpoint.name}, from {checkpoint.weights.origin}")
    return lines


def open_checkpoint(init: InitConfig) -> Checkpoint:
    """Its config, and the headers of its weights. Raises UserError."""
    return _open_hugging_face(Path(init.hf)) if init.hf else _open_open_clip(init.open_clip, init.pretrained)


def _open_hugging_face(folder: Path) -> Checkpoint:
    path = folder / "config.json"
    plain = read_json(path)
    kind = plain.get("model_type")
    if not isinstance(kind, str) or kind not in HUGGING_FACE:
        raise UserError(f"{path}: model_type = {SHORT.repr(kind)}: known here are {', '.join(HUGGING_FACE)}")
    architecture = HUGGING_FACE[kind]
    return Checkpoint(
        name=architecture.name, architecture=architecture, config=Theirs(str(path), plain), weights=open_folder(folder)
    )


def _open_open_clip(name: str, pretrained: str) -> Checkpoint:
    """`pretrained` is a file, or the name of weights that open_clip downloads."""
    plain = _open_clip_config(name)
    path = Path(pretrained)
    if not path.is_file():
        path, said = _download(name, pretrained)
        plain |= {"quick_gelu": said.get("quick_gelu", False), "preprocess_cfg": {key: said[key] for key in ("mean", "std")}}
    return Checkpoint(name=f"open_clip's {name}", architecture=OPEN_CLIP, config=Theirs(name, plain), weights=open_file(path))


def _open_clip_config(name: str) -> dict:
    if name.startswith(LOCAL):
        found = read_json(Path(name.removeprefix(LOCAL)) / "open_clip_config.json")
        model = found.get("model_cfg")
        if not isinstance(model, dict):
            raise UserError(f"{name}: model_cfg is missing in open_clip_config.json")
        return {**model, "preprocess_cfg": found.get("preprocess_cfg")}
    import open_clip  # takes seconds

    if name not in open_clip.list_models():
        raise UserError(
            f"init.open_clip = {name!r}: no architecture of open_clip {open_clip.__version__}; see open_clip.list_models()"
        )
    return open_clip.get_model_config(name)


def _download(name: str, tag: str) -> tuple[Path, dict]:
    """The file of weights that open_clip knows by name, and what it says of them."""
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    said = get_pretrained_cfg(name, tag)
    if not said:
        known = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"init.pretrained = {tag!r}: no such file, and no weights of open_clip's {name}, which has: {known}")
    try:
        return Path(download_pretrained(said)), said
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"init.pretrained = {tag!r}: open_clip could not download it ({' '.join(str(error).split())[:200]})"
        ) from error


def _parts(checkpoint: Checkpoint, place: str, config: ModelConfig) -> list[Part]:
    """Those that an `init` at a place of the config stands for: of the whole model, all that both have."""
    parts = checkpoint.architecture.parts
    chosen = [parts[place]] if place in parts else [] if place else [part for part in parts.values() if part.has(config)]
    if not chosen:
        where = f"model.{place}" if place else "the model"
        raise UserError(
            f"{where}: {checkpoint.name} has nothing for it; its weights go into {', '.join(p.into for p in parts.values())}"
        )
    return chosen


def _refuse_what_differs(model: nn.Module, config: ModelConfig, checkpoint: Checkpoint, part: Part) -> None:
    names = _names(checkpoint)
    _refuse_other_settings(config, checkpoint, part)
    _refuse_other_shapes(dict(model.named_parameters()), config, checkpoint, part, names)
    _refuse_other_tables(config, checkpoint, part, names)


def _fill(model: nn.Module, config: ModelConfig, checkpoint: Checkpoint, part: Part) -> int:
    """Copy the weights of one part, rule by rule. Returns how many numbers they are."""
    parameters, names, read, count = dict(model.named_parameters()), _names(checkpoint), checkpoint.weights.read, 0
    for rule in part.rules(config):
        for name, tensor in rule.to_ours(lambda theirs: read(names[theirs])).items():
            parameters[name].copy_(tensor)
            count += tensor.numel()
    return count


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    """Names as rules have them -> as the file has them."""
    names: dict[str, str] = {}
    for name in checkpoint.weights.headers:
        if checkpoint.architecture.ignored.search(name):
            continue
        plain = checkpoint.architecture.rename(name)
        if plain in names:
            raise UserError(
                f"{checkpoint.weights.origin}: {SHORT.repr(names[plain])} and {SHORT.repr(name)} are two names of one tensor"
            )
        names[plain] = name
    return names


def _refuse_other_settings(config: ModelConfig, checkpoint: Checkpoint, part: Part) -> None:
    settings = dict(checkpoint.architecture.settings(checkpoint.config))
    # Neither changes what becomes of a text, and weights for texts are meant to learn the other modalities.
    settings.pop("transformer.rope_sections", None)
    if config.transformer.mask == "media" and "transformer.mask" in settings and settings["transformer.mask"].value == "causal":
        del settings["transformer.mask"]
    _refuse(differences(config, settings, part.fields), f"{part.into}: {checkpoint.name} is another architecture")


def _refuse_other_shapes(
    parameters: Mapping[str, nn.Parameter], config: ModelConfig, checkpoint: Checkpoint, part: Part, names: Mapping[str, str]
) -> None:
    """Names and shapes by the headers alone: what is missing, what differs, and what nothing here is made of."""
    headers = {name: checkpoint.weights.headers[there] for name, there in names.items()}
    lines = []
    for rule in part.rules(config):
        for name, here in rule.to_theirs(lambda ours: torch.empty_like(parameters[ours], device="meta")).items():
            there = headers.get(name)
            if there is None:
                lines.append(f"{name} {_shape(here)} is missing there")
            elif there.shape != here.shape:
                lines.append(f"{name} is {_shape(there)} there, and {_shape(here)} here")
            elif not there.is_floating_point():
                lines.append(f"{name} does not hold numbers of 16 or 32 bits there")
    known = _known(checkpoint.architecture, config)
    for name, there in headers.items():
        if part.scope.match(name) and name not in known:
            lines.append(f"{SHORT.repr(name)} {_shape(there)} has no place here")
    _refuse(lines, f"{part.into}: the weights in {checkpoint.weights.origin} do not fit")


def _known(architecture: Architecture, config: ModelConfig) -> set[str | None]:
    """All names of theirs that a checkpoint of a model like ours may have."""
    by_rules = {name for rule in architecture.rules(config) for name in rule.theirs}
    return by_rules | architecture.repeated.keys() | architecture.computed.keys()


def _refuse_other_tables(config: ModelConfig, checkpoint: Checkpoint, part: Part, names: Mapping[str, str]) -> None:
    """Tensors that ours has no parameter for, as they repeat another or follow from a formula, must do so."""
    architecture, headers, read = checkpoint.architecture, checkpoint.weights.headers, checkpoint.weights.read
    by_rules = {name for rule in part.rules(config) for name in rule.theirs}
    lines = []
    for name, original in architecture.repeated.items():
        if name in names and original in by_rules and name not in by_rules:
            one, other = names[name], names[original]
            if headers[one].shape != headers[other].shape or not torch.equal(read(one), read(other)):
                lines.append(f"{name} and {original} differ there, and are one tensor here")
    for name, compute in architecture.computed.items():
        shape = headers[names[name]].shape if name in names else ()
        if len(shape) == 2 and not torch.allclose(read(names[name]).float(), compute(*shape), atol=TABLE_ATOL):
            lines.append(f"{name} is another table there than the one computed here")
    _refuse(lines, f"{part.into}: the weights in {checkpoint.weights.origin} do not fit")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _refuse(lines: Iterable[str], what: str) -> None:
    lines = list(lines)
    if lines:
        more = f"; and {len(lines) - SHOWN:,} more" if len(lines) > SHOWN else ""
        raise UserError(f"{what}: {'; '.join(lines[:SHOWN])}{more}")
