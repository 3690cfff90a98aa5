"""The RunConfig tree: everything that a run is, and nothing else is.

    configs/NAME.yaml + key.sub=value overrides --OmegaConf--> plain dict --pydantic--> RunConfig

`load` raises UserError for every mistake, naming the field, the value and the mend.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mmpt.types import UserError

MAX_BYTES = 1 << 17  # of a config file; the shipped ones have some two thousand
MAX_LINES = 20  # of mistakes told at once
MAX_DIGITS = 40  # of a whole number
KEY = re.compile(r"\w+(\.\w+)*")  # of an override
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise ValueError(f"{large_name} {large} is not a multiple of {small_name} {small}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are no value here")
        return value


class ImageEncoderConfig(Section):
    """A ViT over packed patches, projected into the shared transformer."""

    size: Positive = Field(64, description="side in pixels of a square picture, whose area is the most that a picture may have")
    resize: Literal["square", "native"] = Field(
        "square", description="square: pictures are fitted into size x size; native: they keep shape and, up to that area, size"
    )
    patch: Positive = Field(16, description="side in pixels of a patch")
    stem: Literal["linear", "conv"] = Field(
        "linear", description="linear: one projection per patch; conv: 3x3 convolutions of stride 2 down to one vector per patch"
    )
    stem_dims: tuple[Positive, ...] = Field(
        (), description="channels of the conv stem's layers, each of which halves the picture"
    )
    dim: Positive = Field(256, description="width")
    layers: Annotated[int, Field(ge=0)] = 4
    n_heads: Positive = 4
    ffn_dim: Positive = Field(1024, description="hidden width of the SwiGLU feed-forward")
    merge: Positive = Field(1, description="side of the square of patches that become one token of the shared transformer")

    @property
    def patches_per_side(self) -> int:
        return self.size // self.patch

    @property
    def tokens_per_image(self) -> int:
        """Of a square picture: the most that a picture takes."""
        return (self.patches_per_side // self.merge) ** 2

    @model_validator(mode="after")
    def _shapes_fit(self) -> ImageEncoderConfig:
        _divides("image.patch", self.patch, "image.size", self.size)
        _divides("image.merge", self.merge, "image.size / image.patch", self.patches_per_side)
        _divides("4 * image.n_heads", 4 * self.n_heads, "image.dim", self.dim)
        if self.stem == "conv" and 2 ** len(self.stem_dims) != self.patch:
            raise ValueError(
                f"stem_dims {list(self.stem_dims)} halves the picture {len(self.stem_dims)} times, but patch is {self.patch}: "
                f"give log2(patch) layers"
            )
        if self.stem == "linear" and self.stem_dims:
            raise ValueError(f"stem_dims {list(self.stem_dims)} belongs to stem: conv; leave it out with stem: linear")
        return self


class TransformerConfig(Section):
    """The shared causal transformer."""

    dim: Positive = Field(256, description="width")
    layers: Positive = 4
    n_heads: Positive = 4
    n_kv_heads: Positive = Field(4, description="heads of keys and values; n_heads is a multiple of it")
    ffn_dim: Positive = Field(1024, description="hidden width of the SwiGLU feed-forward")
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @model_validator(mode="after")
    def _shapes_fit(self) -> TransformerConfig:
        _divides("2 * transformer.n_heads", 2 * self.n_heads, "transformer.dim", self.dim)
        _divides("transformer.n_kv_heads", self.n_kv_heads, "transformer.n_heads", self.n_heads)
        return self


class AudioInputConfig(Section):
    """How sounds reach the model: as the log-mel of 16 kHz, 100 frames a second."""

    mel_bins: Literal[80, 128] = 80
    frames_per_token: Positive = Field(8, description="log-mel frames that become one token of the shared transformer")


class VideoInputConfig(Section):
    """How clips reach the model: frames, cut into the patches of the image encoder."""

    size: Positive | None = Field(
        None, description="side in pixels of a square frame, a multiple of image.patch * image.merge; by default that of pictures"
    )


class ModelConfig(Section):
    vocabulary: Positive = Field(4096, description="rows of the token embedding; at least the tokenizer's size")
    embedding_dim: Positive = Field(256, description="width of the retrieval embeddings")
    logit_scale_init: Annotated[float, Field(ge=1, le=100)] = Field(
        14.3, description="the factor on cosines at the start (1 / temperature); learned from there"
    )
    image: ImageEncoderConfig = ImageEncoderConfig()
    audio: AudioInputConfig = AudioInputConfig()
    video: VideoInputConfig = VideoInputConfig()
    transformer: TransformerConfig = TransformerConfig()

    @model_validator(mode="after")
    def _frames_fit(self) -> ModelConfig:
        _divides("image.patch * image.merge", self.image.patch * self.image.merge, "video.size", self.frame_size)
        return self

    @property
    def frame_size(self) -> int:
        """Side in pixels of a square frame of a clip."""
        return self.video.size or self.image.size


class AugmentConfig(Section):
    """Random changes of training pictures, keyed by (seed, epoch, document, part): the same on every layout and resume."""

    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="largest turn, degrees")
    scale: Fraction = Field(0.0, description="largest relative change of size")
    shift: Fraction = Field(0.0, description="largest shift, as a fraction of the side")
    color: Fraction = Field(0.0, description="largest relative change of brightness, contrast and saturation")
    grayscale: Fraction = Field(0.0, description="chance of losing all colour")
    background: Fraction = Field(0.0, description="chance that transparent parts get a random colour, not white")


class DataConfig(Section):
    spec: str = Field(description="path of a data spec or a mixture (YAML), relative to the working directory")
    tokenizer: str = Field(description="path of a tokenizer.json of Hugging Face tokenizers")
    pack_tokens: Positive = Field(512, description="tokens of a pack")
    pack_media: Positive | None = Field(
        None, description="the most patches and log-mel frames of a pack: what bounds the encoders' memory; none: no bound"
    )
    packs_per_batch: Positive = Field(16, description="packs of a micro-batch, over all ranks")
    window: Positive = Field(256, description="documents packed together, best fit first")
    workers: Annotated[int, Field(ge=0)] = Field(1, description="loader processes per rank; 0 reads in the training process")
    prefetch: Positive = Field(4, description="batches that each worker keeps ready, fewer where prefetch_mib holds fewer")
    prefetch_mib: Positive = Field(
        2048, description="memory of a rank that batches made ahead may take, beside those in use, MiB"
    )
    cache: str = Field("~/.cache/mmpt", description="folder of the copies of remote shards")
    cache_gib: Annotated[float, Field(gt=0)] = Field(64.0, description="the most that those copies take, GiB")
    seed: Seed = 0
    augment: AugmentConfig = AugmentConfig()


class NextTokenConfig(Section):
    weight: Annotated[float, Field(ge=0)] = 1.0


class ContrastiveConfig(Section):
    weight: Annotated[float, Field(ge=0)] = 0.5


class ObjectivesConfig(Section):
    next_token: NextTokenConfig = NextTokenConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()


class OptimizerConfig(Section):
    """AdamW, linear warm-up, then a cosine down to `final_fraction` of the peak."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="on matrices only, not on norms, biases or the scale")
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    final_fraction: Fraction = 0.05
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


class TrainConfig(Section):
    steps: Positive = Field(description="optimizer steps of the whole run")
    accumulate: Positive = Field(1, description="micro-batches per step; contrast stays within a micro-batch")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 autocast where the hardware computes it")
    seed: Seed = 0
    log_every: Positive = 10
    eval_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between evaluations on the held-out split; 0: only at the end"
    )
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2


class RunConfig(Section):
    """Everything that a run is."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = Field(
        description="the run lies in runs/NAME: letters, digits, '_', '.' and '-'"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig
    objectives: ObjectivesConfig = ObjectivesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _rows_fit(self) -> RunConfig:
        if self.data.pack_tokens < self.model.image.tokens_per_image + 2:
            raise ValueError(
                f"data.pack_tokens {self.data.pack_tokens} cannot hold one picture of "
                f"{self.model.image.tokens_per_image} tokens: raise it"
            )
        return self


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config, apply `key.sub=value` overrides, check everything.

    Raises UserError, one line per mistake: the field, its value, and what to write instead.
    """
    where = f"config {path}"
    try:
        tree = OmegaConf.create(_read(Path(path), where))
        for override in overrides or []:
            tree = OmegaConf.merge(tree, _parse_override(override, tree))
        plain = OmegaConf.to_container(tree)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise UserError(f"{where}: {reason}") from error
    return parse(plain, where=where)


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
    tree = yaml.load(path.read_text(encoding="utf-8"), PlainLoader) or {}
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


def parse(plain: Any, where: str) -> RunConfig:
    """Check a plain tree. Raises UserError as `load` does."""
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise UserError("\n".join(explain(RunConfig, error, where))) from error


def dump(config: RunConfig) -> str:
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
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        model = inner
    return model
