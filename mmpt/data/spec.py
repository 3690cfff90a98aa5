"""A data spec: where the shards of one source lie, in which format, and which of them belong to which split.
A mixture: several specs and how much of each. Reading either runs no code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator

from mmpt.config import PlainLoader, Section, explain
from mmpt.types import UserError

MAX_SPEC_BYTES = 1 << 20
MAX_SHARDS = 1_000_000
RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
SLICE = re.compile(r"([0-9]{0,9}):([0-9]{0,9})")
REMOTE = re.compile(r"(s3|gs|az|https?)://(?!.*::)[^|\s]+")
"""Addresses that fsspec may open: object stores and web servers; `::` would chain file systems."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Order = tuple[Literal["image", "text"], Literal["image", "text"]]

IN_PLACE = ("interleaved", "pairs")
"""Formats that are read as they lie; `mmpt data build SPEC` writes the others as interleaved shards."""

MAP = {
    "interleaved": {},
    "pairs": {"image": "jpg;jpeg;png;webp", "text": "txt", "meta": "json"},
    "text": {"text": "text"},
    "mmc4": {},
    "obelics": {},
    "llava": {},
    "csv": {"image": "filepath", "text": "title"},
}
"""What a format calls its fields, where a spec does not say otherwise: suffixes of members for pairs, else columns."""


def _below_root(value: str) -> str:
    if Path(value).is_absolute() or ".." in RANGE.sub("", value).split("/"):
        raise ValueError("it must stay below root: no absolute path and no '..'")
    return value


def _no_command(value: str) -> str:
    if not value.isprintable():
        raise ValueError("a path that can be printed is wanted here")
    if ":" in value or "|" in value:
        raise ValueError("a plain path is wanted here; commands (pipe:) are never run")
    return value


class ShardsSpec(Section):
    root: str = Field(description="folder of the shards, relative to the spec's own folder, or s3://, gs://, az://, https://")
    pattern: str = Field(description="file name below root, with one number range: name-{00000..00041}.tar")
    media: str = Field("", description="folder below root of the files that mmc4, obelics, llava and csv name")
    block: Annotated[int, Field(ge=0, le=MAX_SHARDS)] | None = Field(
        None, description="shards that are shuffled together; 0: all of them; by default all, 16 where root is remote"
    )

    @field_validator("root")
    @classmethod
    def _path_or_address(cls, value: str) -> str:
        return value if REMOTE.fullmatch(value) else _no_command(value)

    @field_validator("pattern", "media")
    @classmethod
    def _stays_below_root(cls, value: str) -> str:
        return _below_root(_no_command(value))

    @field_validator("pattern")
    @classmethod
    def _one_range(cls, value: str) -> str:
        if len(RANGE.findall(value)) > 1 or set(RANGE.sub("", value)) & set("{}*?["):
            raise ValueError("one number range is understood, as in name-{00000..00041}.tar, and no other wildcard")
        if (found := RANGE.search(value)) and not 0 <= int(found[2]) - int(found[1]) < MAX_SHARDS:
            raise ValueError(
                f"{found[0]} counts down, or names over {MAX_SHARDS:,} shards; write the first number, then the last"
            )
        return value

    @property
    def is_remote(self) -> bool:
        return REMOTE.fullmatch(self.root) is not None

    @property
    def shuffled_together(self) -> int:
        """Shards whose documents are shuffled among one another; 0 for all."""
        return self.block if self.block is not None else 16 if self.is_remote else 0

    @property
    def count(self) -> int:
        """How many file names the pattern stands for."""
        found = RANGE.search(self.pattern)
        return int(found[2]) - int(found[1]) + 1 if found else 1

    def names(self) -> list[str]:
        """The pattern's file names, in its order."""
        found = RANGE.search(self.pattern)
        if not found:
            return [self.pattern]
        first, last = found.groups()
        head, tail = self.pattern[: found.start()], self.pattern[found.end() :]
        return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]


class Template(Section):
    """An order of the two parts of a pair, and how often it is drawn."""

    order: Order
    p: Annotated[float, Field(gt=0)] = 1.0

    @field_validator("order")
    @classmethod
    def _one_of_each(cls, value: Order) -> Order:
        if set(value) != {"image", "text"}:
            raise ValueError("one image and one text are wanted: [image, text] or [text, image]")
        return value


class ImageLimits(Section):
    max_pixels: Annotated[int, Field(gt=0, lt=2**31)] = Field(602_112, description="a larger picture is scaled down to so many")
    min_side: Annotated[int, Field(ge=1, lt=2**31)] = Field(
        1, description="a picture with a shorter side is left out of its document"
    )


class AudioLimits(Section):
    sample_rate: Literal[16000] = Field(16000, description="to which sounds are brought: the rate of the log-mel")
    max_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(30.0, description="a longer sound is cut here")


class VideoLimits(Section):
    fps: Annotated[float, Field(gt=0, le=60)] = Field(1.0, description="frames taken for each second")
    max_frames: Annotated[int, Field(ge=1, le=1024)] = Field(64, description="a longer clip has so many, spread over it")


class OnBad(Section):
    """What happens where a part cannot be read or decoded while training."""

    policy: Literal["mask", "stop"] = Field("mask", description="mask: it becomes padding without loss; stop: the run ends")
    max_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="of the source's documents that a rank has read; above, the run ends"
    )


class DataSpec(Section):
    version: Literal[1]
    name: Name
    format: Literal["interleaved", "pairs", "text", "mmc4", "obelics", "llava", "csv"]
    shards: ShardsSpec
    map: dict[str, str] = Field({}, description="what the source calls its fields; several names with ';' between them")
    templates: tuple[Template, ...] = Field((), description="orders of image and text, for pairs and csv")
    placement: Literal["before", "after"] = Field("before", description="mmc4: where a picture stands, from its matched text")
    split: dict[Name, str] = Field(
        min_length=1, description="split -> range of shards, counted from 0 in the pattern's order: 'train: \"0:40\"'"
    )
    image: ImageLimits = ImageLimits()
    audio: AudioLimits = AudioLimits()
    video: VideoLimits = VideoLimits()
    on_bad: OnBad = OnBad()
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
                shards = info.data["shards"].count
                start, stop = int(found[1] or 0), int(found[2] or shards)
                if not start < stop <= shards:
                    raise ValueError(
                        f"{name}: {text!r} does not fit shards.pattern, which names {shards} shards, 0 to {shards - 1}"
                    )
        return value

    @model_validator(mode="after")
    def _fields_of_the_format(self) -> Self:
        if unknown := sorted(set(self.map) - set(MAP[self.format])):
            known = ", ".join(MAP[self.format]) or "none"
            raise ValueError(f"map.{unknown[0]} is no field of format {self.format}; it has {known}")
        if self.templates and self.format not in ("pairs", "csv"):
            raise ValueError(f"templates belong to formats pairs and csv, not to {self.format}")
        return self

    @property
    def path(self) -> Path:
        """Of the file that the spec was read from."""
        return self._path

    @property
    def root(self) -> str:
        """Folder or address of the shards; a folder is relative to the working directory."""
        return self.shards.root.rstrip("/") if self.shards.is_remote else str(self._path.parent / self.shards.root)

    def field(self, name: str) -> tuple[str, ...]:
        """What the source calls a field of its format, best first."""
        return tuple(self.map.get(name, MAP[self.format][name]).split(";"))

    def shard_names(self, split: str) -> list[str]:
        """The shards of a split, in order, below `root`. Raises UserError for an unknown split."""
        if split not in self.split:
            raise UserError(f"spec {self._path}: no split {split!r}; it has {', '.join(self.split)}")
        start, stop = self.split[split].split(":")
        return self.shards.names()[int(start or 0) : int(stop) if stop else None]


class MixturePart(Section):
    """A source of a mixture."""

    spec: str = Field(description="path of its data spec, relative to the mixture's own folder")
    task: Literal["next_token", "masked", "span"] = Field(
        "next_token",
        description="what is asked of its texts: masked: BERT's hidden words; span: T5's hidden spans. One spec may stand twice",
    )
    weight: Annotated[float, Field(ge=0)] = Field(description="its share of tokens or samples, beside the other weights")
    max_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="how often its documents may be seen")
    on_exhausted: Literal["renormalise", "stop", "fail"] = Field(
        "renormalise", description="after max_epochs: go on with the others, end the run, or end it with an error"
    )

    @field_validator("spec")
    @classmethod
    def _plain(cls, value: str) -> str:
        return _no_command(value)

    def source_name(self, spec: str) -> str:
        """What a source is called whose spec has that name: NAME, or NAME:TASK where more than next tokens is asked."""
        return spec if self.task == "next_token" else f"{spec}:{self.task}"


class MixtureSpec(Section):
    version: Literal[1]
    name: Name
    unit: Literal["tokens", "samples"] = Field("tokens", description="what the weights are shares of")
    mixture: tuple[MixturePart, ...] = Field(min_length=1)
    _path: Path = PrivateAttr(default=Path())

    def specs(self) -> list[DataSpec]:
        """The spec of every part. Raises UserError for one that does not load, or sources that cannot be told apart."""
        specs = [load_spec(self._path.parent / part.spec) for part in self.mixture]
        known: dict[str, Path] = {}
        for spec in specs:
            if known.setdefault(spec.name, spec.path.resolve()) != spec.path.resolve():
                raise UserError(
                    f"mixture {self._path}: two of its specs have the name {spec.name!r}; give each a name of its own"
                )
        names = [part.source_name(spec.name) for part, spec in zip(self.mixture, specs, strict=True)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"mixture {self._path}: source {twice[0]!r} stands there twice; take one out, or give it another task"
            )
        return specs

    def corpora(self) -> list[DataSpec]:
        """The specs, each once, also where several tasks are set on one. Raises UserError as `specs` does."""
        return list({spec.name: spec for spec in self.specs()}.values())


Spec = TypeVar("Spec", DataSpec, MixtureSpec)


def load_spec(path: str | Path) -> DataSpec:
    """Read and check a spec. Raises UserError, one line for each mistake, naming field, value and mend."""
    path = Path(path)
    tree = _read(path)
    if "mixture" in tree:
        raise UserError(f"spec {path}: this is a mixture; one of its specs is wanted here")
    return _checked(DataSpec, tree, path)


def load_mixture(path: str | Path) -> MixtureSpec:
    """Read a mixture; a spec alone is a mixture of one. Raises UserError as `load_spec` does."""
    path = Path(path)
    tree = _read(path)
    if "mixture" not in tree:
        spec = _checked(DataSpec, tree, path)
        tree = {"version": 1, "name": spec.name, "mixture": [{"spec": path.name, "weight": 1.0}]}
    return _checked(MixtureSpec, tree, path)


def _read(path: Path) -> dict[str, Any]:
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
    return tree


def _checked(model: type[Spec], tree: dict[str, Any], path: Path) -> Spec:
    try:
        spec = model.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(explain(model, error, f"spec {path}"))) from error
    spec._path = path
    return spec
