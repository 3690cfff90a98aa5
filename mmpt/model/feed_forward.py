"""The position-wise part of a block."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from mmpt.model.layers import gelu, narrowed, quick_gelu, swiglu

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"swiglu": swiglu, "gelu": gelu, "quick_gelu": quick_gelu}


class FeedForward(nn.Module):
    """dim -> hidden -> dim. SwiGLU (arXiv 2002.05202) has a layer of gates besides."""

    def __init__(self, dim: int, hidden: int, *, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(dim, hidden, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "T dim"]) -> Float[Tensor, "T dim"]:
        x = narrowed(x)  # once for both layers
        widened = (self.up(x),) if self.gate is None else (self.gate(x), self.up(x))
        return self.down(self.activation(*widened))
