"""The contrastive loss over ranks with unequal counts, against one process: value and every gradient, in fp64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks

from mmpt.objectives.contrastive import contrastive_loss
from mmpt.types import IMAGE, TEXT, EmbeddingSlots

PAIRS = 7


def whole() -> tuple[torch.Tensor, EmbeddingSlots]:
    """Seven pairs; 0 and 5 share a text, 1 and 2 a picture."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2 * PAIRS, 5, dtype=torch.float64, generator=generator)
    content = torch.arange(2 * PAIRS)
    content[11], content[4] = content[1], content[2]
    return raw, EmbeddingSlots(
        modality=torch.tensor([IMAGE, TEXT] * PAIRS), pair=torch.arange(PAIRS).repeat_interleave(2), content=content
    )


def gradients(shares: list[int], rank: int, group) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss and gradients of the rank that owns shares[rank] of the pairs, after those of the ranks before it."""
    raw, slots = whole()
    start, stop = 2 * sum(shares[:rank]), 2 * sum(shares[: rank + 1])
    mine = raw[start:stop].clone().requires_grad_()
    log_scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    part = EmbeddingSlots(modality=slots.modality[start:stop], pair=slots.pair[start:stop], content=slots.content[start:stop])
    loss, _ = contrastive_loss(F.normalize(mine, dim=-1), part, log_scale.exp(), group)
    loss.backward()
    return float(loss.detach()), mine.grad, log_scale.grad


def body(shares: list[int]) -> tuple[float, torch.Tensor, torch.Tensor]:
    return gradients(shares, dist.get_rank(), dist.group.WORLD)


@pytest.mark.parametrize("shares", [[4, 3], [7, 0], [1, 6]])
def test_equals_one_process(shares):
    loss, grad, scale_grad = gradients([PAIRS], 0, None)
    ranks = on_ranks(2, body, shares)
    assert sum(part[0] for part in ranks) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in ranks]), grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(sum(part[2] for part in ranks), scale_grad, rtol=1e-10, atol=1e-13)
