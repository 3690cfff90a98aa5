"""BERT's two heads: the layers before its output layer, and the classifier of pairs of sentences (arXiv 1810.04805)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

STD = 0.02  # of all weights at the start


class BertHead(nn.Module):
    """hidden --dense, GELU, norm--> what the output layer reads;  first token --pooler, tanh, classifier--> sentence logits"""

    def __init__(self, dim: int, vocabulary: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.bias = nn.Parameter(torch.empty(vocabulary))  # of the output layer
        self.pooler = nn.Linear(dim, dim)
        self.classifier = nn.Linear(dim, 2)

    def transform(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.norm(F.gelu(self.dense(hidden)))

    def sentence_logits(self, hidden: Float[Tensor, "T D"], first: Int[Tensor, " S"]) -> Float[Tensor, "n 2"]:
        """For every segment, from its `first` token if that is here: whether its second text follows the first, or is another
        document's."""
        return self.classifier(torch.tanh(self.pooler(hidden.index_select(0, first[first >= 0]))))

    def initialize(self) -> None:
        for part in (self.dense, self.pooler, self.classifier):
            nn.init.normal_(part.weight, std=STD)
            nn.init.zeros_(part.bias)
        self.norm.reset_parameters()
        nn.init.zeros_(self.bias)
