"""Zero-shot classification: items against the names of their classes, put into templates. Pictures, sounds and clips alike.

classes.yaml --ClassSet--> templates x names --embed_texts--> class vectors
spec, split --HeldOut, embed--> items, labels --classify--> accuracy --> runs/NAME/eval/classification-<spec>-<split>-....json
"""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from jaxtyping import Float, Int
from pydantic import Field, ValidationError, field_validator
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import PlainLoader, RunConfig, Section, explain
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import Level, embed_items, embed_texts
from mmpt.evaluate.split import WORDS, HeldOut, ItemName
from mmpt.types import MODALITIES, Document, Text, UserError

KS = (1, 5)
BLOCK_SCORES = 1 << 24  # scores held at once
MAX_BYTES = 1 << 22  # of a file of classes; ImageNet's names and templates have some thirty thousand

PROTOCOL = (
    "Class vector: mean of the unit embeddings of the templates filled with the class's name, brought to unit length. "
    "Cosine scores against all classes, in fp32; of classes that score the same, the one that stands first in the file wins. "
    "Averaged over items; mean_per_class_recall: top-1 averaged over the items of each class, then over classes with items."
)


class ClassSet(Section):
    """The classes that items are told apart by."""

    templates: tuple[str, ...] = Field(min_length=1, description="sentences in which {} stands for a class's name")
    classes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=2, description="names, in the order of their numbers"
    )
    label: str | None = Field(
        None,
        description="field of a document's meta that says its class, by name or number from 0; none: its first text does",
    )

    @field_validator("templates")
    @classmethod
    def _one_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r}: write {{}} once, where the class's name belongs")
        return value

    @classmethod
    def load(cls, path: str | Path) -> ClassSet:
        """Read a YAML file. Raises UserError, one line for each mistake."""
        path, where = Path(path), f"classes {path}"
        if not path.is_file():
            raise UserError(f"{where}: no such file; write YAML with `templates: [...]` and `classes: [...]`")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{where}: {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(tree, dict):
            raise UserError(f"{where}: a mapping is wanted (templates, classes)")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError("\n".join(explain(cls, error, where))) from error

    def prompts(self) -> list[str]:
        """Every template of the first class, then of the second, ..."""
        return [template.replace("{}", name) for name in self.classes for template in self.templates]

    def number_of(self, document: Document) -> int:
        """The class of a document. Raises UserError for a label that is none of the classes."""
        if self.label is None:
            said = next((part.text.strip() for part in document.parts if isinstance(part, Text)), None)
        else:
            said = document.meta.get(self.label)
        where = f"document {document.key} of {document.source}: its {f'meta.{self.label}' if self.label else 'text'}"
        if self.label is not None and said is None:
            raise UserError(f"{where} is not there; its meta has {', '.join(document.meta) or 'nothing'} (the classes' `label`)")
        if isinstance(said, str):
            if len(numbers := self._numbers.get(said, ())) > 1:
                raise UserError(f"{where} = {said!r} is the name of {len(numbers)} classes; let the labels be numbers")
            if numbers:
                return numbers[0]
            said = int(said) if said.isascii() and said.isdigit() and len(said) < 10 else said
        if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < len(self.classes):
            return said
        close = difflib.get_close_matches(str(said)[:100], self.classes, n=1) if said is not None else []
        hint = f"; did the file mean {close[0]!r}?" if close else ""
        raise UserError(f"{where} = {reprlib.repr(said)} is none of the {len(self.classes)} classes, nor the number of one{hint}")

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        numbers: dict[str, list[int]] = {}
        for number, name in enumerate(self.classes):
            numbers.setdefault(name, []).append(number)
        return numbers


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Averages over the items of a split; all lie in [0, 1]."""

    items: int
    classes: int
    classes_present: int  # that any item belongs to
    top: dict[int, float]  # k -> share of items whose class is among the k best
    mean_per_class_recall: float
    majority: float  # top-1 of always saying the most frequent class

    def to_json(self) -> dict[str, Any]:
        counts = {"items": self.items, "classes": self.classes, "classes_present": self.classes_present}
        top = {f"top-{k}": value for k, value in self.top.items()}
        chance = {f"top-{k}": k / self.classes for k in self.top}
        averages = {"mean_per_class_recall": self.mean_per_class_recall, "majority": self.majority}
        return {**counts, **top, **averages, "chance": chance}


def class_vectors(embeddings: Float[Tensor, "rows E"], classes: int) -> Float[Tensor, "classes E"]:
    """Of the unit embeddings of every template of the first class, then of the second, ...: their means, of unit length."""
    return F.normalize(embeddings.view(classes, -1, embeddings.shape[1]).mean(dim=1), dim=-1)


def classify(items: Float[Tensor, "N E"], classes: Float[Tensor, "C E"], labels: Int[Tensor, " N"]) -> Accuracy:
    """Score every item against every class, a block of items at a time.

    `labels[i]` is the row of `classes` that item i belongs to. Raises ValueError for values that are not finite.
    """
    for name, values in (("items", items), ("classes", classes)):
        if not values.isfinite().all():
            row = int((~values.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"{name}[{row}] holds a value that is not finite")
    rows = max(1, BLOCK_SCORES // len(classes))
    with torch.no_grad(), torch.autocast(items.device.type, enabled=False):
        ranks = [
            _ranks(block.float() @ classes.float().T, right)
            for block, right in zip(items.split(rows), labels.split(rows), strict=True)
        ]
    rank = torch.cat(ranks)
    counts = torch.bincount(labels, minlength=len(classes))
    hits = torch.bincount(labels[rank == 1], minlength=len(classes))
    present = counts > 0
    return Accuracy(
        items=len(items),
        classes=len(classes),
        classes_present=int(present.sum()),
        top={k: (rank <= k).double().mean().item() for k in KS if k < len(classes)},
        mean_per_class_recall=(hits[present] / counts[present].double()).mean().item(),
        majority=int(counts.max()) / len(items),
    )


def _ranks(scores: Float[Tensor, "B C"], right: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Place of the right class, from 1; of equal scores the first stands before the others."""
    own = scores.gather(1, right[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < right[:, None]
    return 1 + ((scores > own) | ((scores == own) & before)).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Classification:
    """A result, and what was told apart."""

    accuracy: Accuracy
    templates: int
    item: ItemName
    level: Level

    @property
    def variant(self) -> tuple[str, ...]:
        return self.item, self.level

    def to_json(self) -> dict[str, Any]:
        named = {"item": self.item, "level": self.level, "templates": self.templates}
        return {**named, **self.accuracy.to_json(), "protocol": PROTOCOL}


def evaluate_classification(
    model: nn.Module,
    config: RunConfig,
    spec: str | Path,
    classes: ClassSet,
    split: str,
    device: torch.device | str,
    *,
    level: Level | None = None,
    item: ItemName | None = None,
) -> Classification:
    """Tell the items of a split apart by the names of their classes, with the run's tokenizer.

    `level`, `item` and precision as in `evaluate_retrieval`. Raises UserError for labels that are no classes, and for a split
    without embedded items.
    """
    held_out = HeldOut(config, spec, split)
    level, modality = held_out.level(level), held_out.item(item)
    try:
        items, keys = embed_items(model, held_out.batches(), device, level=level, item=modality)
        labels = torch.tensor([classes.number_of(held_out.document(key)) for key in keys])
        vectors = build_classifier(model, classes, held_out.tokenizer, config, device, level=level)
        accuracy = classify(items, vectors, labels)
    except ValueError as error:
        raise UserError(f"classification on {spec}, split {split!r}: {error}") from error
    return Classification(accuracy=accuracy, templates=len(classes.templates), item=MODALITIES[modality], level=level)


def build_classifier(
    model: nn.Module, classes: ClassSet, tokenizer: Tokenizer, config: RunConfig, device: torch.device | str, *, level: Level
) -> Float[Tensor, "C E"]:
    """The class vectors, on the CPU in fp32: open_clip's `build_zero_shot_classifier`, transposed."""
    embeddings = embed_texts(model, classes.prompts(), tokenizer, config, device, level=level)
    return class_vectors(embeddings, len(classes.classes))


def classification_table(found: Classification) -> Table:
    """Accuracy beside chance, for a terminal."""
    accuracy = found.accuracy
    counts = f"{accuracy.items} {WORDS[found.item]}s of {accuracy.classes_present} classes, {accuracy.classes} to choose from"
    table = Table(title=f"Zero-shot classification ({found.level}), {counts}")
    table.add_column("")
    for name in (*(f"top-{k}" for k in accuracy.top), "mean per class"):
        table.add_column(name, justify="right")
    table.add_row("accuracy", *(f"{value:.1%}" for value in accuracy.top.values()), f"{accuracy.mean_per_class_recall:.1%}")
    chance = [f"{k / accuracy.classes:.1%}" for k in accuracy.top]
    table.add_row("  chance", *chance, f"{1 / accuracy.classes:.1%}", style="dim")
    table.add_row("  most frequent class", f"{accuracy.majority:.1%}", style="dim")
    return table
