"""The RunConfig tree: everything that a run is, and nothing else is.

section -> model, parallel -> run        what there is to say, with types, ranges and meanings
YAML + overrides --reading--> RunConfig
"""

from mmpt.config.model import (
    AudioEncoderConfig,
    BlocksConfig,
    ExpertsConfig,
    ImageEncoderConfig,
    InitConfig,
    ModelConfig,
    RopeScalingConfig,
    TransformerConfig,
    VideoEncoderConfig,
)
from mmpt.config.parallel import ParallelConfig
from mmpt.config.reading import MAX_BYTES, PlainLoader, dump, explain, load, load_either, load_model, parse
from mmpt.config.run import (
    AugmentConfig,
    ContrastiveConfig,
    CrossEntropyConfig,
    DataConfig,
    DistillationConfig,
    LevelConfig,
    NextTokenConfig,
    ObjectivesConfig,
    OptimizerConfig,
    RunConfig,
    SpecialTokensConfig,
    TrainConfig,
)
from mmpt.config.section import Section

__all__ = [
    "MAX_BYTES",
    "AudioEncoderConfig",
    "AugmentConfig",
    "BlocksConfig",
    "ContrastiveConfig",
    "CrossEntropyConfig",
    "DataConfig",
    "DistillationConfig",
    "ExpertsConfig",
    "ImageEncoderConfig",
    "InitConfig",
    "LevelConfig",
    "ModelConfig",
    "NextTokenConfig",
    "ObjectivesConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlainLoader",
    "RopeScalingConfig",
    "RunConfig",
    "Section",
    "SpecialTokensConfig",
    "TrainConfig",
    "TransformerConfig",
    "VideoEncoderConfig",
    "dump",
    "explain",
    "load",
    "load_either",
    "load_model",
    "parse",
]
