"""The model's part of the tree: every architecture is a config of one model.

A published one stands in configs/models/ as a ModelConfig of its own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmpt.config.section import Positive, PositiveFloat, Section, refuse_remainder


class RopeScalingConfig(Section):
    """How rotary frequencies are stretched to contexts longer than the weights were first trained with."""

    kind: Literal["llama3", "yarn"] = Field(description="llama3: as Llama 3.1; yarn: arXiv 2309.00071")
    factor: Annotated[float, Field(gt=1)] = Field(description="how many times longer")
    original_positions: Positive = Field(description="positions of a segment in the first training")
    low_freq_factor: Annotated[float, Field(gt=0)] = Field(
        1.0, description="llama3: waves longer than original_positions / this stretch"
    )
    high_freq_factor: Annotated[float, Field(gt=0)] = Field(
        4.0, description="llama3: those shorter than original_positions / this stay"
    )
    beta_fast: Annotated[float, Field(gt=0)] = Field(
        32.0, description="yarn: turns within original_positions from which on a pair stays"
    )
    beta_slow: Annotated[float, Field(gt=0)] = Field(1.0, description="yarn: turns up to which a pair stretches")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> RopeScalingConfig:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}")
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow} is not below beta_fast {self.beta_fast}")
        return self


class ExpertsConfig(Section):
    """A mixture of experts in place of each feed-forward; no token is dropped."""

    count: Annotated[int, Field(ge=2, le=1024)] = 8
    top_k: Positive = Field(2, description="experts that each token goes through")
    shared: Annotated[int, Field(ge=0)] = Field(
        0, description="experts that every token goes through besides, as one of that many times ffn_dim"
    )
    balance: Literal["auxiliary", "bias"] = Field(
        "auxiliary", description="auxiliary: a loss (arXiv 2101.03961), see objectives.balance; bias: no loss (arXiv 2408.15664)"
    )
    bias_rate: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="balance: bias: change of an expert's bias after each step"
    )

    @model_validator(mode="after")
    def _enough(self) -> ExpertsConfig:
        if self.top_k > self.count:
            raise ValueError(f"top_k {self.top_k} is more than count {self.count}")
        return self


class InitConfig(Section):
    """Published weights to start from: `{open_clip: NAME, pretrained: FILE}` or `{hf: FOLDER}`."""

    open_clip: str | None = Field(None, description="name of an architecture of open_clip, such as ViT-B-32")
    pretrained: str | None = Field(
        None, description="its weights: a file (safetensors or PyTorch's), or a name that open_clip knows"
    )
    hf: str | None = Field(None, description="folder of a Hugging Face checkpoint: config.json and model*.safetensors")

    @model_validator(mode="after")
    def _one_origin(self) -> InitConfig:
        if (self.open_clip is None) == (self.hf is None) or (self.open_clip is None) != (self.pretrained is None):
            raise ValueError("give either open_clip and pretrained, or hf")
        return self


class BlocksConfig(Section):
    """A stack of transformer blocks."""

    dim: Positive = Field(256, description="width")
    layers: Annotated[int, Field(ge=0)] = 4
    n_heads: Positive = 4
    n_kv_heads: Positive | None = Field(
        None, description="heads of keys and values, of which n_heads is a multiple; by default n_heads"
    )
    ffn_dim: Positive = Field(1024, description="hidden width of the feed-forward")
    activation: Literal["swiglu", "gelu", "quick_gelu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post"] = Field(
        "pre", description="pre: before each part, and once at the end; post: after each residual sum"
    )
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    bias: bool = Field(False, description="whether linear layers add one")
    qk_norm: bool = Field(True, description="whether queries and keys are RMS-normalised, head by head (arXiv 2302.05442)")
    frozen: bool = Field(False, description="whether the weights stay as they are")
    init: InitConfig | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @model_validator(mode="after")
    def _heads_fit(self) -> BlocksConfig:
        refuse_remainder("2 * n_heads", 2 * self.n_heads, "dim", self.dim)
        refuse_remainder("n_kv_heads", self.kv_heads, "n_heads", self.n_heads)
        return self


class ImageEncoderConfig(BlocksConfig):
    """A ViT over packed patches, projected into the shared transformer."""

    size: Positive = Field(64, description="side in pixels of a square picture, whose area is the most that a picture may have")
    resize: Literal["square", "native", "crop"] = Field(
        "square",
        description="square: pictures are fitted into size x size; native: they keep shape and, up to that area, size; "
        "crop: the shorter side is brought to size, bicubic, and the middle cut out (CLIP's preprocessing)",
    )
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="of red, green and blue, taken off; of 1")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        (0.5, 0.5, 0.5), description="of red, green and blue, divided by"
    )
    patch: Positive = Field(16, description="side in pixels of a patch")
    stem: Literal["linear", "conv"] = Field(
        "linear", description="linear: one projection per patch; conv: 3x3 convolutions of stride 2 down to one vector per patch"
    )
    stem_dims: tuple[Positive, ...] = Field(
        (), description="channels of the conv stem's layers, each of which halves the picture"
    )
    stem_bias: bool = Field(True, description="whether the linear stem adds one")
    positions: Literal["rotary", "learned"] = Field(
        "rotary", description="rotary: two axes; learned: a table for size x size, interpolated for other shapes"
    )
    class_token: bool = Field(False, description="whether each picture has a token of its own (CLIP)")
    stem_norm: bool = Field(False, description="whether a norm stands before the blocks (CLIP's ln_pre)")
    pool: Literal["class", "mean", "attention"] = Field(
        "mean", description="how a picture becomes one vector for the tower's contrast"
    )
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
        refuse_remainder("image.patch", self.patch, "image.size", self.size)
        refuse_remainder("image.merge", self.merge, "image.size / image.patch", self.patches_per_side)
        if self.positions == "rotary":
            refuse_remainder("4 * image.n_heads", 4 * self.n_heads, "image.dim", self.dim)
        if self.pool == "class" and not self.class_token:
            raise ValueError("pool: class wants class_token: true")
        if self.stem == "conv" and 2 ** len(self.stem_dims) != self.patch:
            raise ValueError(
                f"stem_dims {list(self.stem_dims)} halves the picture {len(self.stem_dims)} times, but patch is {self.patch}: "
                f"give log2(patch) layers"
            )
        if self.stem == "linear" and self.stem_dims:
            raise ValueError(f"stem_dims {list(self.stem_dims)} belongs to stem: conv; leave it out with stem: linear")
        return self


class AudioEncoderConfig(BlocksConfig):
    """Whisper's encoder over a log-mel of 100 frames a second: two convolutions, the second of stride 2, then blocks."""

    mel_bins: Literal[80, 128] = 80
    positions: Literal["rotary", "sinusoidal"] = Field("rotary", description="sinusoidal: Whisper's, up to 30 seconds")
    frames_per_token: Positive = Field(
        8, description="log-mel frames that become one token of the shared transformer; even, for the convolution of stride 2"
    )
    pool: Literal["mean", "attention"] = Field("mean", description="how a sound becomes one vector for the tower's contrast")

    @model_validator(mode="after")
    def _frames_fit(self) -> AudioEncoderConfig:
        refuse_remainder("2", 2, "audio.frames_per_token", self.frames_per_token)
        return self


class VideoEncoderConfig(Section):
    """Clips: frames through the image encoder, each with the time at which it is shown, then neighbours in time averaged."""

    size: Positive | None = Field(
        None, description="side in pixels of a square frame, a multiple of image.patch * image.merge; by default that of pictures"
    )
    merge_frames: Positive = Field(1, description="frames in a row whose features are averaged into one")


class TransformerConfig(BlocksConfig):
    """The shared transformer; CLIP's text tower, where `fusion` is false."""

    mask: Literal["causal", "bidirectional", "media"] = Field(
        "causal",
        description="what a token attends to in its document; media: causal, but each medium's own tokens see one another",
    )
    window: Positive | None = Field(None, description="tokens that a token looks back on, itself among them; none: all")
    positions: Literal["rotary", "learned", "none"] = "rotary"
    max_positions: Positive | None = Field(None, description="rows of the table of learned positions, the longest segment")
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    rope_scaling: RopeScalingConfig | None = None
    rope_sections: tuple[Positive, Positive, Positive] | None = Field(
        None,
        description="pairs of a head that turn with time, row and column (arXiv 2409.12191); none: all with the place",
    )
    experts: ExpertsConfig | None = None

    @model_validator(mode="after")
    def _positions_fit(self) -> TransformerConfig:
        if (self.positions == "learned") != (self.max_positions is not None):
            raise ValueError("max_positions belongs to positions: learned; give both or neither")
        if self.positions != "rotary" and (self.rope_scaling or self.rope_sections):
            raise ValueError(f"rope_scaling and rope_sections belong to positions: rotary, not {self.positions}")
        if self.rope_sections and 2 * sum(self.rope_sections) != self.head_dim:
            found, half = sum(self.rope_sections), self.head_dim // 2
            raise ValueError(f"rope_sections {list(self.rope_sections)} add up to {found}, and half a head is {half}")
        if self.window and self.mask != "causal":
            raise ValueError(f"window {self.window} belongs to mask: causal, not {self.mask}")
        return self


class ModelConfig(Section):
    vocabulary: Positive = Field(4096, description="rows of the token embedding; at least the tokenizer's size")
    tie_embeddings: bool = Field(True, description="whether the output layer is the token embedding")
    token_types: Literal[0, 2] = Field(0, description="rows of the table of token types: BERT's first and second text")
    embedding_norm: bool = Field(False, description="whether a norm stands before the blocks (BERT)")
    head: Literal["linear", "bert"] = Field(
        "linear", description="bert: a layer and a norm before the output layer, its bias, and a classifier of sentence pairs"
    )
    fusion: bool = Field(True, description="whether media enter the shared transformer; false: towers alone (CLIP)")
    levels: tuple[Literal["backbone", "tower"], ...] = Field(
        ("backbone",), description="where retrieval embeddings are taken: behind the shared transformer, or behind each encoder"
    )
    embedding_dim: Positive = Field(256, description="width of the retrieval embeddings")
    pool: Literal["last", "mean"] = Field(
        "last", description="last: of <emb> alone; mean: over the embedded part's tokens as well"
    )
    logit_scale_init: Annotated[float, Field(ge=1, le=100)] = Field(
        14.3, description="the factor on cosines at the start (1 / temperature); learned from there"
    )
    logit_bias_init: float | None = Field(
        None, description="what is added to scaled cosines at the start, for the sigmoid loss: about -10"
    )
    image: ImageEncoderConfig | None = None
    audio: AudioEncoderConfig | None = None
    video: VideoEncoderConfig | None = None
    transformer: TransformerConfig = TransformerConfig()
    init: InitConfig | None = Field(None, description="weights for every part of the model that the checkpoint has")

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        if self.video and not self.image:
            raise ValueError("video wants image: clips go through the image encoder")
        if self.video and self.image:
            refuse_remainder("image.patch * image.merge", self.image.patch * self.image.merge, "video.size", self.frame_size)
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels {list(self.levels)} names one twice")
        if self.head == "bert" and not self.token_types:
            raise ValueError("head: bert wants token_types: 2, which tell the first text from the second")
        if not self.fusion and self.levels != ("tower",):
            raise ValueError(f"levels {list(self.levels)}: with fusion: false there is the tower alone; write levels: [tower]")
        return self

    @property
    def frame_size(self) -> int:
        """Side in pixels of a square frame of a clip."""
        return (self.video.size if self.video else None) or self.image.size
