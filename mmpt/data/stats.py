"""What a corpus holds, in numbers. The indices alone are read, and the token counts beside them; no payload is decoded.

spec or mixture --Corpus.open--> PART rows --_source--> SourceStats     with a tokenizer: tokens of texts
                                 Source, Plan --> lengths of documents, fill of packs     with a run's config
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mmpt.config import DataConfig, RunConfig
from mmpt.data.budget import Budget
from mmpt.data.cache import Cache
from mmpt.data.corpus import Corpus, Progress
from mmpt.data.plan import Plan
from mmpt.data.source import Source
from mmpt.data.spec import MixturePart, load_mixture
from mmpt.data.tokens import Tokenizer
from mmpt.types import AUDIO, IMAGE, TEXT, VIDEO

KINDS = {"text": TEXT, "image": IMAGE, "audio": AUDIO, "video": VIDEO}
SHARES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
WINDOWS = 32  # of the plan, that are packed to find the fill

Quantiles = Mapping[str, float]
"""By the names of SHARES; empty where there is nothing to count."""


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """One source's split. What needs a tokenizer or a config is empty, or None, without."""

    shards: int
    bytes: int  # of the tars
    documents: int
    faulty: Mapping[str, int]  # documents, by reason
    parts: Mapping[str, int]  # by kind
    width: Quantiles  # pixels of pictures, as shown
    height: Quantiles
    seconds: Mapping[str, float]  # of sounds and of clips, in all
    sound_seconds: Quantiles
    clip_seconds: Quantiles
    tokens: Mapping[str, int]  # by kind: words of texts; with a config also the slots of media
    lengths: Quantiles  # tokens of whole documents, as they go into packs
    fill: float | None  # share of the packs that is tokens of documents, were this the only source


@dataclass(frozen=True, kw_only=True)
class Stats:
    split: str
    sources: Mapping[str, SourceStats]  # by name, in the mixture's order
    fill: float | None  # of the packs of the mixture

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        return asdict(self)


def stats(
    path: Path,
    split: str,
    tokenizer: Tokenizer | None = None,
    config: RunConfig | None = None,
    cache: Cache | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Stats:
    """Count a spec, or every source of a mixture; indices that are missing are made first, in `workers` processes.

    `config` says how large media arrive at the model, and how documents are packed; it needs a tokenizer too.
    Raises UserError as `Corpus.open` does, and with a config for a source that no run under it could use.
    """
    assert tokenizer or not config, "lengths need a tokenizer"
    mixture = load_mixture(path)
    found, opened = {}, []
    for spec, part in zip(mixture.specs(), mixture.mixture, strict=True):
        corpus = Corpus.open(spec, split, cache, workers, progress)
        source = _endless(corpus, tokenizer, part, config) if tokenizer and config else None
        found[part.source_name(corpus.name)] = _source(corpus, tokenizer, source, config)
        opened += [source] if source else []
    return Stats(split=split, sources=found, fill=_fill(opened, config.data, mixture.unit) if config else None)


def _endless(corpus: Corpus, tokenizer: Tokenizer, part: MixturePart, config: RunConfig) -> Source:
    """A source as a run sees it, but for the limit on its epochs: a fill is counted over as many packs as it needs."""
    endless = part.model_copy(update={"max_epochs": None, "on_exhausted": "renormalise"})
    return Source(corpus, tokenizer, Budget(config.model, corpus.spec), endless, config.data)


def _source(corpus: Corpus, tokenizer: Tokenizer | None, source: Source | None, config: RunConfig | None) -> SourceStats:
    parts = corpus.parts
    chosen = {name: parts["kind"] == kind for name, kind in KINDS.items()}
    pictures, sounds, clips = (parts[chosen[name]] for name in ("image", "audio", "video"))
    sound_seconds, clip_seconds = sounds["samples"] / sounds["rate"], clips["stop"] - clips["start"]
    reasons = np.concatenate([shard.reasons for shard in corpus.shards])
    if source:
        tokens = {name: int(source.tokens[of_kind].sum(dtype=np.int64)) for name, of_kind in chosen.items()}
    else:
        tokens = {"text": int(corpus.token_counts(tokenizer).sum())} if tokenizer else {}
    return SourceStats(
        shards=len(corpus.shards),
        bytes=sum(int(shard.tar_size) for shard in corpus.shards),
        documents=len(corpus),
        faulty=dict(Counter(reason.decode() for reason in reasons[reasons != b""].tolist()).most_common()),
        parts={name: int(of_kind.sum()) for name, of_kind in chosen.items()},
        width=_quantiles(pictures["width"]),
        height=_quantiles(pictures["height"]),
        seconds={"audio": float(sound_seconds.sum()), "video": float(clip_seconds.sum())},
        sound_seconds=_quantiles(sound_seconds),
        clip_seconds=_quantiles(clip_seconds),
        tokens=tokens,
        lengths=_quantiles(source.lengths[source.lengths > 0]) if source else {},
        fill=_fill([source], config.data, "samples") if source and source.weight and config else None,
    )


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return dict(zip(SHARES, np.quantile(values, list(SHARES.values())).tolist(), strict=True))


def _fill(sources: Sequence[Source], data: DataConfig, unit: str) -> float:
    """Share of the tokens of the plan's first packs that are those of documents: of WINDOWS windows or so."""
    plan = Plan(sources, seed=data.seed, unit=unit, pack_tokens=data.pack_tokens, pack_media=data.pack_media, window=data.window)
    packs, documents, tokens = 0, 0, 0
    for slots, _ in plan.walk(plan.begin()):
        packs, documents = packs + 1, documents + len(slots)
        tokens += sum(slot.tokens for slot in slots)
        if documents >= WINDOWS * data.window:
            break
    return tokens / (packs * data.pack_tokens) if packs else 0.0


def render(found: Stats) -> Table:
    """A column for each source."""
    table = Table("", *found.sources, title=f"split {found.split}")
    if found.fill is not None and len(found.sources) > 1:
        table.caption = f"packs of the mixture are {found.fill:.1%} full"
    rows = [_rows(source) for source in found.sources.values()]
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_row(name, *(row.get(name, "-") for row in rows))
    return table


def _rows(source: SourceStats) -> dict[str, str]:
    """What is known of a source, ready to be read."""
    rows = {"shards": f"{source.shards:,}", "bytes": f"{source.bytes:,}", "documents": f"{source.documents:,}"}
    rows |= {f"faulty: {reason}": f"{count:,}" for reason, count in source.faulty.items()}
    rows |= {f"{name} parts": f"{count:,}" for name, count in source.parts.items() if count}
    rows |= {f"{name} seconds": f"{seconds:,.1f}" for name, seconds in source.seconds.items() if seconds}
    rows |= {f"{name} tokens": f"{count:,}" for name, count in source.tokens.items() if count}
    spreads = {
        "picture width": source.width,
        "picture height": source.height,
        "seconds of a sound": source.sound_seconds,
        "seconds of a clip": source.clip_seconds,
        "tokens of a document": source.lengths,
    }
    for name, spread in spreads.items():
        if spread:
            rows[f"{name}: {', '.join(spread)}"] = ", ".join(f"{value:,.5g}" for value in spread.values())
    if source.fill is not None:
        rows["fill of packs"] = f"{source.fill:.1%}"
    return rows
