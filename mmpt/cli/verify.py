"""`mmpt verify ...`: that every layout computes the same, and that no document is read twice."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from mmpt.cli.base import Bar, ConfigPath, Overrides, group

WIDTH = 170  # characters of a table that no terminal shows


class _ConfigOrCommand(TyperGroup):
    """`mmpt verify CONFIG` is `mmpt verify layouts CONFIG`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["layouts", *args]
        return super().parse_args(ctx, args)


verify_app = group(
    help="Prove that layouts and interruptions change nothing.",
    cls=_ConfigOrCommand,
    subcommand_metavar="CONFIG | COMMAND [ARGS]...",
    epilog="mmpt verify configs/demo.yaml --ranks 4",
)


@verify_app.command(epilog="mmpt verify configs/demo.yaml --ranks 4")
def layouts(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=2, max=8, help="Processes, at most, of a layout.")] = 8,
) -> None:
    """Prove that every layout computes what one rank does.

    Takes one step of CONFIG's model, made small, and of a small model of each family, on made-up documents of every mixture, in
    every layout that so many ranks allow. Losses, gradients, weights and embeddings are compared with those of one rank: in fp64
    to 1e-10, in fp32 to rounding. The exit code is 1 if any differs. Runs on the CPU, a few minutes.
    """
    from mmpt.config import load
    from mmpt.verify.families import families
    from mmpt.verify.table import complaints, render, summary, verify
    from mmpt.verify.wall import cases

    found = {}
    for name, family in families(load(config, overrides)).items():
        chosen = cases(ranks)
        with Bar(name, "layouts") as tell:
            found[name] = []
            for row in verify(family, chosen):
                found[name].append(row)
                tell(len(found[name]), len(chosen))
    Console(width=None if sys.stdout.isatty() else WIDTH).print(render(found))
    for complaint in complaints(found):
        typer.echo(complaint)
    typer.echo(summary(found))
    raise typer.Exit(0 if all(row.passes for rows in found.values() for row in rows) else 1)


@verify_app.command(epilog="mmpt verify data configs/demo.yaml")
def data(
    config: ConfigPath, overrides: Overrides = None, seed: Annotated[int, typer.Option(help="Of where it is killed.")] = 0
) -> None:
    """Prove that a killed run repeats and loses no document.

    Reads the config's data as one process would, and again as a run that is killed every few steps and goes on under another
    number of ranks (1, 2, 3, 4, 8) and workers (0, 1, 2, 4), until all twenty had a turn; then compares what was read.
    """
    from mmpt.config import load
    from mmpt.data.ledger import chase, first_difference
    from mmpt.types import UserError

    def tell(layout: object, first: int, last: int) -> None:
        typer.echo(f"micro-batches {first:>3} to {last - 1:>3}: {layout}")

    whole, chased = chase(load(config, overrides), seed, tell)
    if (step := first_difference(whole, chased)) is not None:
        raise UserError(f"micro-batch {step} differs from the uninterrupted run's")
    rows = sum(map(len, whole))
    typer.echo(f"{len(whole)} micro-batches, {rows:,} documents: equal, with sample, augmentation seed, pack and position")
