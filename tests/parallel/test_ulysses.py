"""Ulysses, alone and inside a ring: all tokens of some heads for some tokens of all heads, and back, against dense attention."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from rings import Results, assert_equals_dense, planned, random_heads

from mmpt.parallel.ring import RingLayout
from mmpt.parallel.ulysses import heads_to_tokens, tokens_to_heads

PACKS = [((60, 3, 50), 15, "media", (((5, 40),), (), ((0, 3), (10, 30)))), ((128,), 0, "causal", ())]


def _exchanged() -> tuple:
    """Numbers that say which rank, token and head they are of: what comes, what goes back, and a refusal."""
    rank, group = dist.get_rank(), dist.group.WORLD
    token, head = torch.arange(3.0)[:, None, None], torch.arange(8.0)[None, :, None]
    q = 1000 * rank + 100 * token + head
    k, v = 1000 * rank + 100 * token + 10 + head[:, :4], 1000 * rank + 100 * token + 20 + head[:, :4]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mine = tokens_to_heads(q, k, v, group)
    back = heads_to_tokens(mine[0], group)
    (grad,) = torch.autograd.grad(back, q, back.detach())
    with pytest.raises(ValueError, match="8 heads and 3 of keys cannot be shared by 4 ranks"):
        tokens_to_heads(q, k[:, :3], v[:, :3], group)
    return [x.detach().squeeze(-1) for x in mine], torch.equal(back, q), torch.equal(grad, q)


def _attended(ring: int, case: int) -> Results:
    """Output and gradients of this rank's tokens; ranks of a Ulysses group follow one another."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ulysses = world // ring
    groups = [dist.new_group(list(range(r * ulysses, (r + 1) * ulysses))) for r in range(ring)]
    rings = [dist.new_group(list(range(u, world, ulysses))) for u in range(ulysses)]
    lengths, padding, mask, spans = PACKS[case]
    pack, plans = planned(lengths, padding, ring, mask, spans)
    of_ring, part = divmod(rank, ulysses)
    rows = pack.rows(of_ring).chunk(ulysses)[part]
    layout = RingLayout(plans[of_ring], rings[part] if ring > 1 else None, groups[of_ring])
    *leaves, dout = (x[rows] for x in random_heads(128, (8, 4)))
    leaves = [x.requires_grad_() for x in leaves]
    out = layout.attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _all() -> tuple:
    return _exchanged(), [[_attended(ring, case) for case in range(len(PACKS))] for ring in (1, 2)]


@pytest.fixture(scope="module")
def found() -> list:
    return on_ranks(4, _all)


def test_each_rank_gets_its_heads_of_all_tokens_in_order(found):
    for rank, ((q, k, v), forth_and_back, gradient) in enumerate(exchanged for exchanged, _ in found):
        tokens = torch.tensor([1000.0 * other + 100 * token for other in range(4) for token in range(3)])[:, None]
        assert torch.equal(q, tokens + torch.tensor([2.0 * rank, 2 * rank + 1]))
        assert torch.equal(k, tokens + 10 + rank) and torch.equal(v, tokens + 20 + rank)
        assert forth_and_back and gradient


@pytest.mark.parametrize("case", range(len(PACKS)))
@pytest.mark.parametrize("ring", [1, 2])
def test_ring_times_ulysses_equals_dense_attention(found, ring, case):
    lengths, padding, mask, spans = PACKS[case]
    pack, _ = planned(lengths, padding, ring, mask, spans)
    parts = [results[ring - 1][case] for _, results in found]
    ulysses = 4 // ring
    joined = [[torch.cat(x) for x in zip(*parts[r * ulysses : (r + 1) * ulysses], strict=True)] for r in range(ring)]
    assert_equals_dense(joined, random_heads(128, (8, 4)), pack, 1e-12)
