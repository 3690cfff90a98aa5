"""A short run of benchmarks/mixes.py: packs of any mixture of modalities, in five layouts of four ranks."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mmpt.config import load
from mmpt.verify.families import families
from mmpt.verify.fuzz import fuzz
from mmpt.verify.table import TOLERANCE

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_any_mixture_of_modalities():
    small = families(load(DEMO))
    found = list(islice(fuzz({"four": small["four modalities"]}, 1, limit=60.0), 20))
    assert [mix.number for mix in found] == list(range(20)) and len({mix.case for mix in found}) == 5
    assert not [mix for mix in found if mix.difference.worst > TOLERANCE["fp64"]]
    for name in ("label", "embedding", "image", "audio", "video"):  # there on some ranks only
        assert [mix for mix in found if any(mix.present[name]) and not all(mix.present[name])], name
