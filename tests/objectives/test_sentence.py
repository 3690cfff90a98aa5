import torch
import torch.nn.functional as F

from mmpt.objectives.sentence import sentence_loss
from mmpt.types import IGNORE, NOTHING, Segments


def segments(labels: list[int], first: list[int]) -> Segments:
    none = torch.zeros(len(labels), dtype=torch.int64)
    return Segments(document=none, task=none, next_sentence=torch.tensor(labels), pack=none, first=torch.tensor(first))


def test_is_cross_entropy_over_labelled_segments():
    logits = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([1, IGNORE, 0, 0, IGNORE])
    loss = sentence_loss(logits, segments(labels.tolist(), [0, 4, 5, 9, 11]))
    expected = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(loss.sum, expected, rtol=1e-12, atol=0)
    assert loss.positions.tolist() == [0, 2, 3] and not loss.rows.requires_grad
    torch.testing.assert_close(loss.rows.sum(), expected.detach())
    found, theirs = (torch.autograd.grad(total, logits) for total in (loss.sum, expected))
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=0)


def test_no_label_keeps_the_graph():
    logits = torch.randn(2, 2, requires_grad=True)
    loss = sentence_loss(logits, segments([IGNORE, IGNORE], [0, 1]))
    assert loss.sum == 0 and (torch.autograd.grad(loss.sum, logits)[0] == 0).all()


def test_segments_that_begin_on_another_rank_have_no_logits_here():
    logits = torch.randn(2, 2, dtype=torch.float64)
    loss = sentence_loss(logits, segments([1, 0, IGNORE, 1], [NOTHING, 7, NOTHING, 3]))
    assert loss.positions.tolist() == [1, 3]
    torch.testing.assert_close(loss.rows, F.cross_entropy(logits, torch.tensor([0, 1]), reduction="none"))
