"""A run as one page: config.yaml, metrics.jsonl, eval/*.json and the gallery -> runs/NAME/report.html.

The page holds everything that it shows and asks for nothing: no script, no font, no picture from elsewhere. Its text comes from
data that strangers wrote, so the template escapes all of it; only the charts, made here from numbers, are inserted as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmpt.evaluate.charts import SECOND, Series, line_chart
from mmpt.evaluate.gallery import Example, ReportExamples
from mmpt.evaluate.retrieval import KS
from mmpt.types import UserError

Lines = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    note: str
    series: list[Series]
    svg: Markup


def write_report(run: Path, examples: ReportExamples) -> Path:
    """Write runs/NAME/report.html and return its path.

    Raises UserError where the run lacks its config, its metrics or a result of `mmpt eval retrieval`.
    """
    config = _read(run, "config.yaml", "train it first: mmpt train CONFIG")
    train, evals = read_metrics(run)
    results = _results(run)
    loader = PackageLoader("mmpt.evaluate", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, duration=duration, count=lambda value: f"{value:,.0f}", has_ties=has_ties)
    page = environment.get_template("report.html.jinja").render(
        name=run.resolve().name,
        last=train[-1],
        ks=KS,
        results=results,
        examples=examples,
        top_of_pictures=_placed(examples.pictures),
        top_of_names=_placed(examples.names),
        charts=charts(train, evals),
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


def _results(run: Path) -> list[dict[str, Any]]:
    """Retrieval results, those on the held-out part of the run's own training data first."""
    results = [json.loads(path.read_text()) for path in sorted((run / "eval").glob("retrieval-*.json"))]
    if not results:
        raise UserError(f"run {run}: no eval/retrieval-*.json; evaluate it first: mmpt eval retrieval {run} --spec SPEC")
    return sorted(results, key=lambda result: result["trained_on"].get("name") != result["evaluated_on"]["name"])


def _placed(examples: Iterable[Example]) -> dict[int, int]:
    """How many of the examples have their right one at rank 1, and among the first five."""
    ranks = [example.rank for example in examples]
    return {k: sum(rank <= k for rank in ranks) for k in (1, 5)}


def charts(train: Lines, evals: Lines) -> list[Chart]:
    """All curves of a run, in reading order; a curve that was never logged is left out."""
    validation = _series("held out", evals, "val/next_token", color=SECOND, dots=True)
    to_text, to_image = (f"retrieval/{name}/" for name in ("image_to_text", "text_to_image"))
    recall = [
        *_series("picture to name", evals, to_text + "R@1", dots=True),
        *_series("name to picture", evals, to_image + "R@1", color=SECOND, dots=True),
        *_series("", evals, to_text + "R@5", light=True),
        *_series("", evals, to_image + "R@5", color=SECOND, light=True),
    ]
    drawn = [
        ("Next-token loss", "nats per token", [*_series("training", train, "loss/next_token"), *validation], "plain", False),
        ("Contrastive loss", "nats per pair, within the batch", _series("", train, "loss/contrastive"), "plain", False),
        ("Total loss", "weighted sum of both", _series("", train, "loss"), "plain", False),
        ("Retrieval", "held out; R@1 strong, R@5 faint", recall, "percent", True),
        ("Learning rate", "warm-up, then cosine", _series("", train, "lr"), "small", True),
        ("Throughput", "samples per second", _series("", train, "samples_per_second"), "plain", True),
    ]
    return [  # the drawings hold numbers and fixed words only: nothing of them needs escaping
        Chart(title=title, note=note, series=series, svg=Markup(line_chart(series, unit, from_zero)))
        for title, note, series, unit, from_zero in drawn
        if series
    ]


def _series(label: str, lines: Lines, key: str, **look: Any) -> list[Series]:
    """The logged values of a key as one series, or none if it was never logged."""
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    return [Series(label=label, steps=steps, values=values, **look)]


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
