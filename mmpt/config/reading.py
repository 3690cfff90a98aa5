"""YAML of a person's, or a stranger's, to a RunConfig.

    configs/NAME.yaml + key.sub=value overrides --OmegaConf--> plain dict --pydantic--> RunConfig

`load` raises UserError for every mistake, naming the field, the value and the mend.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mmpt.config.model import ModelConfig
from mmpt.config.run import RunConfig
from mmpt.types import UserError

MAX_BYTES = 1 << 17  # of a config file; the shipped ones have some two thousand
MAX_LINES = 20  # of mistakes told at once
MAX_DIGITS = 40  # of a whole number
KEY = re.compile(r"\w+(\.\w+)*")  # of an override
Config = TypeVar("Config", RunConfig, ModelConfig)


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config, apply `key.sub=value` overrides, check everything.

    `model` may be the name of a file, relative to the config's folder, with the model's part of the tree: one of
    configs/models/. Raises UserError, one line per mistake: the field, its value, and what to write instead.
    """
    where = f"config {path}"
    tree = _merged(Path(path), overrides, where)
    if isinstance(tree, dict) and "transformer" in tree and "model" not in tree:
        raise UserError(f"{where}: this is a model's config; a run's names it: `model: models/NAME.yaml`, beside data and train")
    return parse(tree, where)


def load_model(path: str | Path, overrides: list[str] | None = None) -> ModelConfig:
    """Read a model's config by itself, such as those in configs/models/. Raises UserError as `load` does."""
    where = f"model {path}"
    return _checked(ModelConfig, _merged(Path(path), overrides, where), where)


def load_either(path: str | Path, overrides: list[str] | None = None) -> RunConfig | ModelConfig:
    """A run's config, or a model's by itself: the one that has a `transformer` of its own. Raises UserError as `load` does."""
    return load_model(path, overrides) if "transformer" in _read(Path(path), f"config {path}") else load(path, overrides)


def _merged(path: Path, overrides: list[str] | None, where: str) -> Any:
    try:
        tree = _with_model(OmegaConf.create(_read(path, where)), path.parent, where)
        for override in overrides or []:
            tree = _with_model(OmegaConf.merge(tree, _parse_override(override, tree)), path.parent, where)
        return OmegaConf.to_container(tree)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{where}: {_one_line(error)}") from error


def _with_model(tree: DictConfig, folder: Path, where: str) -> DictConfig:
    """The tree, with the sections of the model's file in the place of its name."""
    if isinstance(tree.get("model"), str):
        tree["model"] = _read(_inside(folder, tree["model"], where), where)
    return tree


def _inside(folder: Path, name: str, where: str) -> Path:
    """A file below the config's own folder: a stranger's config reads no other."""
    if not name.isprintable() or Path(name).is_absolute() or ".." in Path(name).parts or not name.endswith(".yaml"):
        raise UserError(f"{where}: model = {reprlib.repr(name)}: write the sections out, or a .yaml file below {folder}/")
    return folder / name


def _parse_override(override: str, tree: DictConfig) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not KEY.fullmatch(key):
        raise UserError(f"override {reprlib.repr(override)}: write key.sub=value, for example train.steps=100")
    _refuse_interpolation(override, f"override {key}")
    _refuse_value_as_section(tree, key)
    try:
        change = OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        shown = reprlib.repr(override)
        raise UserError(f"override {shown}: write {key}=VALUE, with quotes around a text that has signs") from error
    if OmegaConf.missing_keys(change):
        raise UserError(f"override {reprlib.repr(override)}: ??? stands for no value; write the value")
    return change


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, a few of which can stand for gigabytes, and without keys given twice, of which one would be lost."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"alias *{event.anchor} in line {event.start_mark.line + 1}: write the value out")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """No number here is so long; one of thousands of digits cannot even be shown."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(
                f"a number of {len(node.value)} characters in line {node.start_mark.line + 1}: write a shorter one"
            )
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value.__hash__ and key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} in line {key.start_mark.line + 1} stands there twice: remove one")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)


def _read(path: Path, where: str) -> dict:
    """The mapping in a YAML file that a stranger may have written: nothing in it is run, expanded or looked up."""
    if not path.is_file():
        raise UserError(f"{where}: no such file; the shipped ones are in configs/")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{where}: {path.stat().st_size:,} bytes; a config is a few lines of YAML")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), PlainLoader) or {}
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{where}: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a list or a bare value, not a mapping of sections")
    _refuse_interpolation(tree, where)
    return tree


def _refuse_interpolation(tree: Any, where: str) -> None:
    """OmegaConf would expand `${oc.env:...}` from the environment into a run's files, and nested ones without end."""
    if isinstance(tree, str) and "${" in tree:
        raise UserError(f"{where}: {reprlib.repr(tree)}: ${{...}} is not expanded here; write the value out")
    if isinstance(tree, dict):
        tree = [*tree.keys(), *tree.values()]
    for value in tree if isinstance(tree, list) else ():
        _refuse_interpolation(value, where)


def _refuse_value_as_section(tree: DictConfig, key: str) -> None:
    """`train.steps.x=1` would replace the number `train.steps` by a section."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        above = ".".join(parts[:depth])
        parent = OmegaConf.select(tree, above)
        if parent is not None and not OmegaConf.is_dict(parent):
            shown = reprlib.repr(OmegaConf.to_container(parent) if OmegaConf.is_config(parent) else parent)
            raise UserError(f"override {key}=...: {above} is the value {shown}, not a section; write {above}=...")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")


def parse(plain: Any, where: str) -> RunConfig:
    """Check a plain tree. Raises UserError as `load` does."""
    return _checked(RunConfig, plain, where)


def _checked(model: type[Config], plain: Any, where: str) -> Config:
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise UserError("\n".join(explain(model, error, where))) from error


def dump(config: RunConfig | ModelConfig) -> str:
    """The resolved config as YAML, defaults written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def explain(model: type[BaseModel], error: ValidationError, where: str) -> list[str]:
    """One line per mistake: where, field, value, reason, and for an unknown key the nearest known one."""
    faults = error.errors()
    lines = [f"{where}: {_explain_one(model, fault)}" for fault in faults[:MAX_LINES]]
    return lines if len(faults) <= MAX_LINES else [*lines, f"{where}: and {len(faults) - MAX_LINES} mistakes more"]


def _explain_one(model: type[BaseModel], fault: Any) -> str:
    *above, last = fault["loc"] or ("",)
    field = ".".join(_legible(part) for part in fault["loc"])
    section = _section(model, above)
    if fault["type"] == "extra_forbidden":
        known = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(last)[:100], known, n=1)
        return f"unknown key {field}; " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")
    described = section.model_fields[last].description if section and last in section.model_fields else None
    meaning = f" ({described})" if described else ""
    if fault["type"] == "missing":
        return f"{field} is missing; it must be given{meaning}"
    value = fault["input"]
    if fault["type"] in ("model_type", "model_attributes_type"):
        inner = _section(model, fault["loc"])
        return f"{field} = {reprlib.repr(value)}: a section is wanted, with {', '.join(inner.model_fields) if inner else 'keys'}"
    reason = fault["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    reason = reason[0].lower() + reason[1:] + ("; put it in quotes" if fault["type"] == "string_type" else "")
    if not field:
        return reason
    shown = "" if isinstance(value, dict | BaseModel) else " = (nothing)" if value is None else f" = {reprlib.repr(value)}"
    return f"{field}{shown}: {reason}{meaning}"


def _legible(part: int | str) -> str:
    """A key as it is, unless it would spoil the line."""
    text = str(part)
    return text if text.isprintable() and 0 < len(text) <= 100 else reprlib.repr(text)


def _section(model: type[BaseModel], path: Iterable[int | str]) -> type[BaseModel] | None:
    """The section at a path, if one is there."""
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        choices = get_args(annotation) or (annotation,)  # a section may be left out: Section | None
        inner = next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)
        if inner is None:
            return None
        model = inner
    return model
