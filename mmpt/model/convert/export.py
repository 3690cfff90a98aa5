"""A model in the form in which a library opens it.

ModelConfig --describe--> their config --settings--> is every field what it was? --rules--> their names --> a folder

Whether a model is a Llama, a Mixtral, a BERT or a CLIP is decided by its fields alone: the config that is written must say
of every one of them what it is here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpt.config import ModelConfig
from mmpt.model.convert.architecture import Architecture
from mmpt.model.convert.bert import BERT
from mmpt.model.convert.llama import LLAMA, MIXTRAL
from mmpt.model.convert.open_clip import OPEN_CLIP
from mmpt.model.convert.rules import to_theirs
from mmpt.model.convert.settings import Theirs, differences
from mmpt.types import UserError

Target = Literal["hf", "open_clip", "safetensors"]


def write_checkpoint(
    model: nn.Module, config: ModelConfig, target: Target, folder: Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write a model's config and weights into an existing folder.

    hf: config.json and model.safetensors; open_clip: open_clip_config.json and open_clip_model.safetensors; safetensors:
    model.yaml and model.safetensors, under our own names. `facts` go into the config: what the library wants to know and a
    ModelConfig does not say (open_clip's go into its `text_cfg`). Raises UserError, before anything is written, for a model
    that the library does not have.
    """
    if target == "safetensors":
        plain = _without_init(config.model_dump(mode="json"))
        (folder / "model.yaml").write_text(yaml.safe_dump(plain, sort_keys=False, width=120))
        _save(model.state_dict(), folder / "model.safetensors")
        return
    architecture = _architecture(config, target)
    described = describe_exactly(architecture, config)
    ours = dict(model.named_parameters())
    rules = architecture.rules(config)
    assert {name for rule in rules for name in rule.ours} == ours.keys(), "a model of exactly that architecture"
    if target == "hf":
        plain = {**described, **(facts or {}), "torch_dtype": str(next(iter(ours.values())).dtype).removeprefix("torch.")}
        names = "config.json", "model.safetensors"
    else:
        preprocess = described.pop("preprocess_cfg")
        described["text_cfg"] |= facts or {}
        plain = {"model_cfg": described, "preprocess_cfg": preprocess}
        names = "open_clip_config.json", "open_clip_model.safetensors"
    (folder / names[0]).write_text(json.dumps(plain, indent=2) + "\n")
    _save(to_theirs(rules, ours), folder / names[1])


def _architecture(config: ModelConfig, target: Target) -> Architecture:
    """The only one that it can be."""
    if target == "open_clip":
        return OPEN_CLIP
    return BERT if config.head == "bert" else MIXTRAL if config.transformer.experts else LLAMA


def describe_exactly(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """Their config of a model that is exactly theirs. Raises UserError, with the first field that differs, for any other."""
    described = architecture.describe(config)
    lines = differences(config, architecture.settings(Theirs("the export", described)))
    if lines:
        raise UserError(f"this model is no {architecture.name}: {lines[0]}; --to safetensors writes any model")
    return described


def _without_init(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose weights are those that it lies beside."""
    inner = {key: _without_init(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    return {key: value for key, value in inner.items() if key != "init"}


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})
    path.chmod((path.parent / ".").stat().st_mode & 0o666)  # the library leaves it to its owner alone
