"""The divergence from a teacher against torch's kl_div in fp64; and its estimate, right on average."""

import pytest
import torch
import torch.nn.functional as F
from token_batches import label_batch, leaves, made_output

from mmpt.config import DistillationConfig
from mmpt.objectives import chunked, distillation
from mmpt.objectives.distillation import distillation_loss, draw
from mmpt.types import IGNORE, MASKED, NEXT_TOKEN

SEGMENTS = [[3, IGNORE, 0], [10, 7, IGNORE], [2, 1]]


def config(samples: int = 0, temperature: float = 1.0) -> DistillationConfig:
    return DistillationConfig(teacher="runs/teacher", samples=samples, temperature=temperature)


def logits_of(output):
    return F.linear(output.output_hidden, output.output_weight, output.output_bias)


def full(output, teacher, positions, t: float) -> torch.Tensor:
    """Row by row: t^2 * KL(teacher || student), by torch."""
    log_p, log_q = (F.log_softmax(logits_of(x)[positions] / t, 1) for x in (teacher, output))
    return t**2 * F.kl_div(log_q, log_p.detach(), log_target=True, reduction="none").sum(1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_divergence_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch, temperature: float, bias: bool):
    batch = label_batch(SEGMENTS, tasks=[NEXT_TOKEN, MASKED, NEXT_TOKEN], padding=2)
    output, teacher = made_output(10, bias=bias), made_output(10, dim=4, bias=bias, seed=1)
    rows = full(output, teacher, [0, 2, 6, 7], temperature)
    expected = torch.autograd.grad(rows.sum(), leaves(output))
    for chunk in (1, 3, 100):
        monkeypatch.setattr(chunked, "LOGITS", 11 * chunk)
        loss = distillation_loss(output, teacher, batch, config(temperature=temperature))
        assert loss.positions.tolist() == [0, 2, 6, 7]
        torch.testing.assert_close(loss.rows, rows.detach(), rtol=1e-10, atol=1e-14)
        for mine, theirs in zip(torch.autograd.grad(loss.sum, leaves(output)), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    batch, output = label_batch(SEGMENTS), made_output(8)
    loss = distillation_loss(output, output, batch, config())
    assert loss.sum.abs() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss.sum, leaves(output)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_estimate_is_exact_in_expectation(monkeypatch: pytest.MonkeyPatch, temperature: float):
    """One sample at one position, each of five tokens in turn, weighed by the teacher's probability of it."""
    batch = label_batch([[1]])
    output, teacher = made_output(1, vocabulary=5, bias=True), made_output(1, vocabulary=5, seed=1)
    p = (logits_of(teacher)[0] / temperature).softmax(0).detach()
    value, gradients = 0.0, [torch.zeros_like(leaf) for leaf in leaves(output)]
    for token in range(5):
        monkeypatch.setattr(distillation, "draw", lambda log_p, chances, token=token: torch.tensor([[token]]))
        loss = distillation_loss(output, teacher, batch, config(samples=1, temperature=temperature))
        value = value + p[token] * loss.sum.detach()
        for total, gradient in zip(gradients, torch.autograd.grad(loss.sum, leaves(output)), strict=True):
            total += p[token] * gradient
    rows = full(output, teacher, [0], temperature)
    torch.testing.assert_close(value, rows.sum().detach(), rtol=1e-10, atol=0)
    for mine, theirs in zip(gradients, torch.autograd.grad(rows.sum(), leaves(output)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_many_samples_come_near_the_divergence():
    """The distance falls with the root of their number: 40,000 leave less than 3% of it, and their gradients point alike."""
    batch, output, teacher = label_batch(SEGMENTS), made_output(8), made_output(8, seed=1)
    rows = full(output, teacher, [0, 2, 3, 4, 6, 7], 1.0)
    loss = distillation_loss(output, teacher, batch, config(samples=40_000))
    torch.testing.assert_close(loss.rows, rows.detach(), rtol=0.03, atol=0.03)
    for mine, theirs in zip(
        torch.autograd.grad(loss.sum, leaves(output)), torch.autograd.grad(rows.sum(), leaves(output)), strict=True
    ):
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_draws_are_where_the_cumulative_sum_passes():
    log_p = torch.tensor([[0.25, 0.0, 0.5, 0.25], [0.0, 0.0, 0.0, 1.0]]).log()
    chances = torch.tensor([[0.0, 0.2, 0.25, 0.7, 0.99], [0.0, 0.1, 0.5, 0.9, 0.99]], dtype=torch.float64)
    assert draw(log_p, chances).tolist() == [[0, 0, 2, 2, 3], [3, 3, 3, 3, 3]]


def test_draws_belong_to_the_pack_on_whichever_rank_it_is():
    """Two packs of one batch, against the second alone, and against the same batch again."""
    segments = [[1, 2], [3, 4]]
    both, output, teacher = label_batch(segments, packs=2), made_output(4), made_output(4, seed=1)
    second = label_batch([[3, 4]])
    second = type(second)(**{**vars(second), "provenance": both.provenance[1:]})
    half = [type(x)(**{**vars(x), "hidden": x.hidden[2:], "output_hidden": x.hidden[2:]}) for x in (output, teacher)]
    first, again = (distillation_loss(output, teacher, both, config(samples=3)).rows for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(distillation_loss(*half, second, config(samples=3)).rows, first[2:])


def test_a_batch_of_padding_alone():
    batch, output = label_batch([], padding=4), made_output(4)
    loss = distillation_loss(output, made_output(4, seed=1), batch, config(samples=2))
    assert loss.sum == 0 and all((g == 0).all() for g in torch.autograd.grad(loss.sum, leaves(output)))
