"""The first packs of a run, and the documents in them as the model sees them, in one HTML file that opens offline.

    config, spec --open_sources, Plan.walk--> packs of pieces --ArticleWriter--> articles
    figures, packs, articles --preview.html.jinja--> page

Nothing of a stranger's reaches the page as it was: media are encoded anew, texts made legible and escaped. It runs no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from mmpt.config import AugmentConfig, RunConfig
from mmpt.data.articles import NAMES, WORDS, ArticleWriter, Piece, pieces_of
from mmpt.data.inline import Allowance, legible
from mmpt.data.loader import TRAIN, open_sources, plan_of
from mmpt.data.mixture import Slot
from mmpt.data.quarantine import index_faults
from mmpt.data.source import Source
from mmpt.data.spec import load_mixture
from mmpt.data.tokens import Tokenizer
from mmpt.types import TEXT, UserError

FEWEST_PACKS, MOST_PACKS = 6, 16
PAGE_BYTES = 28 * 2**20  # of the documents; packs and style take little beside them
FAULTS = 20  # of the index that are named


def preview(config: RunConfig, out: Path, *, spec: Path, split: str = TRAIN, documents: int = 24) -> Path:
    """Write the first packs of a spec or a mixture, and the first `documents` documents in them, to `out`; return it.

    Sizes, packs and tokenizer are those of `config`, whose own spec is not read. Pictures of the split `train` are augmented as
    in training. The page has 30 MiB at most: documents beyond that are left out. Raises UserError as `open_sources` does.
    """
    config = config.model_copy(update={"data": config.data.model_copy(update={"spec": str(spec)})})
    mixture, tokenizer = load_mixture(spec), Tokenizer.of(config.data)
    sources = open_sources(config, tokenizer, split)
    packs = first_packs(sources, config, mixture.unit, documents)
    augmentation = config.data.augment if split == TRAIN else AugmentConfig()
    writer = ArticleWriter(sources, tokenizer, augmentation, Allowance(PAGE_BYTES))
    faults = [fault for source in sources for fault in index_faults(source.corpus)]
    template = _environment().get_template("preview.html.jinja")
    page = template.render(
        name=mixture.name,
        split=split,
        data=config.data,
        vocabulary=len(tokenizer),
        unit=mixture.unit,
        figures=[_figures(source) for source in sources],
        is_augmented=augmentation != AugmentConfig(),
        packs=packs,
        articles=list(writer.articles(packs, documents)),
        faults=[(fault, legible(fault.detail[:WORDS])) for fault in faults[:FAULTS]],
        more_faults=max(len(faults) - FAULTS, 0),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _environment() -> Environment:
    loader = PackageLoader("mmpt.data", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=lambda value: f"{value:,.0f}", percent=lambda share: f"{100 * share:.1f} %")
    # The golden angle: documents that follow one another get colors that lie far apart.
    environment.globals.update(names=list(NAMES.values()), hue=lambda number: round(number * 137.508) % 360)
    return environment


def _figures(source: Source) -> dict[str, Any]:
    """Of one epoch of a source: documents, and tokens by modality."""
    sums = np.bincount(source.corpus.parts["kind"], weights=source.tokens, minlength=len(NAMES))
    tokens = {name: int(sums[modality]) for modality, name in NAMES.items()}
    total = int(source.lengths.sum(dtype=np.int64))
    said = NAMES[TEXT]  # of which CLIP takes no more than its longest segment holds
    tokens[said] = min(tokens[said], total - sum(count for name, count in tokens.items() if name != said))
    rest = total - sum(tokens.values())  # <bos>, <eos>, <emb>, and what stands there a second time to be contrasted
    return {"name": source.name, "documents": source.size, "weight": source.weight, **tokens, "rest": rest, "total": total}


def first_packs(sources: Sequence[Source], config: RunConfig, unit: str, documents: int) -> list[list[Piece]]:
    """The first packs of the plan: so many that they hold `documents` documents, but FEWEST_PACKS to MOST_PACKS."""
    plan = plan_of(sources, config.data, unit)
    wanted = min(documents, sum(int((source.lengths > 0).sum()) for source in sources if source.weight))
    numbers: dict[tuple[int, int], int] = {}
    packs: list[list[Piece]] = []
    try:
        for slots, _ in plan.walk(plan.begin()):
            packs.append([_piece(sources[slot.source], slot, numbers) for slot in slots])
            if len(packs) == MOST_PACKS or (len(packs) >= FEWEST_PACKS and len(numbers) >= wanted):
                break
    except UserError:
        if not packs:
            raise  # else a source that must not be exhausted is, and the plan ends here
    if not packs:
        raise UserError("mixture: max_epochs leaves no whole document to draw; raise it")
    return packs


def _piece(source: Source, slot: Slot, numbers: dict[tuple[int, int], int]) -> Piece:
    """`numbers` are those given to documents so far; one that is met for the first time gets the next."""
    number = numbers.setdefault((slot.source, slot.document), len(numbers))
    is_whole = len(pieces_of(source, slot)) == 1
    rows = int(source.media_rows[slot.document]) if is_whole else source.pieces(slot.document, slot.epoch)[slot.piece][1]
    return Piece(number=number, source=source.name, key=source.corpus.key(slot.document), slot=slot, rows=rows)
