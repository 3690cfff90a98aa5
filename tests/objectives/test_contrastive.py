"""InfoNCE and the sigmoid loss against open_clip's, and against a table written out: value and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.objectives import tiles
from mmpt.objectives.contrastive import COMBOS, PairLoss, contrast, count_pairs, pair_slots
from mmpt.objectives.duplicates import Duplicates
from mmpt.types import AUDIO, IMAGE, NOTHING, TEXT, VIDEO, Embeddings, EmbeddingSlots

COMBO = (TEXT, IMAGE)


@pytest.fixture(autouse=True, params=[(512, 1024), (4, 7)], ids=["one tile", "many tiles"])
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is shown with a single tile, kept, and with small ones that the backward pass makes anew."""
    monkeypatch.setitem(tiles.TILE, "cpu", request.param)
    if request.param == (4, 7):
        monkeypatch.setitem(tiles.STRIP, "cpu", 3)
        monkeypatch.setattr(tiles, "MEMORY", 5000)


def slots_of(texts: list[int], images: list[int]) -> EmbeddingSlots:
    """A picture and a text for each pair, of these contents, one after the other."""
    pairs = len(texts)
    return EmbeddingSlots(
        modality=torch.tensor([IMAGE, TEXT] * pairs),
        item=torch.tensor([[i, NOTHING] for i in range(pairs)]).flatten(),
        pair=torch.arange(pairs).repeat_interleave(2),
        content=torch.tensor([images, [text + 1000 for text in texts]]).T.flatten(),
    )


def distinct(pairs: int) -> EmbeddingSlots:
    return slots_of(list(range(pairs)), list(range(pairs)))


def leaves(pairs: int, dtype: torch.dtype = torch.float64, scale: float = 7.4) -> tuple[torch.Tensor, ...]:
    """Unit vectors, half of what they say shared within a pair; a scale and a bias."""
    generator = torch.Generator().manual_seed(pairs)
    shared = torch.randn(pairs, 1, 8, dtype=torch.float64, generator=generator)
    vectors = F.normalize(shared + torch.randn(pairs, 2, 8, dtype=torch.float64, generator=generator), dim=-1).flatten(0, 1)
    return tuple(x.to(dtype).requires_grad_() for x in (vectors, torch.tensor([scale]), torch.tensor([-3.0])))


def ours(leaves: tuple[torch.Tensor, ...], slots: EmbeddingSlots, loss: str = "infonce", combo=COMBO) -> PairLoss:
    vectors, scale, bias = leaves
    level = Embeddings(vectors=vectors, norms=torch.ones(len(vectors)), scale=scale, bias=bias)
    return contrast(level, slots, combo, loss=loss, exchange="gather", group=None)


def table(leaves: tuple[torch.Tensor, ...], slots: EmbeddingSlots, loss: str) -> torch.Tensor:
    """The definition, all pairs against all at once."""
    vectors, scale, bias = leaves
    logits = scale * vectors[1::2] @ vectors[0::2].T
    shared = (slots.content.view(-1, 2)[:, None] == slots.content.view(-1, 2)).any(-1).fill_diagonal_(False)
    if loss == "sigmoid":
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * (logits + bias)).masked_fill(shared, 0.0).sum()
    logits, own = logits.masked_fill(shared, -torch.inf), torch.arange(len(logits))
    return 0.5 * (F.cross_entropy(logits, own, reduction="sum") + F.cross_entropy(logits.T, own, reduction="sum"))


def gradients(value: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [g for g in torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True) if g is not None]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], relative: float) -> None:
    """The largest difference, over the largest value."""
    assert len(found) == len(expected)
    for mine, reference in zip(found, expected, strict=True):
        assert (mine.double() - reference.double()).abs().max() <= relative * reference.abs().max()


@pytest.mark.parametrize("pairs", [1, 6, 23])
def test_infonce_is_clip_loss(pairs):
    mine, theirs = leaves(pairs), leaves(pairs)
    found = ours(mine, distinct(pairs))
    expected = ClipLoss()(theirs[0][0::2], theirs[0][1::2], theirs[1].squeeze())
    torch.testing.assert_close(found.sum / pairs, expected, rtol=1e-12, atol=1e-14)
    if pairs > 1:
        assert_same(gradients(found.sum / pairs, mine), gradients(expected, theirs), 1e-12)
    torch.testing.assert_close(found.rows.sum(), found.sum.detach())
    assert found.negatives == pairs * (pairs - 1)
    assert found.documents.tolist() == list(range(pairs))


@pytest.mark.parametrize("pairs", [1, 6, 23])
def test_sigmoid_is_siglip_loss(pairs):
    mine, theirs = leaves(pairs), leaves(pairs)
    found = ours(mine, distinct(pairs), "sigmoid")
    expected = SigLipLoss()(theirs[0][0::2], theirs[0][1::2], theirs[1], theirs[2])
    torch.testing.assert_close(found.sum / pairs, expected, rtol=1e-12, atol=0)
    assert_same(gradients(found.sum / pairs, mine), gradients(expected, theirs), 1e-12)
    torch.testing.assert_close(found.rows.sum(), found.sum.detach())


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("scale", [7.4, 100.0])
def test_duplicates_on_either_side_are_masked(loss, scale):
    generator = torch.Generator().manual_seed(1)
    slots = slots_of(*torch.randint(0, 15, (2, 23), generator=generator).tolist())
    mine, theirs = leaves(23, scale=scale), leaves(23, scale=scale)
    found, expected = ours(mine, slots, loss), table(theirs, slots, loss)
    torch.testing.assert_close(found.sum, expected, rtol=1e-12, atol=0)
    assert_same(gradients(found.sum, mine), gradients(expected, theirs), 1e-11)


def test_duplicates_by_hand():
    """Pairs 0 and 2 share a text, 1 and 2 a picture: the shared columns left out."""
    vectors, scale, _ = leaves(3)
    found = ours(leaves(3), slots_of([8, 9, 8], [0, 1, 1]))
    images, texts = vectors[0::2], vectors[1::2]
    kept = [[0, 1], [0, 1], [2]]
    for i, columns in enumerate(kept):
        sides = ((images, texts), (texts, images))
        each = [-torch.log_softmax(scale * (y[columns] @ x[i]), 0)[columns.index(i)] for x, y in sides]
        torch.testing.assert_close(found.rows[i], sum(each).detach() / 2)
    assert found.negatives == 2


def test_duplicates_on_literal_numbers():
    contents = torch.tensor([[0, 18], [1, 19], [1, 18], [4, 10]])
    duplicates = Duplicates(contents, slice(1, 4))
    assert duplicates.positions == [0, 1, 2]
    assert duplicates.negatives.tolist() == [2, 1, 3]
    tile = torch.zeros(2, 3)
    duplicates.mask(tile, row=1, column=1)
    assert tile.tolist() == [[0, -torch.inf, 0], [-torch.inf, 0, 0]]


def test_fp32_is_as_exact_as_open_clip():
    exact = leaves(23, scale=30.0)
    reference = gradients(ClipLoss()(exact[0][0::2], exact[0][1::2], exact[1].squeeze()), exact)
    single = leaves(23, torch.float32, scale=30.0)
    assert_same(gradients(ours(single, distinct(23)).sum / 23, single), reference, 2e-6)


def test_bf16_is_as_exact_as_open_clip():
    """Both are some 2e-2 off what fp64 makes of the same bf16 vectors."""
    half, theirs = leaves(23, torch.bfloat16), leaves(23, torch.bfloat16)
    exact = tuple(x.detach().double().requires_grad_() for x in half)
    reference = gradients(table(exact, distinct(23), "infonce") / 23, exact)
    single = (half[0], *(x.detach().float().requires_grad_() for x in half[1:]))
    mine = gradients(ours(single, distinct(23)).sum / 23, single)
    clip = gradients(ClipLoss()(theirs[0][0::2], theirs[0][1::2], theirs[1].squeeze()), theirs)
    for ours_, clips, right in zip(mine, clip, reference, strict=True):
        assert (ours_.double() - right).norm() <= max(1.2 * (clips.double() - right).norm(), 1e-2 * right.norm())


def test_pairs_far_apart_at_the_largest_scale():
    """All logits near -100, where fp32 has no exponential: the loss falls back on fp64."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.stack([torch.ones(9, 8), -torch.ones(9, 8)], dim=1).flatten(0, 1).double()
    vectors = F.normalize(ends + 0.3 * torch.randn(18, 8, dtype=torch.float64, generator=generator), dim=-1).float()
    mine = tuple(x.requires_grad_() for x in (vectors, torch.tensor([100.0]), torch.tensor([0.0])))
    theirs = tuple(x.detach().double().requires_grad_() for x in mine)
    found, expected = ours(mine, distinct(9)), table(theirs, distinct(9), "infonce")
    torch.testing.assert_close(found.sum.double(), expected, rtol=1e-5, atol=0)
    assert_same(gradients(found.sum, mine), gradients(expected, theirs), 1e-4)


def test_autocast_changes_nothing():
    plain, cast = leaves(6, torch.float32), leaves(6, torch.float32)
    expected = ours(plain, distinct(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(cast, distinct(6))
    assert torch.equal(found.sum, expected.sum)
    for mine, reference in zip(gradients(found.sum, cast), gradients(expected.sum, plain), strict=True):
        assert torch.equal(mine, reference)


def test_correct_counts_searches_that_find_their_own():
    """Pair 0 finds its own both ways. Texts 1 and 2 are the same vector: a tie is a miss."""
    e = torch.eye(3, dtype=torch.float64)
    vectors = torch.stack([e[0], e[0], e[1], e[1], F.normalize(e[1] + e[2], dim=0), e[1]])
    found = ours((vectors, torch.tensor([5.0]).double(), None), distinct(3))
    # text 0 and image 0 hit; image 1 ties with text 2; text 1 hits; text 2 prefers image 1; image 2 ties
    assert found.correct == 3


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_a_graph_can_be_differentiated_twice_over(loss):
    mine = leaves(23)
    value = ours(mine, distinct(23), loss).sum
    assert_same(gradients(3 * value, mine), [3 * g for g in gradients(value, mine)], 1e-14)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_no_pairs_keep_the_graph(loss):
    mine = leaves(1)
    empty = EmbeddingSlots(
        modality=torch.tensor([IMAGE, IMAGE]),
        item=torch.tensor([0, 1]),
        pair=torch.tensor([0, 1]),
        content=torch.tensor([0, 1]),
    )
    found = ours(mine, empty, loss)
    assert found.sum == 0 and len(found.rows) == len(found.documents) == 0 and found.correct == found.negatives == 0
    assert all((g == 0).all() for g in gradients(found.sum, mine))


def test_slots_are_matched_by_number_and_lone_ones_left_out():
    slots = EmbeddingSlots(
        modality=torch.tensor([TEXT, IMAGE, IMAGE, TEXT, TEXT, AUDIO, VIDEO]),
        item=torch.zeros(7, dtype=torch.int64),
        pair=torch.tensor([1, 0, 1, 7, 0, 7, 1]),
        content=torch.arange(7),
    )
    texts, images = pair_slots(slots, (TEXT, IMAGE))
    assert texts.tolist() == [4, 0] and images.tolist() == [1, 2]
    assert dict(zip(COMBOS, count_pairs(slots).tolist(), strict=True)) == {
        (TEXT, IMAGE): 2,
        (TEXT, AUDIO): 1,
        (TEXT, VIDEO): 1,
        (IMAGE, AUDIO): 0,
        (IMAGE, VIDEO): 1,
        (AUDIO, VIDEO): 0,
    }


class _Largest(TorchDispatchMode):
    """The most cells that any tensor made meanwhile has."""

    cells = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            self.cells = max(self.cells, each.numel() if isinstance(each, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("duplicated", [False, True])
def test_memory_is_linear(monkeypatch, duplicated):
    """No tensor has the size of the table: the largest are the vectors and a tile, with duplicates as well."""
    monkeypatch.setitem(tiles.TILE, "cpu", (16, 32))
    pairs = 200
    slots = slots_of([0] * pairs, list(range(pairs))) if duplicated else distinct(pairs)
    mine = leaves(pairs)
    with _Largest() as largest:
        gradients(ours(mine, slots).sum, mine)
    assert largest.cells <= 2 * pairs * 8 < pairs * pairs
