"""Counts of a step, the terms of all objectives by name, and what is left out."""

import pytest
import torch
import torch.nn.functional as F
from token_batches import label_batch, made_output

from mmpt.config import ContrastiveConfig, CrossEntropyConfig, DistillationConfig, LevelConfig, NextTokenConfig, ObjectivesConfig
from mmpt.objectives.combine import combine, contrast_losses, contrast_terms, contrasted, global_counts, local_terms
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    MASKED,
    NEXT_TOKEN,
    NOTHING,
    SPAN,
    TEXT,
    Embeddings,
    EmbeddingSlots,
    Routing,
)

SLOTS = EmbeddingSlots(  # documents 0 and 1: picture and text; 1: sound as well; 2: a text alone
    modality=torch.tensor([IMAGE, TEXT, TEXT, IMAGE, AUDIO, TEXT]),
    item=torch.tensor([0, NOTHING, NOTHING, 1, 0, NOTHING]),
    pair=torch.tensor([0, 0, 1, 1, 1, 2]),
    content=torch.arange(6),
)


def batch():
    segments = [[3, IGNORE, 0], [10, 7, IGNORE, 2], [2, 1], [5]]
    tasks, following = [NEXT_TOKEN, MASKED, SPAN, NEXT_TOKEN], [IGNORE, 1, IGNORE, IGNORE]
    return label_batch(segments, tasks=tasks, next_sentence=following, documents=[0, 1, 2, 0], slots=SLOTS, packs=2, padding=2)


def embeddings(seed: int, bias: bool = False) -> Embeddings:
    raw = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    scale = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True) if bias else None
    return Embeddings(vectors=F.normalize(raw, dim=-1), norms=raw.detach().norm(dim=-1), scale=scale, bias=shift)


def output(**others):
    made = {
        "sentence_logits": torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
        "embeddings": {"backbone": embeddings(1), "tower": embeddings(2, bias=True)},
        "routing": (Routing(load=torch.tensor([4, 8]), balance=torch.tensor([1.5, 1.25], dtype=torch.float64)),) * 2,
    }
    return made_output(12, bias=True, **(made | others))


CONFIG = ObjectivesConfig(
    next_token=NextTokenConfig(weight=2.0, z_loss=0.1),
    masked=CrossEntropyConfig(weight=0.5),
    next_sentence=CrossEntropyConfig(weight=0.25),
    span=CrossEntropyConfig(weight=3.0),
    balance=CrossEntropyConfig(weight=0.01),
    contrastive=ContrastiveConfig(tower=LevelConfig(weight=0.75, loss="sigmoid")),
    distillation=DistillationConfig(teacher="runs/teacher", weight=0.125),
)


def test_counts_are_of_all_micro_batches():
    expected = {"next_token": 6, "masked": 6, "span": 4, "next_sentence": 2, "packs": 4, "documents": 6}
    expected |= {"text_image": 4, "text_audio": 2, "image_audio": 2}
    found = global_counts([batch(), batch()])
    assert {name: count for name, count in found.items() if count} == expected
    assert len(found) == 12


def test_terms_by_hand():
    """Every term against a few lines of torch; rows add up to the sum, and belong to the right documents."""
    counts, out, teacher = global_counts([batch(), batch()]), output(), made_output(12, bias=True, seed=9)
    terms = local_terms(CONFIG, out, batch(), counts, teacher)
    logits = F.linear(out.hidden, out.output_weight, out.output_bias)
    taught = F.linear(teacher.hidden, teacher.output_weight, teacher.output_bias)
    rows = F.cross_entropy(logits, batch().labels, reduction="none", ignore_index=IGNORE)
    z = 0.1 * logits.logsumexp(1).square()
    divergence = F.kl_div(logits.log_softmax(1), taught.log_softmax(1), log_target=True, reduction="none").sum(1)
    by_hand = {  # positions, their losses, count, weight, documents
        "next_token": ((rows + z)[[0, 2, 9]], 6, 2.0, [0, 0, 0]),
        "masked": (rows[[3, 4, 6]], 6, 0.5, [1, 1, 1]),
        "span": (rows[[7, 8]], 4, 3.0, [2, 2]),
        "next_sentence": (F.cross_entropy(out.sentence_logits[1:2], torch.tensor([1]), reduction="none"), 2, 0.25, [1]),
        "distillation": (divergence[[0, 2, 9]], 6, 0.125, [0, 0, 0]),
        "balance": (torch.tensor([3.0, 2.5], dtype=torch.float64), 4, 0.01, [NOTHING, NOTHING]),
    }
    assert terms.keys() == by_hand.keys()
    for name, (expected, count, weight, documents) in by_hand.items():
        term = terms[name]
        torch.testing.assert_close(term.rows, expected.detach(), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(term.sum.detach(), term.rows.sum())
        assert (term.count, term.weight, term.documents.tolist()) == (count, weight, documents), name
    total = sum(weight * expected.sum() / count for expected, count, weight, _ in by_hand.values())
    ours = sum(combine(terms).values())
    torch.testing.assert_close(ours, total)
    inputs = (out.hidden, out.output_weight, out.output_bias)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_contrast_is_named_by_level_and_pair():
    counts, out = global_counts([batch()]), output()
    losses = contrast_losses(CONFIG.contrastive, out.embeddings, SLOTS, counts)
    terms = contrast_terms(CONFIG.contrastive, losses, counts)
    pairs = {"text_image": 2, "text_audio": 1, "image_audio": 1}
    weights = {"backbone": 0.5, "tower": 0.75}
    expected = {f"contrastive/{level}/{pair}": (n, w) for level, w in weights.items() for pair, n in pairs.items()}
    assert {name: (term.count, term.weight) for name, term in terms.items()} == expected
    assert terms["contrastive/tower/text_image"].documents.tolist() == [0, 1]
    for term in terms.values():
        torch.testing.assert_close(term.rows.sum(), term.sum.detach())
    combined = combine(terms)
    assert combined.keys() == {"contrastive"}
    torch.testing.assert_close(combined["contrastive"], sum(term.weight * term.sum / term.count for term in terms.values()))


@pytest.mark.parametrize("name", ["next_token", "masked", "span", "next_sentence", "distillation", "balance"])
def test_a_weight_of_zero_leaves_a_loss_out(name: str):
    off = CONFIG.model_copy(update={name: getattr(CONFIG, name).model_copy(update={"weight": 0.0})})
    counts, teacher = global_counts([batch()]), made_output(12, bias=True, seed=9)
    terms = local_terms(off, output(), batch(), counts, teacher)
    assert terms.keys() == {"next_token", "masked", "span", "next_sentence", "distillation", "balance"} - {name}


def test_what_no_rank_has_is_left_out_and_what_another_rank_has_is_not():
    empty = label_batch([[IGNORE]], slots=SLOTS)
    own = global_counts([empty])
    assert local_terms(CONFIG, output(routing=()), empty, own, None) == {}
    elsewhere = {**own, "span": 3}
    terms = local_terms(CONFIG, output(routing=()), empty, elsewhere, None)
    assert terms.keys() == {"span"} and terms["span"].sum.requires_grad
    assert combine({}) == {}
    none = {**own, "text_image": 0, "text_audio": 0}
    assert contrasted(CONFIG.contrastive, ("backbone", "tower"), none) == [
        ("backbone", (IMAGE, AUDIO)),
        ("tower", (IMAGE, AUDIO)),
    ]
    no_tower = CONFIG.contrastive.model_copy(update={"tower": LevelConfig(weight=0.0)})
    assert {level for level, _ in contrasted(no_tower, ("backbone", "tower"), own)} == {"backbone"}


def test_pairs_of_sentences_without_a_classifier_are_not_asked():
    counts = global_counts([batch()])
    assert "next_sentence" not in local_terms(CONFIG, output(sentence_logits=None), batch(), counts, made_output(12, bias=True))
