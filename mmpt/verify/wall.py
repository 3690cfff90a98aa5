"""The wall: the ways of sharing a step that must all come to the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from mmpt.config import ParallelConfig, RunConfig
from mmpt.parallel.layout import Layout

PACKS = 8
"""Of a step, over all of its micro-batches: as many as the most data ranks."""

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout of ranks, and what else must not change a step."""

    layout: Layout
    accumulate: int = 1
    grad_cache: bool = False
    recompute: Recompute | None = None  # None: as the config says

    @property
    def reference(self) -> Case:
        """One rank with the same loss: a cached contrast is that of one big batch, any other stays within its micro-batch."""
        return Case(layout=Layout(), accumulate=1 if self.grad_cache else self.accumulate)

    def __str__(self) -> str:
        return ", ".join(self._words())

    def _words(self) -> Iterator[str]:
        sizes = self.layout
        if sizes.dp_replicate > 1:
            yield f"{sizes.dp_replicate} copies" + (f" of {sizes.dp_shard} shards" if sizes.dp_shard > 1 else "")
        elif sizes.dp_shard > 1:
            yield f"{sizes.dp_shard} shards"
        for size, words in ((sizes.ring, "ring of"), (sizes.ulysses, "heads over"), (sizes.tp, "matrices over")):
            if size > 1:
                yield f"{words} {size}"
        if sizes.ranks == 1:
            yield "one rank"
        if self.accumulate > 1:
            yield f"{self.accumulate} micro-batches" + (" contrasted as one" if self.grad_cache else "")
        if self.recompute:
            yield {"none": "nothing", "selective": "cheap parts", "full": "blocks"}[self.recompute] + " computed anew"

    def of(self, config: RunConfig) -> RunConfig:
        """A family's config in this case."""
        contrastive = config.objectives.contrastive.model_copy(update={"grad_cache": self.grad_cache})
        train = {"accumulate": self.accumulate} | ({"recompute": self.recompute} if self.recompute else {})
        changes = {
            "objectives": config.objectives.model_copy(update={"contrastive": contrastive}),
            "train": config.train.model_copy(update=train),
            "data": config.data.model_copy(update={"packs_per_batch": PACKS // self.accumulate}),
            "parallel": ParallelConfig(**asdict(self.layout)),
        }
        return config.model_copy(update=changes)


def case(accumulate: int = 1, grad_cache: bool = False, recompute: Recompute | None = None, **axes: int) -> Case:
    return Case(layout=Layout(**axes), accumulate=accumulate, grad_cache=grad_cache, recompute=recompute)


WALL = (
    case(dp_replicate=2),
    case(dp_replicate=4),
    case(dp_shard=2),
    case(dp_shard=2, accumulate=4),
    case(dp_shard=2, accumulate=4, grad_cache=True),
    case(dp_shard=4),
    case(dp_shard=8),
    case(dp_replicate=2, dp_shard=2),
    case(dp_replicate=2, dp_shard=4),
    case(ring=2),
    case(ring=2, accumulate=4),
    case(ring=2, accumulate=4, grad_cache=True),
    case(ring=2, recompute="full"),
    case(ring=3),
    case(ring=4),
    case(ring=8),
    case(dp_replicate=2, ring=2),
    case(dp_shard=2, ring=2),
    case(dp_shard=2, ring=2, accumulate=2),
    case(dp_shard=2, ring=2, accumulate=2, grad_cache=True),
    case(dp_shard=2, ring=2, recompute="selective"),
    case(dp_shard=2, ring=4),
    case(dp_replicate=2, dp_shard=2, ring=2),
    case(ulysses=2),
    case(ulysses=4),
    case(dp_shard=2, ulysses=2),
    case(ring=2, ulysses=2),
    case(ring=2, ulysses=4),
    case(ring=4, ulysses=2),
    case(dp_shard=2, ring=2, ulysses=2),
    case(tp=2),
    case(tp=4),
    case(dp_replicate=2, tp=2),
    case(dp_shard=2, tp=2),
    case(ring=2, tp=2),
    case(ring=2, tp=2, accumulate=2),
    case(ring=2, tp=2, recompute="full"),
    case(ring=3, tp=2),
    case(ring=4, tp=2),
    case(ulysses=2, tp=2),
    case(ring=2, ulysses=2, tp=2),
    case(dp_replicate=2, ring=2, tp=2),
    case(dp_shard=2, ring=2, tp=2),
)


def cases(ranks: int) -> list[Case]:
    """Those that so many ranks allow."""
    return [one for one in WALL if one.layout.ranks <= ranks]
