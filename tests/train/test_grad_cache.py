"""Micro-batches contrasted with one another, against one big batch: every gradient, the scales' and the bias's too.

Over ranks: test_layouts.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from pairs import SHARES, pair_batch
from steps import ALONE, Toy, alter, assert_same_gradients, four_batches, take_step

from mmpt.config import RunConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.combine import global_counts
from mmpt.train.grad_cache import cache_contrast, join_slots
from mmpt.train.step import autocast

WHOLE = tuple(number for share in SHARES for number in share)


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return alter(tiny_config, objectives={"contrastive": {"grad_cache": True, "tower": {"loss": "sigmoid"}}})


def test_is_one_big_batch_in_every_gradient(config: RunConfig):
    figures, expected = take_step(Toy(), [pair_batch(WHOLE)], config, ALONE)
    found, gradients = take_step(Toy(), [pair_batch(share) for share in SHARES], config, ALONE)
    assert {"log_scale.backbone", "log_scale.tower", "logit_bias.tower", "table.weight", "output.weight"} <= expected.keys()
    assert_same_gradients(gradients, expected, 1e-12)
    assert found == pytest.approx(figures, rel=1e-12)
    apart = alter(config, objectives={"contrastive": {"grad_cache": False}})
    _, others = take_step(Toy(), [pair_batch(share) for share in SHARES], apart, ALONE)
    assert (others["log_scale.tower"] - expected["log_scale.tower"]).abs() > 0.01  # fewer negatives: another loss


def test_is_one_big_batch_with_four_modalities(four_config: RunConfig):
    config = alter(
        four_config,
        model={"levels": ("backbone", "tower"), "logit_bias_init": -4.0},
        objectives={"contrastive": {"grad_cache": True, "tower": {"loss": "sigmoid"}}},
    )
    model = MultimodalModel(config.model).initialize(seed=0)
    ((whole,), parts) = (list(four_batches(config, count, 16 // count)) for count in (1, 4))
    figures, expected = take_step(model, [whole], config, ALONE, detailed=True)
    found, gradients = take_step(model, parts, config, ALONE, detailed=True)
    assert_same_gradients(gradients, expected, 1e-5)
    assert found == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_the_second_pass_repeats_the_random_numbers_of_the_first(config: RunConfig):
    """Under dropout both passes see the same embeddings, and what comes after goes on where the first pass ended."""
    model, batches = Toy(), [pair_batch(share) for share in SHARES]
    seen: list[torch.Tensor] = []

    def forward(batch):
        output = Toy.forward(model, replace(batch, tokens=torch.randint(64, batch.tokens.shape)))
        seen.append(output.hidden.detach())
        return output

    model.forward = forward
    take_step(model, batches, config, ALONE)
    first, second = seen[: len(batches)], seen[len(batches) :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][:1], first[1][:1])


def test_one_micro_batch_or_nothing_to_contrast_takes_one_pass(config: RunConfig):
    passes = []

    class Counting(Toy):
        def forward(self, batch):
            passes.append(batch)
            return super().forward(batch)

    off = alter(config, objectives={"contrastive": {"backbone": {"weight": 0.0}, "tower": {"weight": 0.0}}})
    for batches, settings, expected in (
        ([pair_batch(WHOLE)], config, 1),
        ([pair_batch((3,)), pair_batch((3,))], config, 2),
        ([pair_batch((0, 1)), pair_batch((2, 4))], off, 2),
        ([pair_batch((0, 1)), pair_batch((2, 4))], config, 4),
    ):
        passes.clear()
        take_step(Counting(), batches, settings, ALONE)
        assert len(passes) == expected


def test_documents_are_numbered_on(config: RunConfig):
    batches = [pair_batch((0, 3)), pair_batch((4,))]
    assert join_slots(batches).pair.tolist() == [0, 0, 2, 2]
    precision = partial(autocast, config, ALONE.device)
    cache = cache_contrast(Toy(), batches, config.objectives.contrastive, global_counts(batches), None, precision)
    assert cache.losses["contrastive/backbone/text_image"].documents.tolist() == [0, 2]
