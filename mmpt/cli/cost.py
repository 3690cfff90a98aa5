"""`mmpt config cost`: what ring attention is predicted to compute, send and hide, hop by hop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmpt.cli.base import ConfigPath, Overrides

if TYPE_CHECKING:
    from mmpt.config import RunConfig
    from mmpt.parallel.cost import Hop, Machine, Pass
    from mmpt.parallel.layout import Layout
    from mmpt.parallel.planner import SequencePlan

SHOWN = 8  # hops in rows of their own; the others are added up
SPREAD = 1.0  # sigma of log-normal document lengths


def cost(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks of the run; by default the fewest that `parallel` allows.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens of a document, log-normal; by default one document fills a pack.")
    ] = None,
    tflops: Annotated[float, typer.Option(min=1e-6, help="What a rank's attention kernel reaches, 10^12 FLOP/s.")] = 400.0,
    bandwidth: Annotated[float, typer.Option(min=1e-6, help="Between neighbours of the ring, one way, 10^9 bytes/s.")] = 45.0,
    inner: Annotated[float, typer.Option(min=1e-6, help="Between the ranks of `ulysses`, one way, 10^9 bytes/s.")] = 150.0,
) -> None:
    """Predict what ring attention costs.

    The slices that the planner gives are counted for every rank and hop: pairs computed, bytes sent, seconds at the speeds given,
    and how much of the sending is hidden behind computing. A prediction: nothing is run.
    """
    from mmpt.config import load
    from mmpt.parallel.cost import Heads, Machine, hops_of, slowest
    from mmpt.parallel.planner import plan_sequence
    from mmpt.types import UserError

    run = load(config, overrides)
    if window := run.model.transformer.window:
        raise UserError(f"model.transformer.window = {window}: what a window spares is not counted; leave it out to see the rest")
    layout = _layout(run, ranks)
    lengths = pack_lengths(run.data.pack_tokens, documents) * (run.data.packs_per_batch // layout.data)
    causal = "bidirectional" if run.model.transformer.mask == "bidirectional" else "causal"
    plan = plan_sequence(lengths, None, 0, layout.ring, mask=causal)
    heads, machine = Heads.of(run.model.transformer, layout), Machine(flops=tflops * 1e12, bandwidth=bandwidth * 1e9)
    console, hops = Console(), hops_of(plan)
    typer.echo(_headline(run, layout, lengths, plan))
    for direction in ("forward", "backward"):
        rank, found = slowest(hops, heads, machine, direction)
        console.print(_table(f"One layer {direction}, ring rank {rank}, the slowest (predicted)", hops[rank], found))
    _print_bounds(run, layout, plan, machine, inner * 1e9)


def _layout(run: RunConfig, ranks: int | None) -> Layout:
    from mmpt.parallel.layout import layout_of

    p = run.parallel
    return layout_of(run, ranks or p.dp_replicate * (p.dp_shard or 1) * p.ring * p.ulysses * p.tp)


def pack_lengths(tokens: int, mean: int | None) -> list[int]:
    """Document lengths that fill a pack: log-normal about `mean`, the same at every call; or one document."""
    import numpy as np

    chance, lengths, left = np.random.default_rng(0), [], tokens
    while left:
        drawn = left if mean is None else round(chance.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD))
        lengths.append(min(max(drawn, 1), left))
        left -= lengths[-1]
    return lengths


def _headline(run: RunConfig, layout: Layout, lengths: list[int], plan: SequencePlan) -> str:
    tokens = sum(lengths)
    return (
        f"{run.name}: {layout.ranks} rank(s), parallel: {layout}; {tokens:,} tokens in {len(lengths):,} document(s), "
        f"{tokens // layout.sequence:,} a rank\n"
        f"plan: the most pairs of a rank over the mean {plan.imbalance:.3f}; keys received over all others' {plan.remote:.3f}"
    )


def _table(title: str, hops: tuple[Hop, ...], found: Pass) -> Table:
    table = Table("hop", "pairs, 10^6", "GB", "compute, ms", "transfer, ms", "waited, ms", title=title, title_justify="left")
    pairs = {hop.number: hop.pairs for hop in hops}
    rows = [(str(w.hop), pairs[w.hop], w.bytes, w.compute, w.transfer, w.waited) for w in found.windows]
    shown = rows if len(rows) <= SHOWN + 2 else rows[:SHOWN]
    if rest := rows[len(shown) :]:
        shown = [*shown, (f"{len(rest)} more", *map(sum, list(zip(*rest, strict=True))[1:]))]
    for name, count, size, *seconds in [*shown, ("all", *map(sum, list(zip(*rows, strict=True))[1:]))]:
        table.add_row(name, f"{count / 1e6:,.1f}", f"{size / 1e9:.3f}", *(f"{1e3 * each:,.3f}" for each in seconds))
    sent = any(size for _, _, size, *_ in rows)
    hidden = f"hidden: {found.hidden:.1%} of the transfers' time; transfers stand beside the computation that hides them"
    table.caption = hidden if sent else "no key is sent"
    table.caption_justify = "left"
    return table


def _print_bounds(run: RunConfig, layout: Layout, plan: SequencePlan, machine: Machine, inner: float) -> None:
    """From which document lengths on all is hidden; and what `ulysses` adds, which nothing hides."""
    from mmpt.parallel.cost import Heads, length_seen, length_that_hides, ulysses_bytes

    heads = Heads.of(run.model.transformer, layout)
    lengths = [stop - start for start, stop in zip(plan.visible.starts, plan.visible.starts[1:], strict=False)]
    bounds = [length_that_hides(plan, heads, machine, direction) for direction in ("forward", "backward")]
    if plan.remote:
        typer.echo(
            f"all is hidden once a token's document has {bounds[0]:,.0f} tokens (forward) and {bounds[1]:,.0f} (backward) "
            f"in the mean over tokens; here {length_seen(lengths):,.0f}"
        )
    if layout.ulysses > 1:
        size = ulysses_bytes(len(plan.order) // layout.ring, heads, layout)
        typer.echo(f"ulysses: {size / 1e9:.3f} GB a rank, layer and pass besides: {1e3 * size / inner:.2f} ms, not hidden")
