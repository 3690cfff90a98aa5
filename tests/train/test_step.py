"""The schedule, and what accumulation and counts do to a step."""

import math

import pytest
import torch

from mmpt.config import OptimizerConfig, RunConfig
from mmpt.data.loader import Loader
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.combine import combine, global_counts, loss_terms
from mmpt.parallel.mesh import join_world
from mmpt.train.optimizer import learning_rate, make_optimizer
from mmpt.train.step import train_step
from mmpt.types import UserError


def test_the_rate_rises_and_falls_as_torchs_schedules():
    """Against torch's own LinearLR, then CosineAnnealingLR."""
    config = OptimizerConfig(lr=0.3, warmup_steps=4, final_fraction=0.1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.lr)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=0.03)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, fall], milestones=[4])
    for step in range(20):
        assert learning_rate(config, step, steps=20) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert learning_rate(config, 20, steps=20) == pytest.approx(0.03)


def test_norms_and_the_scale_do_not_decay(tiny_config: RunConfig):
    model = MultimodalModel(tiny_config.model)
    decayed, kept = make_optimizer(model, tiny_config.optimizer).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    assert {names[id(p)] for p in kept["params"]} == {
        n for n in names.values() if n.endswith(("norm.weight", "bias", "log_scale"))
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_next_token_gradients_do_not_depend_on_the_number_of_micro_batches(tiny_config: RunConfig):
    """One global count for the step: batches one by one give the sum's gradient. (Contrast stays within a micro-batch.)"""
    batches = [batch for batch, _ in zip(Loader(tiny_config, rank=0, world_size=1), range(2), strict=False)]
    counts = global_counts(batches)
    assert counts["next_token"] == sum(int((b.labels != -100).sum()) for b in batches)

    def gradients(groups) -> list[torch.Tensor]:
        model = MultimodalModel(tiny_config.model).initialize(seed=0)
        for group in groups:
            total = sum(loss_terms(tiny_config.objectives, model(b), b, counts)[0]["next_token"].value for b in group)
            total.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for apart, together in zip(gradients([[b] for b in batches]), gradients([batches]), strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-7)


def test_combine_weighs_sums_over_counts(tiny_config: RunConfig):
    batch = next(iter(Loader(tiny_config, rank=0, world_size=1)))
    model = MultimodalModel(tiny_config.model).initialize(seed=0)
    terms, _ = loss_terms(tiny_config.objectives, model(batch), batch, global_counts([batch]))
    by_hand = terms["next_token"].sum / terms["next_token"].count + 0.5 * terms["contrastive"].sum / terms["contrastive"].count
    torch.testing.assert_close(combine(terms), by_hand)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config: RunConfig):
    batch = next(iter(Loader(tiny_config, rank=0, world_size=1)))
    model = MultimodalModel(tiny_config.model).initialize(seed=0)
    with torch.no_grad():
        model.embed_tokens.weight[5] = math.inf
    with join_world() as world, pytest.raises(UserError, match=r"step 3: .*not finite; lower optimizer.lr"):
        train_step(model, make_optimizer(model, tiny_config.optimizer), [batch], 3, tiny_config, world)
