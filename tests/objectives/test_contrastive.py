"""InfoNCE against open_clip's ClipLoss on one process: value and every gradient; and against itself over two ranks."""

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from mmpt.objectives.contrastive import contrastive_loss, duplicates, pair_slots
from mmpt.types import IMAGE, TEXT, EmbeddingSlots


def slots_for(pairs: int, image_content=None, text_content=None) -> EmbeddingSlots:
    """Slots as packing makes them: picture and text of each pair, one after the other."""
    numbers = torch.arange(pairs)
    return EmbeddingSlots(
        modality=torch.tensor([IMAGE, TEXT] * pairs),
        pair=numbers.repeat_interleave(2),
        content=torch.stack(
            [
                torch.tensor(image_content) if image_content else numbers,
                torch.tensor(text_content) if text_content else numbers + 1000,
            ],
            dim=1,
        ).flatten(),
    )


def case(pairs: int):
    generator = torch.Generator().manual_seed(pairs)
    raw = torch.randn(2 * pairs, 5, dtype=torch.float64, generator=generator).requires_grad_()
    log_scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    return raw, log_scale


def test_is_clip_loss_without_duplicates():
    raw, log_scale = case(6)
    embeddings = F.normalize(raw, dim=-1)
    ours, report = contrastive_loss(embeddings, slots_for(6), log_scale.exp())
    theirs = ClipLoss()(embeddings[0::2], embeddings[1::2], log_scale.exp())
    torch.testing.assert_close(ours / 6, theirs, rtol=1e-10, atol=0)
    for mine, reference in zip(
        torch.autograd.grad(ours / 6, (raw, log_scale), retain_graph=True),
        torch.autograd.grad(theirs, (raw, log_scale)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)
    assert report.negatives == 30


def test_duplicates_are_no_negatives():
    """Pairs 0 and 2 share a text, 1 and 2 a picture: by hand, with the shared columns left out."""
    raw, log_scale = case(3)
    embeddings = F.normalize(raw, dim=-1).detach()
    loss, report = contrastive_loss(embeddings, slots_for(3, [0, 1, 1], [8, 9, 8]), log_scale.exp())
    images, texts, scale = embeddings[0::2], embeddings[1::2], log_scale.exp()
    kept = [[0, 1], [0, 1], [2]]
    expected = 0.0
    for i, columns in enumerate(kept):
        for rows, others in ((images, texts), (texts, images)):
            expected -= 0.5 * torch.log_softmax(scale * (others[columns] @ rows[i]), 0)[columns.index(i)]
    torch.testing.assert_close(loss, expected.squeeze())
    assert report.negatives == 2


def test_cosines_keep_their_precision_under_autocast():
    raw, log_scale = case(6)
    embeddings = F.normalize(raw, dim=-1).detach().float()
    plain, _ = contrastive_loss(embeddings, slots_for(6), log_scale.exp().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = contrastive_loss(embeddings, slots_for(6), log_scale.exp().float())
    assert torch.equal(plain, under_autocast)


def test_duplicates_on_literal_numbers():
    contents = torch.tensor([[0, 8], [1, 9], [1, 8]])
    assert duplicates(contents, slice(1, 3)).tolist() == [[False, False, True], [True, True, False]]


def test_pairs_are_matched_by_number_and_lone_slots_left_out():
    slots = EmbeddingSlots(
        modality=torch.tensor([TEXT, IMAGE, IMAGE, TEXT, TEXT]),
        pair=torch.tensor([1, 0, 1, 7, 0]),
        content=torch.arange(5),
    )
    images, texts = pair_slots(slots)
    assert images.tolist() == [1, 2] and texts.tolist() == [4, 0]


def test_no_pairs_keeps_the_graph():
    raw, log_scale = case(1)
    empty = EmbeddingSlots(modality=torch.tensor([IMAGE, IMAGE]), pair=torch.tensor([0, 1]), content=torch.tensor([0, 1]))
    loss, _ = contrastive_loss(F.normalize(raw, dim=-1), empty, log_scale.exp())
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (raw, log_scale)))
