"""Zero-shot retrieval of a model on a split of a spec: what `mmpt eval retrieval` runs, writes and prints.

spec, split -> Corpus -> sequential_batches -> embed -> retrieval -> runs/NAME/eval/retrieval-<spec>-<split>.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import TRAIN, cache_of, refuse_faults, sequential_batches
from mmpt.data.spec import DataSpec, load_mixture, load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import Embeddings, embed
from mmpt.evaluate.retrieval import KS, PROTOCOL, Direction, RetrievalResult, retrieval
from mmpt.types import UserError


def evaluate_retrieval(
    model: nn.Module, config: RunConfig, spec: str | Path, split: str, device: torch.device | str
) -> tuple[RetrievalResult, Embeddings]:
    """Retrieve among the documents of a split that have a picture and a text, by the first of each, with the run's tokenizer.

    Precision is the caller's (autocast) for the model; scores are fp32. Raises UserError for a split that cannot be ranked.
    """
    corpus = Corpus.open(load_spec(spec), split, cache_of(config.data))
    batches = refuse_faults(sequential_batches(corpus, Tokenizer.load(config.data.tokenizer), config))
    try:
        embeddings = embed(model, batches, device)
        return retrieval(embeddings.items, embeddings.texts, embeddings.owner), embeddings
    except ValueError as error:
        raise UserError(f"retrieval on {spec}, split {split!r}: {error}") from error


def write_result(run: Path, result: RetrievalResult, config: RunConfig, step: int, spec: str | Path, split: str) -> Path:
    """Write runs/NAME/eval/retrieval-<spec name>-<split>.json: figures, protocol, checkpoint and both data sets."""
    evaluated_on = _describe(load_spec(spec), split, config)
    tree = {
        "kind": "retrieval",
        **result.to_json(),
        "protocol": PROTOCOL,
        "checkpoint": {"run": config.name, "step": step},
        "trained_on": _trained_on(config),
        "evaluated_on": evaluated_on,
    }
    path = run / "eval" / f"retrieval-{evaluated_on['name']}-{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n")
    return path


def _describe(spec: DataSpec, split: str, config: RunConfig) -> dict[str, Any]:
    corpus = Corpus.open(spec, split, cache_of(config.data))
    return {"name": corpus.name, "split": split, "documents": len(corpus), "fingerprint": corpus.fingerprint}


def _trained_on(config: RunConfig) -> dict[str, Any]:
    """The training data as the config names it; what only the shards know is left out where they are gone."""
    trained: dict[str, Any] = {"spec": config.data.spec, "split": TRAIN}
    try:
        mixture = load_mixture(config.data.spec)
        sources = [_describe(spec, TRAIN, config) for spec in mixture.specs()]
    except UserError:
        return trained
    return trained | (sources[0] if len(sources) == 1 else {"name": mixture.name, "sources": sources})


def retrieval_table(result: RetrievalResult, item: str = "picture") -> Table:
    """Both directions, with chance below each, for a terminal."""
    table = Table(title=f"Zero-shot retrieval, {result.items} {item}s and {result.texts} texts")
    table.add_column("direction")
    for name in [*(f"R@{k}" for k in KS), "median rank", "mAP@10"]:
        table.add_column(name, justify="right")
    _add_rows(table, f"{item} to text", result.item_to_text)
    _add_rows(table, f"text to {item}", result.text_to_item)
    return table


def _add_rows(table: Table, name: str, direction: Direction) -> None:
    won = direction.ties_won
    table.add_row(name, *(f"{won.recall[k]:.1%}" for k in KS), f"{won.median_rank:g}", f"{won.map_10:.3f}")
    table.add_row("  chance", *(f"{direction.chance[k]:.1%}" for k in KS), "", "", style="dim")
    if direction.ties_lost != won:
        lost = direction.ties_lost
        table.add_row("  ties lost", *(f"{lost.recall[k]:.1%}" for k in KS), f"{lost.median_rank:g}", f"{lost.map_10:.3f}")
