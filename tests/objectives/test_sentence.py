import torch
import torch.nn.functional as F

from mmpt.objectives.sentence import sentence_loss
from mmpt.types import IGNORE


def test_is_cross_entropy_over_labelled_segments():
    logits = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([1, IGNORE, 0, 0, IGNORE])
    loss = sentence_loss(logits, labels)
    expected = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(loss.sum, expected, rtol=1e-12, atol=0)
    assert loss.positions.tolist() == [0, 2, 3] and not loss.rows.requires_grad
    torch.testing.assert_close(loss.rows.sum(), expected.detach())
    found, theirs = (torch.autograd.grad(total, logits) for total in (loss.sum, expected))
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=0)


def test_no_label_keeps_the_graph():
    logits = torch.randn(2, 2, requires_grad=True)
    loss = sentence_loss(logits, torch.tensor([IGNORE, IGNORE]))
    assert loss.sum == 0 and (torch.autograd.grad(loss.sum, logits)[0] == 0).all()
