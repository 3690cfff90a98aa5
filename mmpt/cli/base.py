"""What the command groups share: their look, and their common arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# rich's boxes are for a terminal; elsewhere (a pipe, a log) plain lines read better.
LOOK: Literal["rich"] | None = "rich" if sys.stdout.isatty() else None

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A run's config, YAML: those in configs/, or runs/NAME/config.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE ...", help="Settings that replace those of CONFIG: train.steps=100")
]


def group(**settings: object) -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True, rich_markup_mode=LOOK, pretty_exceptions_enable=False, add_completion=False, **settings
    )


class Bar:
    """A progress bar on a terminal, and nothing elsewhere: `with Bar("indexing", "shards") as tell: tell(done, total)`."""

    def __init__(self, verb: str, noun: str) -> None:
        console = Console(stderr=True)
        columns = TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn(noun), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(verb, total=None)

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
