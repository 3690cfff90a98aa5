"""Ring attention on eight gloo ranks, packs as the planner shares them and others, against its definition in fp64."""

from __future__ import annotations

import torch
from ranks import on_ranks
from rings import Pack, assert_cases, by_hand, planned, random_packs, results_of_cases

HEADS = (2, 1)


def test_eight_ranks_equal_dense_attention():
    spans = (((3, 60), (70, 71)), (), ((0, 100),), (), ((10, 50),))
    cases = [
        planned((256,), 0, 8, "causal"),
        planned((120, 1, 150, 1, 200), 40, 8, "media", spans),
        planned((70, 30, 100, 3, 2, 1, 2), 0, 8, "bidirectional"),
        planned((9, 9, 9, 9), 4, 8, "causal"),
        by_hand(Pack((100,), 28, "causal", 8, (7,) * 128)),  # all of it with one rank
        *(by_hand(pack) for pack in random_packs(8, 10)),
    ]
    found = on_ranks(8, results_of_cases, cases, HEADS, 8, torch.float64)
    assert_cases(found, cases, HEADS, 8, torch.float64, 1e-12)
