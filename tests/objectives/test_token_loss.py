"""Chunked cross-entropy against torch's over all logits, in fp64: value, rows and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from token_batches import label_batch, leaves, made_output
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.objectives import chunked
from mmpt.objectives.chunked import chunked_loss
from mmpt.objectives.tokens import labelled, token_loss
from mmpt.types import IGNORE, MASKED, NEXT_TOKEN, SPAN

SEGMENTS = [[3, IGNORE, 0], [10, 7, IGNORE], [2, 1]]


def reference(output, labels, z_loss):
    logits = F.linear(output.output_hidden, output.output_weight, output.output_bias)
    rows = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return (rows + z_loss * logits.logsumexp(1).square())[labels != IGNORE]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
def test_is_cross_entropy_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch, bias: bool, z_loss: float):
    batch, output = label_batch(SEGMENTS, padding=2), made_output(10, bias=bias)
    rows = reference(output, batch.labels, z_loss)
    expected = torch.autograd.grad(3 * rows.sum(), leaves(output))
    for chunk in (1, 2, 4, 100):
        monkeypatch.setattr(chunked, "LOGITS", 11 * chunk)
        loss = token_loss(output, batch, z_loss=z_loss)
        torch.testing.assert_close(loss.sum, rows.sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.rows, rows.detach(), rtol=1e-12, atol=0)
        assert not loss.rows.requires_grad
        for _ in range(2):  # twice: a logged step asks for the gradients of each objective before those of the step
            for mine, theirs in zip(torch.autograd.grad(3 * loss.sum, leaves(output), retain_graph=True), expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_only_what_is_trained_has_a_gradient():
    batch, output = label_batch(SEGMENTS), made_output(8, bias=True)
    expected = torch.autograd.grad(reference(output, batch.labels, 0.0).sum(), output.output_bias)
    output.output_weight.requires_grad_(False)
    output.hidden.requires_grad_(False)
    found = torch.autograd.grad(token_loss(output, batch).sum, output.output_bias)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    output.output_bias.requires_grad_(False)
    assert not token_loss(output, batch).sum.requires_grad


def test_tasks_share_out_the_labels():
    batch, output = label_batch(SEGMENTS, tasks=[SPAN, NEXT_TOKEN, MASKED], padding=1), made_output(9)
    assert [labelled(batch, task).tolist() for task in (NEXT_TOKEN, MASKED, SPAN)] == [[3, 4], [6, 7], [0, 2]]
    rows = reference(output, batch.labels, 0.0).detach()
    for task, own in ((NEXT_TOKEN, [2, 3]), (MASKED, [4, 5]), (SPAN, [0, 1])):
        loss = token_loss(output, batch, task)
        torch.testing.assert_close(loss.rows, rows[own])
        assert torch.equal(loss.positions, labelled(batch, task))


def test_nothing_to_predict_keeps_the_graph():
    batch, output = label_batch([[IGNORE, IGNORE]]), made_output(2, bias=True)
    loss = token_loss(output, batch)
    assert loss.sum == 0 and not len(loss.rows)
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum, leaves(output)))


def test_under_autocast_the_products_alone_are_rounded():
    """As torch's own under autocast, within what bf16 products leave; the loss and its sum are fp32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).requires_grad_()
    weight = (torch.randn(100, 32, generator=generator) / 6).requires_grad_()
    output = made_output(64)
    output = type(output)(**{**vars(output), "hidden": hidden, "output_hidden": hidden, "output_weight": weight})
    batch = label_batch([torch.randint(100, (64,), generator=generator).tolist()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = token_loss(output, batch).sum
        theirs = F.cross_entropy(F.linear(hidden, weight).float(), batch.labels, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "LOGITS", 1100)
    batch, output = label_batch([[1] * 100]), made_output(100, vocabulary=110)
    with Largest() as largest:
        token_loss(output, batch, z_loss=0.1).sum.backward()
    assert largest.elements == 1100  # of 11,000 logits


def test_rows_are_not_differentiated():
    hidden, weight = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2)
    total, rows = chunked_loss(
        hidden, weight, None, lambda logits, part, wanted: (logits[:, 0], torch.eye(5)[:1].expand_as(logits))
    )
    assert not rows.requires_grad
    (found,) = torch.autograd.grad(total, hidden)
    torch.testing.assert_close(found, weight[:1].expand(3, 2))
