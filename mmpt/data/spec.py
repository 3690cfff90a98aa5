"""A data spec: where the shards of a corpus lie and which of them belong to which split. Reading one runs no code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from mmpt.config import PlainLoader, explain
from mmpt.types import UserError

MAX_SPEC_BYTES = 1 << 20
MAX_SHARDS = 1_000_000
RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
SLICE = re.compile(r"([0-9]{0,9}):([0-9]{0,9})")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardsSpec(Section):
    root: str = Field(description="folder of the shards, relative to the spec's own folder")
    pattern: str = Field(description="file name below root, with one number range: name-{00000..00041}.tar")

    @field_validator("root", "pattern")
    @classmethod
    def _no_commands(cls, value: str) -> str:
        if ":" in value or "|" in value:
            raise ValueError("a plain path is wanted here; commands (pipe:) and addresses are never run or opened")
        return value

    @field_validator("pattern")
    @classmethod
    def _stays_below_root(cls, value: str) -> str:
        if Path(value).is_absolute() or ".." in RANGE.sub("", value).split("/"):
            raise ValueError("the pattern must stay below root: no absolute path and no '..'")
        if len(RANGE.findall(value)) > 1 or set(RANGE.sub("", value)) & set("{}*?["):
            raise ValueError("one number range is understood, as in name-{00000..00041}.tar, and no other wildcard")
        if (found := RANGE.search(value)) and not 0 <= int(found[2]) - int(found[1]) < MAX_SHARDS:
            raise ValueError(
                f"{found[0]} counts down, or names over {MAX_SHARDS:,} shards; write the first number, then the last"
            )
        return value

    def names(self) -> list[str]:
        """The pattern's file names, in its order."""
        found = RANGE.search(self.pattern)
        if not found:
            return [self.pattern]
        first, last = found.groups()
        head, tail = self.pattern[: found.start()], self.pattern[found.end() :]
        return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]


class DataSpec(Section):
    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    format: Literal["interleaved"]
    shards: ShardsSpec
    split: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], str] = Field(
        min_length=1, description="split -> range of shards, counted from 0 in the pattern's order: 'train: \"0:40\"'"
    )
    _path: Path = PrivateAttr(default=Path())

    @field_validator("split", mode="before")
    @classmethod
    def _slices(cls, value: Any, info: ValidationInfo) -> Any:
        # Before the types are checked: YAML reads an unquoted 3:5 as the number 185, in base 60.
        for name, text in value.items() if isinstance(value, dict) else ():
            found = SLICE.fullmatch(text) if isinstance(text, str) else None
            if not found:
                raise ValueError(f'{name}: {text!r} is not a range of shards; write "0:40", "40:" or ":", quoted')
            if "shards" in info.data:  # else they have a mistake of their own
                shards = len(info.data["shards"].names())
                start, stop = int(found[1] or 0), int(found[2] or shards)
                if not start < stop <= shards:
                    raise ValueError(
                        f"{name}: {text!r} does not fit shards.pattern, which names {shards} shards, 0 to {shards - 1}"
                    )
        return value

    def shard_paths(self, split: str) -> list[Path]:
        """The shards of a split, in order. Raises UserError for an unknown split or a missing file."""
        if split not in self.split:
            raise UserError(f"spec {self._path}: no split {split!r}; it has {', '.join(self.split)}")
        start, stop = self.split[split].split(":")
        names = self.shards.names()[int(start or 0) : int(stop) if stop else None]
        root = self._path.parent / self.shards.root
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise UserError(
                f"spec {self._path}: shards.root {self.shards.root!r} lacks {missing[0]}, {len(missing)} of {len(names)} shards "
                f"of split {split!r}; build them, or correct shards.root and shards.pattern"
            )
        return [root / name for name in names]


def load_spec(path: str | Path) -> DataSpec:
    """Read and check a spec. Raises UserError, one line for each mistake, naming field, value and mend."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"spec {path}: no such file; `mmpt data build emoji --out DIR` writes DIR/spec.yaml")
    if path.stat().st_size > MAX_SPEC_BYTES:
        raise UserError(f"spec {path}: {path.stat().st_size:,} bytes; a spec is a few lines of YAML")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that there is not
        raise UserError(f"spec {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"spec {path}: a mapping is wanted (version, name, format, shards, split)")
    try:
        spec = DataSpec.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(explain(DataSpec, error, f"spec {path}"))) from error
    spec._path = path
    return spec
