import torch
import torch.nn.functional as F

from mmpt.objectives import next_token
from mmpt.types import IGNORE


def case(labels):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(labels), 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, dtype=torch.float64, generator=generator).requires_grad_()
    return hidden, weight, torch.tensor(labels)


def test_chunks_change_neither_sum_nor_gradients(monkeypatch):
    hidden, weight, labels = case([3, IGNORE, 0, 10, 7, IGNORE, 2, 1])
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum").float()
    reference = torch.autograd.grad(
        F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum"), (hidden, weight)
    )
    for chunk in (1, 2, 4, 100):
        monkeypatch.setattr(next_token, "CHUNK", chunk)
        loss = next_token.next_token_loss(hidden, weight, labels)
        torch.testing.assert_close(loss.float(), expected)
        for mine, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), reference, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_to_predict_keeps_the_graph():
    hidden, weight, labels = case([IGNORE, IGNORE])
    loss = next_token.next_token_loss(hidden, weight, labels)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))
