"""The contrastive losses over groups of 1, 2 and 4 ranks, gathered and round the ring, against one process without a group.

Counts differ from rank to rank, down to none; pairs on different ranks share texts and pictures; tiles are small, so that there
are many. Loss, every pair's loss, every gradient (both sides, scale and bias), and the figures that are logged.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks

from mmpt.objectives import tiles
from mmpt.objectives.contrastive import contrast
from mmpt.objectives.diagnostics import contrastive_figures
from mmpt.types import AUDIO, IMAGE, NOTHING, TEXT, Embeddings, EmbeddingSlots

PAIRS = 16
GROUPS = {(2,): [[16]], (1, 3): [[9, 7], [16, 0]], (0, 1, 2, 3): [[5, 0, 3, 8], [1, 13, 1, 1]]}
"""How many pairs each rank has, by the ranks that make a group."""

CASES = list(product(("infonce", "sigmoid"), ("gather", "ring"), (torch.float64, torch.float32), (True, False)))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # of the largest value


def whole(dtype: torch.dtype, duplicated: bool) -> tuple[torch.Tensor, EmbeddingSlots]:
    """Sixteen pairs; with duplicates, pairs 0 and 13 share a text, 1 and 2 and 15 a picture. And a sound without a partner."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(PAIRS, 3, 6, dtype=torch.float64, generator=generator), dim=-1).to(dtype)
    content = torch.arange(3 * PAIRS).view(PAIRS, 3)
    if duplicated:
        content[13, 0] = content[0, 0]
        content[[2, 15], 1] = content[1, 1]
    return vectors, EmbeddingSlots(
        modality=torch.tensor([[TEXT, IMAGE, AUDIO]] * PAIRS),
        item=torch.tensor([[NOTHING, 0, 0]] * PAIRS),
        pair=torch.arange(PAIRS)[:, None].expand(PAIRS, 3),
        content=content,
    )


def part(shares: list[int], rank: int, case: tuple, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Loss and gradients of the rank that owns shares[rank] of the pairs, after those of the ranks before it."""
    loss, exchange, dtype, duplicated = case
    vectors, slots = whole(dtype, duplicated)
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    vectors = vectors[own].clone().requires_grad_()
    mine = EmbeddingSlots(**{name: value[own].flatten() for name, value in vars(slots).items()})
    scale, bias = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (9.0, -4.0))
    norms = mine.content.double() + 1
    level = Embeddings(vectors=vectors.flatten(0, 1), norms=norms, scale=scale, bias=bias)
    found = contrast(level, mine, (TEXT, IMAGE), loss=loss, exchange=exchange, group=group)
    (found.sum / 16).backward()
    zero = torch.zeros(1, dtype=dtype)
    return {
        "sum": found.sum.detach(),
        "rows": found.rows,
        "vectors": vectors.grad,
        "scale": scale.grad,
        "bias": zero if bias.grad is None else bias.grad,
        "hits": found.correct,
        "negatives": found.negatives,
        **contrastive_figures(level, mine, (TEXT, IMAGE), group),
    }


def body() -> dict[tuple[int, ...], list[dict[str, torch.Tensor]]]:
    """What this rank finds in every group that it is in."""
    tiles.TILE["cpu"], tiles.STRIP["cpu"], tiles.MEMORY = (3, 4), 2, 2000
    groups = {ranks: dist.new_group(list(ranks)) for ranks in GROUPS}  # every rank makes every group
    return {
        ranks: [part(shares, dist.get_rank(group), case, group) for shares in GROUPS[ranks] for case in CASES]
        for ranks, group in groups.items()
        if dist.get_rank() in ranks
    }


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[int, ...], list[dict[str, torch.Tensor]]]]:
    return on_ranks(4, body)


@pytest.mark.parametrize("ranks", GROUPS, ids=lambda ranks: f"{len(ranks)} ranks")
def test_equals_one_process(ranks: tuple[int, ...], by_rank: list[dict[tuple[int, ...], list[dict[str, torch.Tensor]]]]) -> None:
    for number, (shares, case) in enumerate(product(GROUPS[ranks], CASES)):
        expected = part([PAIRS], 0, case, None)
        for name, value in expected.items():
            parts = [by_rank[rank][ranks][number][name] for rank in ranks]
            found = {"rows": torch.cat, "vectors": torch.cat}.get(name, sum if name in SUMS else _one)(parts)
            error = (found.double() - value.double()).abs().max()
            assert error <= TOLERANCE[case[2]] * value.abs().max(), (name, shares, case, float(error))


SUMS = ("sum", "scale", "bias", "hits", "negatives")


def _one(values: list[torch.Tensor]) -> torch.Tensor:
    """What every rank knows alike."""
    assert all(torch.equal(value, values[0]) for value in values)
    return values[0]
