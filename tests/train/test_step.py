"""The schedule, what accumulation and counts do to a step, and what a step says of itself."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from steps import ALONE, Toy, alter, assert_same_gradients, four_batches, take_step
from token_batches import label_batch

from mmpt.config import OptimizerConfig, RunConfig
from mmpt.model.multimodal import MultimodalModel
from mmpt.objectives.combine import combine, contrast_losses, contrast_terms, global_counts, local_terms
from mmpt.train.figures import Origins, Tally, gain_gradients, source_names
from mmpt.train.optimizer import learning_rate, make_optimizer
from mmpt.train.step import train_step
from mmpt.types import AUDIO, IGNORE, IMAGE, KINDS, TEXT, PackedBatch, UserError


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


def test_what_has_one_axis_does_not_decay_and_what_is_frozen_is_left_alone(tiny_config: RunConfig):
    frozen = {"image": {**tiny_config.model.image.model_dump(), "frozen": True, "class_token": True, "pool": "class"}}
    experts = {"transformer": {**tiny_config.model.transformer.model_dump(), "experts": {"count": 2, "top_k": 1}}}
    model = MultimodalModel(alter(tiny_config, model={**frozen, **experts, "levels": ("backbone", "tower")}).model)
    decayed, kept = make_optimizer(model, tiny_config.optimizer).param_groups
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    assert {names[id(p)] for p in kept["params"]} == {n for n in names.values() if "norm" in n or "bias" in n or "log_scale" in n}
    assert any(names[id(p)].endswith("ffn.gate_up") and p.ndim == 3 for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert not any(name.startswith("image_encoder.transformer") for name in names.values())


@pytest.fixture
def both_levels(four_config: RunConfig) -> RunConfig:
    """Four modalities, both levels, experts, z-loss."""
    experts = {"experts": {"count": 4, "top_k": 2}}
    return alter(
        four_config,
        model={"levels": ("backbone", "tower"), "logit_bias_init": -4.0, "transformer": experts},
        objectives={"next_token": {"weight": 0.7, "z_loss": 0.01}, "contrastive": {"tower": {"loss": "sigmoid"}}},
    )


def model_of(config: RunConfig) -> MultimodalModel:
    return MultimodalModel(config.model).initialize(seed=0)


def terms_of(config: RunConfig, model: MultimodalModel, batch: PackedBatch, counts: dict[str, int]):
    output = model(batch)
    pairs = contrast_losses(config.objectives.contrastive, output.embeddings, batch.slots, counts)
    terms = {
        **local_terms(config.objectives, output, batch, counts),
        **contrast_terms(config.objectives.contrastive, pairs, counts),
    }
    return output, terms


def test_gradients_but_contrasts_do_not_depend_on_the_number_of_micro_batches(both_levels: RunConfig):
    """One global count for the step. (Contrast stays within a micro-batch, but for grad_cache.)"""
    config = alter(both_levels, objectives={"contrastive": {"backbone": {"weight": 0.0}, "tower": {"weight": 0.0}}})
    model = model_of(config)
    (whole,), parts = four_batches(config, 1, 8), four_batches(config, 4, 2)
    assert global_counts([whole]) == global_counts(parts)
    figures, expected = take_step(model, [whole], config, ALONE, detailed=True)
    found, gradients = take_step(model, parts, config, ALONE, detailed=True)
    assert_same_gradients(gradients, expected, 1e-5)
    assert found == pytest.approx(figures, rel=1e-5, abs=1e-7)


def test_parts_add_up_to_the_loss(both_levels: RunConfig):
    config, batches = both_levels, four_batches(both_levels, 2, 8)
    model = model_of(config)
    figures, _ = take_step(model, batches, config, ALONE, detailed=True)
    counts = global_counts(batches)
    total = sum(sum(combine(terms_of(config, model, batch, counts)[1]).values()).item() for batch in batches)
    assert figures["loss"] == pytest.approx(total, rel=1e-6)
    names = {kind: {n for n in figures if n.startswith(f"loss/{kind}/")} for kind in ("source", "modality")}
    objectives = {n for n in figures if n.startswith("loss/")} - names["source"] - names["modality"]
    pairs = {"text_image", "text_audio", "text_video", "image_audio", "image_video", "audio_video"}
    assert names["source"] == {"loss/source/four", "loss/source/tiny", "loss/source/none"}
    assert names["modality"] == {f"loss/modality/{kind}" for kind in ({*KINDS} | pairs)}
    levels = {f"loss/contrastive/{level}/{pair}" for level in ("backbone", "tower") for pair in pairs}
    assert objectives == {"loss/next_token", "loss/balance"} | levels
    for parts in (*names.values(), objectives):
        assert sum(figures[name] for name in parts) == pytest.approx(figures["loss"], rel=1e-12)
    quick, _ = take_step(model, batches, config, ALONE)
    assert quick == {name: figures[name] for name in ({"loss", "documents", "grad_norm", "lr"} | objectives)}


def test_parts_are_those_of_their_documents():
    """Next-token loss by source and by what documents show, summed by hand document by document."""
    batch = label_batch([[1, 2], [3], [4, IGNORE], [5]], sources=["b", "a", "none", "b"], documents=[0, 1, 2, 3])
    batch = replace(batch, kinds=torch.tensor([AUDIO, IMAGE, IMAGE, TEXT]))
    sources = source_names([batch], None)
    origins = Origins.of(batch, sources)
    assert sources == ["a", "b", "none"]
    assert origins.source.tolist() == [1, 0, 2, 1, 2]
    assert [KINDS[kind] for kind in origins.kind] == ["audio", "image", "image", "text", "none"]
    joined = Origins.join([origins, origins])
    assert joined.source.tolist() == [1, 0, 2, 1] * 2 + [2] and joined.kind[-1] == origins.kind[-1] and len(joined.kind) == 9


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_shared_layers_gradients_are_autograds(both_levels: RunConfig, norm: str, placement: str):
    """Of each objective by the gain of the last norm, against autograd on the parameter; and the cosine of two of them."""
    config = alter(both_levels, model={"transformer": {"norm": norm, "norm_placement": placement, "experts": None}})
    model, (batch,) = model_of(config), four_batches(config, 1, 8)
    last = model.transformer.norm if placement == "pre" else model.transformer.blocks[-1].ffn_norm
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    output, terms = terms_of(config, model, batch, global_counts([batch]))
    objectives = combine(terms)
    found = gain_gradients(model, output, objectives)
    expected = {name: torch.autograd.grad(loss, last.weight, retain_graph=True)[0].double() for name, loss in objectives.items()}
    assert found.keys() == {"next_token", "contrastive"}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    figures, _ = take_step(model, [batch], config, ALONE, detailed=True)
    assert figures["gradient/next_token"] == pytest.approx(float(expected["next_token"].norm()), rel=1e-5)
    cosine = F.cosine_similarity(expected["next_token"], expected["contrastive"], dim=0)
    assert figures["gradient/cosine"] == pytest.approx(float(cosine), abs=1e-5)


def test_what_does_not_look_at_the_hidden_states_has_no_gradient_there(both_levels: RunConfig):
    model, (batch,) = model_of(both_levels), four_batches(both_levels, 1, 8)
    output, _ = terms_of(both_levels, model, batch, global_counts([batch]))
    found = gain_gradients(model, output, {"tower": output.embeddings["tower"].scale.sum(), "constant": torch.ones(())})
    assert all((gradient == 0).all() for gradient in found.values()) and len(found) == 2


def test_looking_closer_changes_no_gradient(both_levels: RunConfig):
    model, batches = model_of(both_levels), four_batches(both_levels, 2, 4)
    _, plain = take_step(model, batches, both_levels, ALONE)
    _, detailed = take_step(model, batches, both_levels, ALONE, detailed=True)
    assert plain.keys() == detailed.keys() and all(torch.equal(plain[name], detailed[name]) for name in plain)


def test_experts_are_watched_and_biases_follow_their_load(both_levels: RunConfig):
    experts = {"transformer": {"experts": {"count": 4, "top_k": 2, "balance": "bias"}}}
    config = alter(both_levels, model=experts)
    model, batches = model_of(config), four_batches(config, 2, 4)
    loads = sum(torch.stack([layer.load for layer in model(batch).routing]) for batch in batches)
    assert not any(block.ffn.bias.any() for block in model.transformer.blocks)
    figures, _ = take_step(model, batches, config, ALONE, detailed=True)
    imbalance = loads.amax(1) / loads.double().mean(1)
    assert figures["experts/imbalance"] == pytest.approx(float(imbalance.mean()))
    assert figures["experts/imbalance_max"] == pytest.approx(float(imbalance.max()))
    assert "loss/balance" not in figures
    for block, load in zip(model.transformer.blocks, loads, strict=True):
        rate = config.model.transformer.experts.bias_rate
        torch.testing.assert_close(block.ffn.bias, rate * (load.double().mean() - load).sign().to(block.ffn.bias.dtype))


def test_a_scale_at_its_bound_is_told_and_held(both_levels: RunConfig):
    config = alter(both_levels, optimizer={"lr": 0.1, "warmup_steps": 0})
    model, batches = model_of(config), four_batches(config, 1, 4)
    figures, _ = take_step(model, batches, config, ALONE, detailed=True)
    assert figures["contrast/backbone/scale"] == pytest.approx(14.3) and figures["contrast/backbone/clamped"] == 0
    assert figures["contrast/tower/bias"] == -4.0 and "contrast/backbone/bias" not in figures
    with torch.no_grad():
        model.log_scale["tower"].fill_(9.0)
        model.log_scale["backbone"].fill_(-1.0)
    take_step(model, batches, config, ALONE)
    assert model.log_scale["tower"].item() == pytest.approx(math.log(100.0))
    figures, _ = take_step(model, batches, config, ALONE, detailed=True)
    assert figures["contrast/tower/clamped"] == 1 and figures["contrast/backbone/clamped"] == 1
    assert figures["contrast/tower/scale"] == pytest.approx(100) and figures["contrast/backbone/scale"] == 1


def test_a_student_learns_from_its_teacher(tiny_config: RunConfig):
    """The divergence is logged beside the loss on the data, and its gradient reaches the student alone."""
    distillation = {"distillation": {"teacher": "runs/teacher", "weight": 0.5}}
    config = alter(tiny_config, objectives=distillation)
    model, teacher, batches = model_of(config), MultimodalModel(config.model).initialize(seed=1), four_batches(config, 2, 4)
    teacher.requires_grad_(False)
    figures, gradients = take_step(model, batches, config, ALONE, teacher=teacher)
    _, without = take_step(model, batches, tiny_config, ALONE)
    assert figures["loss/distillation"] > 0
    assert not torch.equal(gradients["transformer.norm.weight"], without["transformer.norm.weight"])
    itself, _ = take_step(model, batches, config, ALONE, teacher=model)
    assert itself["loss/distillation"] == pytest.approx(0.0, abs=1e-6)


def test_sums_are_of_all_that_was_added():
    tally = Tally()
    for _ in range(3):
        tally.add("a", torch.tensor([[1, 2], [3, 4]]))
        tally.add("b", torch.tensor(0.1))
    sums = tally.over_ranks(None)
    assert sums["a"].tolist() == [[3, 6], [9, 12]] and sums["b"] == pytest.approx(0.3) and Tally().over_ranks(None) == {}


def test_a_step_without_anything_to_learn_leaves_the_weights(tiny_config: RunConfig):
    batch = label_batch([[IGNORE, IGNORE]])
    figures, gradients = take_step(Toy(), [batch], tiny_config, ALONE)
    assert figures["loss"] == 0 and gradients == {}


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config: RunConfig):
    (batch,), model = four_batches(tiny_config, 1, 4), model_of(tiny_config)
    with torch.no_grad():
        model.embed_tokens.weight[5] = math.inf
    optimizer = make_optimizer(model, tiny_config.optimizer)
    with pytest.raises(UserError, match=r"step 3: .*not finite; lower optimizer.lr"):
        train_step(model, optimizer, [batch], 3, tiny_config, ALONE, detailed=False)
