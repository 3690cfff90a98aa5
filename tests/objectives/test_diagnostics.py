"""Figures of embeddings against their definitions, and on vectors whose figures are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmpt.objectives import diagnostics
from mmpt.objectives.diagnostics import contrastive_figures
from mmpt.types import IMAGE, NOTHING, TEXT, Embeddings, EmbeddingSlots


def figures(texts: torch.Tensor, images: torch.Tensor, text_norms=None, image_norms=None) -> dict[str, float]:
    """Those of pairs (texts[i], images[i]), with a text before them that has no picture."""
    n = len(texts)
    ones = torch.ones(n)
    slots = EmbeddingSlots(
        modality=torch.tensor([TEXT] * (n + 1) + [IMAGE] * n),
        item=torch.tensor([NOTHING] * (n + 1) + list(range(n))),
        pair=torch.cat([torch.tensor([n]), torch.arange(n), torch.arange(n)]),
        content=torch.arange(2 * n + 1),
    )
    norms = torch.cat(
        [torch.tensor([1e6]), ones if text_norms is None else text_norms, ones if image_norms is None else image_norms]
    )
    lone = F.normalize(torch.ones(1, texts.shape[1]), dim=-1)
    level = Embeddings(vectors=torch.cat([lone, texts, images]), norms=norms, scale=torch.ones(1), bias=None)
    return {name: float(value) for name, value in contrastive_figures(level, slots, (TEXT, IMAGE), None).items()}


def test_known_by_hand():
    """Texts on two axes, pictures all on a third: distances of sqrt(2) everywhere but among pictures."""
    e = torch.eye(3)
    found = figures(e[[0, 1]], e[[2, 2]], torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
    assert found == pytest.approx(
        {
            "norm/text": 3.0,
            "norm/image": 1.5,
            "alignment": 2.0,
            "uniformity/text": -4.0,
            "uniformity/image": 0.0,
            "gap": math.sqrt(1.5),
        },
        abs=1e-6,
    )


def test_equals_the_definitions(monkeypatch):
    """Over many tiles; `torch.pdist` makes the distances."""
    monkeypatch.setattr(diagnostics, "TILE", 8)
    generator = torch.Generator().manual_seed(0)
    texts, images = (F.normalize(torch.randn(21, 6, generator=generator), dim=-1) for _ in range(2))
    found = figures(texts, images)
    assert found["alignment"] == pytest.approx(float((texts - images).norm(dim=1).square().mean()), rel=1e-5)
    for name, side in (("text", texts), ("image", images)):
        expected = torch.pdist(side.double()).square().mul(-2).exp().mean().log()
        assert found[f"uniformity/{name}"] == pytest.approx(float(expected), rel=1e-5)
    assert found["gap"] == pytest.approx(float((texts.mean(0) - images.mean(0)).norm()), rel=1e-5)


def test_too_few_pairs_are_no_number():
    none = figures(torch.empty(0, 3), torch.empty(0, 3))
    assert all(math.isnan(value) for value in none.values())
    one = figures(torch.eye(3)[:1], torch.eye(3)[1:2])
    assert math.isnan(one["uniformity/text"]) and one["alignment"] == pytest.approx(2.0)
