"""The auxiliary loss of experts: that they share the tokens evenly (arXiv 2101.03961)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmpt.types import Routing


def pack_balance(routing: Sequence[Routing]) -> Float[Tensor, " packs"] | None:
    """Each pack's auxiliary loss, summed over layers; None where no layer has one.

    A pack is balanced by itself: which packs share a rank or a micro-batch changes nothing.
    """
    layers = [layer.balance for layer in routing if layer.balance is not None]
    return torch.stack(layers).sum(0) if layers else None
