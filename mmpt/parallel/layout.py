"""Which ranks do what: a layout from the config and the number of ranks, refused where it cannot be.

RunConfig, ranks --layout_of--> Layout --mesh.make_mesh--> DeviceMesh
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from mmpt.config import RunConfig
from mmpt.types import UserError

SHOWN = 3  # layouts that are proposed


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks along each axis of the mesh, outermost first: those of `data` read packs of their own, those of `sequence` share one
    batch, token by token."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(asdict(self).values())

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def data(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def sequence(self) -> int:
        return self.ring * self.ulysses * self.tp

    def __str__(self) -> str:
        """As the section `parallel` of a config: {dp_shard: 2, ring: 4}."""
        sizes = {name: size for name, size in asdict(self).items() if size > 1 or name == "dp_shard"}
        return "{" + ", ".join(f"{name}: {size}" for name, size in sizes.items()) + "}"


AXES = tuple(asdict(Layout()))


def layout_of(config: RunConfig, ranks: int) -> Layout:
    """The layout of a run on so many ranks. Raises UserError, with the nearest that work, for one that cannot be."""
    wanted = config.parallel.model_dump()
    fixed = math.prod(size for size in wanted.values() if size is not None)
    found = Layout(**{**wanted, "dp_shard": wanted["dp_shard"] or max(ranks // fixed, 1)})
    faults = list(faults_of(found, config)) if found.ranks == ranks else [_miscount(wanted, fixed, ranks)]
    if faults:
        raise UserError(f"parallel: {'; '.join(faults)}; {_mend(config, wanted, ranks)}")
    return found


def _miscount(wanted: dict[str, int | None], fixed: int, ranks: int) -> str:
    product = " x ".join(f"{name} {'(the rest)' if size is None else size}" for name, size in wanted.items())
    multiple = "a multiple of " if wanted["dp_shard"] is None else ""
    there = f"there is 1: start them with torchrun --nproc-per-node {fixed}" if ranks == 1 else f"there are {ranks}"
    return f"{product} wants {multiple}{fixed} ranks, and {there}"


def faults_of(layout: Layout, config: RunConfig) -> Iterator[str]:
    """Why the run cannot be trained in this layout, if it cannot."""
    model, data = config.model.transformer, config.data
    heads = layout.ulysses * layout.tp
    for name, count in (("n_heads", model.n_heads), ("n_kv_heads", model.kv_heads)):
        if count % heads:
            yield f"model.transformer.{name} {count} is not a multiple of ulysses {layout.ulysses} x tp {layout.tp}"
    if model.experts is None and model.ffn_dim % layout.tp:
        yield f"model.transformer.ffn_dim {model.ffn_dim} is not a multiple of tp {layout.tp}"
    if data.packs_per_batch % layout.data:
        axes = f"dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard}"
        yield f"data.packs_per_batch {data.packs_per_batch} is not a multiple of {axes}"
    axes = f"ring {layout.ring} x ulysses {layout.ulysses} x tp {layout.tp}"
    # Of one pack, not of a batch: the last batch of an evaluation may have any number of packs.
    if data.pack_tokens % layout.sequence:
        yield f"data.pack_tokens {data.pack_tokens} is not a multiple of {axes}"
    if model.window and layout.sequence > 1:
        yield f"model.transformer.window {model.window} is for ranks that have all tokens of a pack, and {axes} share them out"


def _mend(config: RunConfig, wanted: dict[str, int | None], ranks: int) -> str:
    """The layouts that work and differ least from the wanted sizes; of fewer ranks, where none of so many does."""
    most = config.data.packs_per_batch * config.data.pack_tokens  # a multiple of the data ranks, times one of the sequence ranks
    for count in range(ranks, 0, -1):
        works = [] if most % count else [layout for layout in layouts(count) if next(faults_of(layout, config), None) is None]
        if works:
            nearest = sorted(works, key=lambda layout: _distance(layout, wanted))[:SHOWN]
            shown = " or ".join(f"parallel: {layout}" for layout in nearest)
            return f"{count} rank(s) can be {shown}" if count == ranks else f"no layout of {ranks} can be; {count} can: {shown}"
    raise AssertionError("one rank always works")


def layouts(ranks: int) -> Iterator[Layout]:
    """Every layout of so many ranks."""
    for sizes in _products(ranks, len(AXES)):
        yield Layout(**dict(zip(AXES, sizes, strict=True)))


def _products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    if factors == 1:
        yield (number,)
        return
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    for first in sorted({*small, *(number // size for size in small)}):
        yield from ((first, *others) for others in _products(number // first, factors - 1))


def _distance(layout: Layout, wanted: dict[str, int | None]) -> tuple[float, Sequence[int]]:
    """Doublings and halvings from the wanted sizes; of equally near ones, the outer axes are kept as they are."""
    pairs = [(size, wanted[name]) for name, size in asdict(layout).items()]
    changes = [0.0 if want is None else abs(math.log2(size / want)) for size, want in pairs]
    return round(sum(changes), 6), tuple(change > 0 for change in changes)
