"""The core of the wall, on four ranks and in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmpt.config import RunConfig, load
from mmpt.verify.families import FAMILIES, families
from mmpt.verify.table import verify
from mmpt.verify.wall import case

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
CORE = (case(dp_replicate=2, ring=2), case(ring=2, tp=2))
MORE = (
    case(ring=2, accumulate=4, grad_cache=True),
    case(ring=3),
    case(dp_shard=2, ring=2, accumulate=2),
    case(ring=2, ulysses=2),
    case(dp_shard=2, tp=2),
    case(ring=2, tp=2, recompute="full"),
)


@pytest.fixture(scope="module")
def small() -> dict[str, RunConfig]:
    return families(load(DEMO))


@pytest.mark.parametrize("family", ["demo", *FAMILIES])
def test_four_ranks_are_one(small: dict[str, RunConfig], family: str):
    chosen = (*CORE, *MORE) if family == "four modalities" else CORE
    rows = list(verify(small[family], chosen, ["fp64"]))
    assert [row.case for row in rows] == list(chosen)
    assert not [f"{row.case}: {row.found} {row.failure}" for row in rows if not row.passes]
