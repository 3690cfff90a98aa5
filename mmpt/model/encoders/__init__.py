"""Encoders: packed media of one modality -> features in the width of the shared transformer, and one vector an item.

    patches (N, values) --stem--> (N, dim) --transformer within each item--> merge neighbours --project--> features (rows, D)
                                                                         +-> pool an item --head--> pooled (M, E)

Letters in shapes: N patches or log-mel frames, M items, F frames of clips, D width of the features, E width of an embedding.
"""

from mmpt.model.encoders.audio import AudioEncoder
from mmpt.model.encoders.image import ImageEncoder
from mmpt.model.encoders.pooling import Encoded
from mmpt.model.encoders.video import VideoEncoder

__all__ = ["AudioEncoder", "Encoded", "ImageEncoder", "VideoEncoder"]
