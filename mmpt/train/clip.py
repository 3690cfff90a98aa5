"""The norm of the whole gradient, over whatever meshes its parts are cut, and its bound."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_gradients(model: nn.Module, max_norm: float, group: dist.ProcessGroup | None = None) -> float:
    """Scale the gradient down to `max_norm` if it is longer. Returns its norm before; all ranks of `group` have a part in it.

    Torch's own clips parameters of one mesh. Here squares of local parts are summed, those of parts that several ranks hold
    divided by how many do, in one all-reduce. A part's own squares torch sums in its type: in fp32 some 1e-6 of the norm.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    parts: dict[int, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        parts[_copies(gradient)].append(local)
    device = gradients[0].device if gradients else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for copies, found in parts.items():
        squares += nn.utils.get_total_norm(found).double() ** 2 / copies
    if group is not None:
        dist.all_reduce(squares, group=group)
    norm = math.sqrt(float(squares))
    if norm > max_norm:
        for found in parts.values():
            torch._foreach_mul_(found, max_norm / norm)
    return norm


def _copies(gradient: Tensor) -> int:
    """How many ranks hold the same part."""
    if not isinstance(gradient, DTensor):
        return 1
    sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())
