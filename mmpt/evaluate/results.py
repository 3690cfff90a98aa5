"""What an evaluation leaves behind: runs/NAME/eval/KIND-SPEC-SPLIT.json, with its protocol, counts, checkpoint and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import TRAIN, cache_of
from mmpt.data.spec import DataSpec, load_mixture
from mmpt.types import UserError


def write_result(
    run: Path,
    kind: str,
    figures: Mapping[str, Any],
    config: RunConfig,
    step: int,
    spec: str | Path,
    split: str,
    variant: tuple[str, ...] = (),
) -> Path:
    """Write runs/NAME/eval/KIND-SPEC-SPLIT.json, `variant` behind it: figures, checkpoint and both data sets."""
    evaluated_on = {"split": split} | _data(spec, split, config)
    tree = {
        "kind": kind,
        **figures,
        "checkpoint": {"run": config.name, "step": step},
        "trained_on": _trained_on(config),
        "evaluated_on": evaluated_on,
    }
    path = run / "eval" / ("-".join((kind, evaluated_on["name"], split, *variant)) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n")
    return path


def specs_with(spec: str | Path, split: str) -> list[DataSpec]:
    """The specs of a mixture that have a split of this name, each once. Raises UserError where none has."""
    specs = load_mixture(spec).corpora()
    if not any(split in found.split for found in specs):
        raise UserError(f"spec {spec}: no split {split!r}; it has {', '.join(dict.fromkeys(s for f in specs for s in f.split))}")
    return [found for found in specs if split in found.split]


def _data(spec: str | Path, split: str, config: RunConfig) -> dict[str, Any]:
    """A spec's name, documents and fingerprint; a mixture's name, and those of each of its sources."""
    sources = [_describe(found, split, config) for found in specs_with(spec, split)]
    return sources[0] if len(sources) == 1 else {"name": load_mixture(spec).name, "sources": sources}


def _describe(spec: DataSpec, split: str, config: RunConfig) -> dict[str, Any]:
    """Of shards that are gone, there is the name alone."""
    try:
        corpus = Corpus.open(spec, split, cache_of(config.data))
    except UserError:
        return {"name": spec.name}
    return {"name": spec.name, "documents": len(corpus), "fingerprint": corpus.fingerprint}


def _trained_on(config: RunConfig) -> dict[str, Any]:
    """The training data, and the published weights that the run began with: those have seen data of their own."""
    parts = {"model": config.model} | {name: getattr(config.model, name) for name in ("image", "audio", "transformer")}
    inits = {name: part.init.model_dump(exclude_none=True) for name, part in parts.items() if part and part.init}
    trained: dict[str, Any] = {"spec": config.data.spec, "split": TRAIN} | ({"init": inits} if inits else {})
    try:
        return trained | _data(config.data.spec, TRAIN, config)
    except UserError:  # the spec itself is gone
        return trained
