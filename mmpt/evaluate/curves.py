"""Which curves a run has: the names in metrics.jsonl -> charts in reading order.

Names are found, not listed: a run logs `loss/NAME` for each of its objectives, `loss/contrastive/LEVEL/PAIR` for each contrast,
and `[SOURCE/]val/NAME` and `[SOURCE/]retrieval/LEVEL/A_to_B/R@K` for each evaluation. Training losses are logged with their
weights, so that they add up; they are drawn without, so that they stand beside those of evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from markupsafe import Markup

from mmpt.config import ObjectivesConfig
from mmpt.evaluate.charts import PALETTE, SECOND, Series, Unit, line_chart
from mmpt.evaluate.split import WORDS

Lines = list[dict[str, Any]]

LOSS = re.compile(r"loss/(?P<name>[a-z_]+)")
CONTRAST = re.compile(r"loss/contrastive/(?P<level>backbone|tower)/(?P<a>[a-z]+)_(?P<b>[a-z]+)")
VALIDATION = re.compile(r"(?:(?P<source>.+)/)?val/(?P<name>[a-z_]+)")
RETRIEVAL = re.compile(r"(?P<of>(?:.+/)?)retrieval/(?P<level>\w+)/(?P<item>image|audio|video)_to_text/R@1")

TITLES = {
    "next_token": ("Next-token loss", "nats per token"),
    "masked": ("Masked-token loss", "nats per masked token"),
    "span": ("Span loss", "nats per token of the spans"),
    "next_sentence": ("Next-sentence loss", "nats per pair of texts"),
    "balance": ("Balance of experts", "1: all are used alike"),
    "distillation": ("Distillation loss", "nats per token, from the teacher"),
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    note: str
    series: list[Series]
    svg: Markup


def charts(train: Lines, evals: Lines, objectives: ObjectivesConfig) -> list[Chart]:
    """All curves of a run, in reading order; a curve that was never logged is left out."""
    return [
        *_losses(train, evals, objectives),
        *_contrasts(train, objectives),
        *_chart("Total loss", "weighted sum of all", _series("", train, "loss")),
        *_retrievals(evals),
        *_chart("Learning rate", "warm-up, then cosine", _series("", train, "lr"), "small", from_zero=True),
        *_chart("Throughput", "samples per second", _series("", train, "samples_per_second"), from_zero=True),
    ]


def _losses(train: Lines, evals: Lines, objectives: ObjectivesConfig) -> Iterator[Chart]:
    """One chart an objective; beside the training curve, those of the held-out splits."""
    for found in _matches(LOSS, train):
        name = found["name"]
        held_out = []
        for each, color in zip(_matches(VALIDATION, evals), cycle(PALETTE[1:]), strict=False):
            if each["name"] == name:
                label = f"held out, {each['source']}" if each["source"] else "held out"
                held_out += _series(label, evals, each[0], color=color, dots=True)
        title, note = TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
        weight = getattr(getattr(objectives, name, None), "weight", 1.0)
        training = _series("training" if held_out else "", train, found[0], weight=weight)
        yield from _chart(title, note, [*training, *held_out])


def _contrasts(train: Lines, objectives: ObjectivesConfig) -> Iterator[Chart]:
    """One chart a level, one line a pair of modalities."""
    found = _matches(CONTRAST, train)
    levels = dict.fromkeys(each["level"] for each in found)
    for level in levels:
        pairs = [each for each in found if each["level"] == level]
        series = []
        for each, color in zip(pairs, cycle(PALETTE), strict=False):
            label = f"{each['a']} and {each['b']}" if len(pairs) > 1 else ""
            weight = getattr(objectives.contrastive, level).weight
            series += _series(label, train, each[0], weight=weight, color=color)
        of = f", {level}" if len(levels) > 1 else ""
        yield from _chart(f"Contrastive loss{of}", "nats per pair", series)


def _retrievals(evals: Lines) -> Iterator[Chart]:
    found = _matches(RETRIEVAL, evals)
    for each in found:
        word, stem = WORDS[each["item"]], f"{each['of']}retrieval/{each['level']}/"
        to_text, to_item = f"{stem}{each['item']}_to_text/", f"{stem}text_to_{each['item']}/"
        series = [
            *_series(f"{word} to text", evals, to_text + "R@1", dots=True),
            *_series(f"text to {word}", evals, to_item + "R@1", color=SECOND, dots=True),
            *_series("", evals, to_text + "R@5", light=True),
            *_series("", evals, to_item + "R@5", color=SECOND, light=True),
        ]
        of = f", {each['of']}{each['level']}" if len(found) > 1 else ""
        yield from _chart(f"Retrieval{of}", "held out; R@1 strong, R@5 faint", series, "percent", from_zero=True)


def _chart(title: str, note: str, series: list[Series], unit: Unit = "plain", from_zero: bool = False) -> Iterator[Chart]:
    """One, if there is anything to draw. The drawing holds numbers and fixed words only: nothing of it needs escaping."""
    if series:
        yield Chart(title=title, note=note, series=series, svg=Markup(line_chart(series, unit, from_zero)))


def _matches(pattern: re.Pattern[str], lines: Lines) -> list[re.Match[str]]:
    """The names of this form, in the order in which they were first logged."""
    names = dict.fromkeys(name for line in lines for name in line)
    return [found for name in names if (found := pattern.fullmatch(name))]


def _series(label: str, lines: Lines, key: str, *, weight: float = 1.0, **look: Any) -> list[Series]:
    """The logged values of a key, a loss without its weight, as one series, or none if it was never logged."""
    points = [(line["step"], line[key] / (weight or 1.0)) for line in lines if isinstance(line.get(key), int | float)]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    return [Series(label=label, steps=steps, values=values, **look)]
