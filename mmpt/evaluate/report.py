"""A run as one page: config.yaml, metrics.jsonl, eval/*.json and the gallery -> runs/NAME/report.html.

The page holds everything that it shows and asks for nothing: no script, no font, no picture from elsewhere. Its text comes from
data that strangers wrote, so the template escapes all of it; only the charts, made here from numbers, are inserted as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmpt.config import load
from mmpt.evaluate.curves import Lines, charts
from mmpt.evaluate.gallery import Example, ReportExamples
from mmpt.evaluate.retrieval import KS
from mmpt.evaluate.split import WORDS
from mmpt.types import UserError

KINDS = ("retrieval", "classification", "language")
"""Of results, in the order in which the page shows them."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number at the head of the page."""

    title: str
    value: str
    note: str


def write_report(run: Path, examples: ReportExamples | None) -> Path:
    """Write runs/NAME/report.html and return its path: what the run has of curves, results of `mmpt eval` and examples.

    Raises UserError where the run lacks its config or its metrics.
    """
    config = _read(run, "config.yaml", "train it first: mmpt train CONFIG")
    objectives = load(run / "config.yaml").objectives
    train, evals = read_metrics(run)
    results = _results(run)
    loader = PackageLoader("mmpt.evaluate", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, duration=duration, count=lambda value: f"{value:,.0f}", has_ties=has_ties)
    page = environment.get_template("report.html.jinja").render(
        name=run.resolve().name,
        last=train[-1],
        ks=KS,
        words=WORDS,
        spec=next((result["trained_on"]["spec"] for found in results.values() for result in found), None),
        headline=headline(results),
        results=results,
        examples=examples,
        top_of_pictures=_placed(examples.pictures if examples else ()),
        top_of_names=_placed(examples.names if examples else ()),
        charts=charts(train, evals, objectives),
        config=config,
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_metrics(run: Path) -> tuple[Lines, Lines]:
    """The train lines and the eval lines of metrics.jsonl; a last line that a kill cut short is left out.

    Raises UserError where no step was logged.
    """
    text = _read(run, "metrics.jsonl", "train it first: mmpt train CONFIG")
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    train, evals = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
    if not train:
        raise UserError(f"run {run}: metrics.jsonl has no training step yet; train on: mmpt train {run / 'config.yaml'}")
    return train, evals


def _read(run: Path, name: str, mend: str) -> str:
    try:
        return (run / name).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"run {run}: no {name} ({error.strerror}); {mend}") from error


def _results(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by kind, those on the held-out part of the run's own training data first."""
    results = {}
    for kind in KINDS:
        found = [json.loads(path.read_text()) for path in sorted((run / "eval").glob(f"{kind}-*.json"))]
        results[kind] = sorted(found, key=lambda result: result["trained_on"].get("name") != result["evaluated_on"]["name"])
    return results


def headline(results: Mapping[str, list[dict[str, Any]]]) -> list[Figure]:
    """The first retrieval in figures, or else the first classification, or the language."""
    if results["retrieval"]:
        first = results["retrieval"][0]
        word = WORDS[first["item"]]
        ways = ((f"{word.capitalize()} to text", "item_to_text"), (f"Text to {word}", "text_to_item"))
        return [
            Figure(title=f"{title}, {top}", value=percent(first[key][top]), note=f"chance {percent(first[key]['chance'][top])}")
            for top in ("R@1", "R@5")
            for title, key in ways
        ]
    if results["classification"]:
        first = results["classification"][0]
        return [
            Figure(title=f"Classification, {top}", value=percent(first[top]), note=f"chance {percent(chance)}")
            for top, chance in first["chance"].items()
        ]
    for first in results["language"][:1]:
        texts = f"{first['tokens']:,} tokens of {first['evaluated_on']['name']}"
        return [
            Figure(title="Perplexity", value=f"{first['perplexity']:.4g}", note=texts),
            Figure(title="Bits per byte", value=f"{first['bits_per_byte']:.3f}", note=texts),
        ]
    return []


def _placed(examples: Iterable[Example]) -> dict[int, int]:
    """How many of the examples have their right one at rank 1, and among the first five."""
    ranks = [example.rank for example in examples]
    return {k: sum(rank <= k for rank in ranks) for k in (1, 5)}


def has_ties(direction: dict[str, Any]) -> bool:
    """Whether equal scores decided anything in a direction of a result."""
    return any(direction[key] != value for key, value in direction["ties_lost"].items())


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
