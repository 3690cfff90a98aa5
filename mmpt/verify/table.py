"""Every family in every case, compared with one rank, as rows of a table.

families x cases --on_ranks: one, then those of each layout--> Row --render--> a line for each case
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich.table import Table

from mmpt.config import RunConfig
from mmpt.parallel.layout import Layout, faults_of
from mmpt.verify.mixes import TASTES
from mmpt.verify.ranks import Failed, on_ranks
from mmpt.verify.steps import Difference, Outcome, Precision, Task, differences, outcomes
from mmpt.verify.wall import Case

TOLERANCE: Mapping[Precision, float] = {"fp64": 1e-10, "fp32": 5e-5}
"""The largest difference that passes. In fp64 any real one is many times larger; in fp32 sums in another order round otherwise,
and what little remains of large terms that cancel loses most."""

SEED = 10  # the long documents of all families then lie on both ranks of a ring of 2
LIMIT = 120.0  # seconds of one step

COLUMNS: Mapping[str, Literal["left", "right"]] = {
    "layout": "left", "ranks": "right", "families": "right", "losses": "right", "grad norm": "right", "worst gradient": "right",
    "of": "left", "weights": "right", "embeddings": "right", "fp32, all": "right", "": "left",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """A family in a case: how far each precision is from one rank, or why that is not known."""

    case: Case
    found: Mapping[Precision, Difference]
    failure: str = ""

    @property
    def passes(self) -> bool:
        return not self.failure and all(one.worst <= TOLERANCE[precision] for precision, one in self.found.items())


def verify(config: RunConfig, cases: Sequence[Case], precisions: Sequence[Precision] = ("fp64", "fp32")) -> Iterator[Row]:
    """The rows of one family. A case that the family's sizes rule out has none: see `faults_of`."""
    chosen = [case for case in cases if next(faults_of(case.layout, case.of(config)), None) is None]
    expected = _references(config, chosen, precisions)
    for layout, group in groupby(chosen, key=lambda case: case.layout):
        left = list(group)
        while left:
            tasks = [
                (task, expected[case.reference, task.precision]) for case in left for task in _tasks(case, config, precisions)
            ]
            walk = on_ranks(layout.ranks, differences, layout, tasks, limit=LIMIT)
            try:
                for _ in tuple(left):
                    found = {precision: max(next(walk), key=lambda one: one.worst) for precision in precisions}
                    yield Row(case=left.pop(0), found=found)
            except Failed as failure:
                yield Row(case=left.pop(0), found={}, failure=str(failure))


def _tasks(case: Case, config: RunConfig, precisions: Sequence[Precision]) -> list[Task]:
    return [Task(config=case.of(config), tastes=TASTES, seed=SEED, precision=precision) for precision in precisions]


def _references(
    config: RunConfig, cases: Sequence[Case], precisions: Sequence[Precision]
) -> dict[tuple[Case, Precision], Outcome]:
    """What one rank makes of all that the cases are compared with."""
    wanted = list(dict.fromkeys(case.reference for case in cases))
    tasks = [task for case in wanted for task in _tasks(case, config, precisions)]
    keys = [(case, precision) for case in wanted for precision in precisions]
    found = on_ranks(1, outcomes, Layout(), tasks, limit=LIMIT)
    return {key: outcome for key, (outcome,) in zip(keys, found, strict=True)}


def render(found: Mapping[str, Sequence[Row]]) -> Table:
    """A line for each case: the largest differences of all families, those of fp64 but in the last column.

    `found`: the rows of every family, by its name.
    """
    table = Table()
    for name, justify in COLUMNS.items():
        table.add_column(name, justify=justify, overflow="fold")
    for case in dict.fromkeys(row.case for rows in found.values() for row in rows):
        of_case = {family: row for family, rows in found.items() for row in rows if row.case == case}
        passes = "equal" if all(row.passes for row in of_case.values()) else "DIFFERENT"
        table.add_row(str(case), str(case.layout.ranks), f"{len(of_case)} of {len(found)}", *_largest(of_case), passes)
    return table


def _largest(of_case: Mapping[str, Row]) -> Iterator[str]:
    """Of all families that ended."""
    ended = {family: row.found for family, row in of_case.items() if row.found}
    if not ended:
        yield from ["-"] * 7
        return
    exact = {family: by_precision["fp64"] for family, by_precision in ended.items()}
    family = max(exact, key=lambda name: exact[name].gradient)
    yield from (f"{max(getattr(one, name) for one in exact.values()):.0e}" for name in ("losses", "grad_norm", "gradient"))
    yield f"{family}: {exact[family].parameter}"
    yield from (f"{max(getattr(one, name) for one in exact.values()):.0e}" for name in ("weights", "embeddings"))
    rounded = [by_precision["fp32"].worst for by_precision in ended.values() if "fp32" in by_precision]
    yield f"{max(rounded):.0e}" if rounded else "-"


def complaints(found: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """What is wrong with each row that does not pass."""
    for family, rows in found.items():
        for row in rows:
            if row.failure:
                yield f"{family}, {row.case}: {row.failure}"
            elif not row.passes:
                yield f"{family}, {row.case}: " + ", ".join(f"{precision} {one}" for precision, one in row.found.items())


def summary(found: Mapping[str, Sequence[Row]]) -> str:
    """One line for all."""
    rows = [row for of_family in found.values() for row in of_family]
    worst = {p: max((row.found[p].worst for row in rows if p in row.found), default=0.0) for p in TOLERANCE}
    largest = ", ".join(f"{precision} {value:.0e} (allowed: {TOLERANCE[precision]:.0e})" for precision, value in worst.items())
    bad = sum(not row.passes for row in rows)
    told = f"{bad} of {len(rows)} steps DIFFER from one rank's" if bad else f"{len(rows)} steps, all equal to one rank's"
    return f"{told}; largest difference: {largest}"
