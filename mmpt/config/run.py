"""A run: the model, its data, its objectives, and how and on what ranks it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmpt.config.model import ModelConfig
from mmpt.config.parallel import ParallelConfig
from mmpt.config.section import BelowOne, Fraction, Positive, PositiveFloat, Section, Seed, Weight


class AugmentConfig(Section):
    """Random changes of training pictures, keyed by (seed, epoch, document, part): the same on every layout and resume."""

    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="largest turn, degrees")
    scale: Fraction = Field(0.0, description="largest relative change of size")
    shift: Fraction = Field(0.0, description="largest shift, as a fraction of the side")
    color: Fraction = Field(0.0, description="largest relative change of brightness, contrast and saturation")
    grayscale: Fraction = Field(0.0, description="chance of losing all colour")
    background: Fraction = Field(0.0, description="chance that transparent parts get a random colour, not white")
    crop: Fraction = Field(
        1.0, description="smallest share of a picture's area that a random crop keeps (CLIP's: 0.9); 1: no crop"
    )


class SpecialTokensConfig(Section):
    """How the tokenizer spells the tokens that mean something to the model."""

    pad: str = "<pad>"
    bos: str = "<bos>"
    eos: str = "<eos>"
    media: str = "<media>"
    emb: str = "<emb>"
    mask: str = Field("<mask>", description="wanted by sources with task: masked alone")
    sentinel: str = Field("<extra_id_{}>", description="wanted by sources with task: span alone; {} stands for 0, 1, 2, ...")


class DataConfig(Section):
    spec: str = Field(description="path of a data spec or a mixture (YAML), relative to the working directory")
    tokenizer: str = Field(description="path of a tokenizer.json of Hugging Face tokenizers, or open_clip:NAME for that model's")
    special_tokens: SpecialTokensConfig = SpecialTokensConfig()
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
    weight: Weight = 1.0
    z_loss: Weight = Field(0.0, description="factor on the square of log Z, which holds logits near 0 (PaLM's: 1e-4)")


class CrossEntropyConfig(Section):
    weight: Weight = 1.0


class LevelConfig(Section):
    """Contrast at one level."""

    weight: Weight = 0.5
    loss: Literal["infonce", "sigmoid"] = Field("infonce", description="infonce: arXiv 2103.00020; sigmoid: arXiv 2303.15343")


class ContrastiveConfig(Section):
    backbone: LevelConfig = LevelConfig()
    tower: LevelConfig = LevelConfig()
    exchange: Literal["gather", "ring"] = Field(
        "gather", description="how ranks meet each other's embeddings: gather: all at once; ring: one rank's at a time"
    )
    grad_cache: bool = Field(
        False, description="whether a step's micro-batches are contrasted with one another, at the cost of a second forward pass"
    )


class DistillationConfig(Section):
    """The next tokens of a teacher, as a distribution."""

    teacher: str = Field(description="folder of the run that teaches, runs/NAME, with the same vocabulary")
    weight: Weight = 1.0
    temperature: PositiveFloat = 1.0
    samples: Annotated[int, Field(ge=0)] = Field(
        0, description="0: the full divergence; else an unbiased estimate of that many tokens drawn from the teacher"
    )


class ObjectivesConfig(Section):
    """A weight of 0 turns a loss off. Losses without data in a batch (no pairs, no masked text) are 0."""

    next_token: NextTokenConfig = NextTokenConfig()
    masked: CrossEntropyConfig = Field(CrossEntropyConfig(), description="masked language, for sources with task: masked")
    next_sentence: CrossEntropyConfig = Field(
        CrossEntropyConfig(), description="whether two texts belong together, for task: masked and head: bert"
    )
    span: CrossEntropyConfig = Field(CrossEntropyConfig(), description="span corruption, for sources with task: span")
    balance: CrossEntropyConfig = Field(
        CrossEntropyConfig(weight=0.01), description="load of experts, for experts with balance: auxiliary"
    )
    contrastive: ContrastiveConfig = ContrastiveConfig()
    distillation: DistillationConfig | None = None


class OptimizerConfig(Section):
    """AdamW, linear warm-up, then a cosine down to `final_fraction` of the peak."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="on matrices only, not on norms, biases or the scale")
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    final_fraction: Fraction = 0.05
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


class TrainConfig(Section):
    steps: Positive = Field(description="optimizer steps of the whole run")
    accumulate: Positive = Field(
        1, description="micro-batches per step; contrast stays within a micro-batch, but for objectives.contrastive.grad_cache"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="what the backward pass computes anew: selective: all but matrix products and attention; full: blocks",
    )
    compile: bool = Field(False, description="whether blocks are compiled (torch.compile); on an accelerator")
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
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _rows_fit(self) -> RunConfig:
        image = self.model.image
        if image and self.model.fusion and self.data.pack_tokens < image.tokens_per_image + 2:
            raise ValueError(
                f"data.pack_tokens {self.data.pack_tokens} cannot hold one picture of {image.tokens_per_image} tokens: raise it"
            )
        if self.data.augment.crop < 1 and not (image and image.resize == "crop"):
            raise ValueError(f"data.augment.crop {self.data.augment.crop} belongs to model.image.resize: crop; leave it out")
        for level in self.model.levels:
            if getattr(self.objectives.contrastive, level).loss == "sigmoid" and self.model.logit_bias_init is None:
                raise ValueError(f"objectives.contrastive.{level}.loss sigmoid wants model.logit_bias_init, about -10")
        return self
