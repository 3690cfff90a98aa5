"""Two descriptions of one architecture, field by field: what no shape shows, heads or activations for instance, must agree too.

config.json --an architecture's `settings`--> {our field: (value, their name for it)} --compared with--> ModelConfig
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from mmpt.config import ModelConfig
from mmpt.types import UserError

SHOWN = 5  # differences told at once
SHORT = reprlib.Repr()
SHORT.maxstring = 120  # names of tensors are long

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "silu": "swiglu"}
"""Ours, by Hugging Face's names: its `gelu` is the exact one; the others that it knows are none of ours."""


@dataclass(frozen=True)
class Setting:
    value: Any
    key: str  # what they call it


Settings = Mapping[str, Setting]
"""By the path of our field: `transformer.n_heads`."""


class Theirs:
    """A config of theirs, which a stranger may have written: every look takes the library's default and checks the type."""

    def __init__(self, origin: str, plain: Mapping[str, Any], prefix: str = "") -> None:
        self.origin, self.plain, self.prefix = origin, plain, prefix

    def __call__(self, key: str, default: Any) -> Any:
        """The value, as it stands there; the default where it is missing."""
        return self.plain.get(key, default)

    def number(self, key: str, default: float) -> int | float:
        found = self(key, default)
        if not _is_number(found):
            raise self.refusal(key, "a number")
        return found

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[int | float, ...]:
        found = self(key, default)
        if not isinstance(found, list | tuple) or not all(map(_is_number, found)):
            raise self.refusal(key, "a list of numbers")
        return tuple(found)

    def count(self, key: str, default: int) -> int:
        found = self.number(key, default)
        if not isinstance(found, int) or not 0 < found < 2**31:
            raise self.refusal(key, "a whole number from 1 on")
        return found

    def section(self, key: str) -> Theirs:
        found = self(key, None)
        if found is not None and not isinstance(found, dict):
            raise self.refusal(key, "an object")
        return Theirs(self.origin, found or {}, prefix=f"{self.prefix}{key}.")

    def refusal(self, key: str, wanted: str) -> UserError:
        """For a value with which no model of ours agrees."""
        return UserError(f"{self.origin}: {self.prefix}{key} is {_shown(self(key, None))}, and here it is to be {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_of(config: ModelConfig, path: str) -> Any:
    """Of a field of ours, plain; None where a section above it is missing. Defaults that stand for others are resolved."""
    found: Any = config
    for name in path.split("."):
        found = found if found is None else getattr(found, "kv_heads" if name == "n_kv_heads" else name)
    return found.model_dump(exclude_none=True) if isinstance(found, BaseModel) else found


def differences(config: ModelConfig, settings: Settings, among: Iterable[str] | None = None) -> list[str]:
    """A line for every field (of those that begin with one of `among`) that has another value there."""
    lines = []
    for path, setting in settings.items():
        mine = value_of(config, path)
        chosen = among is None or path.startswith(tuple(among))
        if chosen and mine != setting.value:
            lines.append(f"{path} is {_shown(mine)} here, and {_shown(setting.value)} there ({setting.key})")
    return lines


def _shown(value: Any) -> str:
    return "none" if value is None else SHORT.repr(list(value) if isinstance(value, tuple) else value)
