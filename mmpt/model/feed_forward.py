"""The position-wise part of a block."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from mmpt.model.layers import gelu, quick_gelu, swiglu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": swiglu, "gelu": gelu, "quick_gelu": quick_gelu}


class FeedForward(nn.Module):
    """dim -> hidden -> dim. SwiGLU (arXiv 2002.05202) computes gates and values in one layer: half its rows each, gates first."""

    def __init__(self, dim: int, hidden: int, *, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        if activation == "swiglu":
            self.gate_up = nn.Linear(dim, 2 * hidden, bias=bias)
        else:
            self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "T dim"]) -> Float[Tensor, "T dim"]:
        widen = self.gate_up if self.activation is swiglu else self.up
        return self.down(self.activation(widen(x)))
