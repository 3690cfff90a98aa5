"""`mmpt eval ...`: figures of a trained run, written into its folder. What `mmpt report` needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from mmpt.cli.base import group

if TYPE_CHECKING:
    import torch

    from mmpt.config import RunConfig
    from mmpt.evaluate.gallery import ReportExamples
    from mmpt.evaluate.zero_shot import Retrieval
    from mmpt.model.multimodal import MultimodalModel

eval_app = group(help="Measure a trained run.")

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder: runs/NAME")]
SpecPath = Annotated[Path, typer.Option(metavar="SPEC", help="Data spec, YAML.")]
AnySpecPath = Annotated[Path, typer.Option(metavar="SPEC", help="Data spec or mixture, YAML.")]
Split = Annotated[str, typer.Option(help="Split of the spec.")]
ItemOption = Annotated[
    Literal["image", "audio", "video"] | None, typer.Option(help="What is embedded; by default what the split has.")
]
LevelOption = Annotated[
    Literal["backbone", "tower"] | None, typer.Option(help="Where embeddings are taken; by default the model's first level.")
]


@eval_app.command(epilog="mmpt eval retrieval runs/demo --spec data/emoji/spec.yaml")
def retrieval(
    run: RunPath,
    spec: SpecPath,
    split: Split = "val",
    item: ItemOption = None,
    level: LevelOption = None,
    captions: Annotated[
        Literal["first", "all"],
        typer.Option(help="first: the first text of a document; all: every line of every text is a caption of its item."),
    ] = "first",
) -> None:
    """Find pictures, sounds or clips by text, and texts by them.

    Prints R@1, R@5, R@10 and median rank in both directions, and writes them into the run's folder, under eval/.
    """
    _retrieval(_Trained.load(run), spec, split, item, level, captions)


@eval_app.command(epilog="mmpt eval classification runs/clip --spec data_specs/pairs.yaml --classes classes.yaml")
def classification(
    run: RunPath,
    spec: SpecPath,
    classes: Annotated[
        Path,
        typer.Option(metavar="FILE", help="YAML: templates: ['a photo of a {}.'], classes: [names], label: a field of meta."),
    ],
    split: Split = "val",
    item: ItemOption = None,
    level: LevelOption = None,
) -> None:
    """Tell items apart by the names of their classes.

    A class's vector is the mean over the templates. A document's class is the field `label` of its meta, or its first text:
    a name out of the file, or its number from 0. Prints top-1, top-5 and mean per-class accuracy; writes them under eval/.
    """
    from mmpt.evaluate.classification import ClassSet, classification_table, evaluate_classification
    from mmpt.evaluate.results import write_result

    trained, class_set = _Trained.load(run), ClassSet.load(classes)
    with trained.autocast():
        found = evaluate_classification(
            trained.model, trained.config, spec, class_set, split, trained.device, level=level, item=item
        )
    Console().print(classification_table(found))
    named = {"classes_file": str(classes)} | found.to_json()
    typer.echo(
        write_result(run, "classification", named, trained.config, trained.step, spec, split, (classes.stem, *found.variant))
    )


@eval_app.command(epilog="mmpt eval language runs/demo --spec data/emoji/spec.yaml")
def language(run: RunPath, spec: AnySpecPath, split: Split = "val") -> None:
    """Say how well texts are predicted.

    Prints nats per token, perplexity and bits per byte of every source, and writes them into the run's folder, under eval/.
    """
    _language(_Trained.load(run), spec, split)


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A run's model at its newest checkpoint."""

    run: Path
    model: MultimodalModel
    config: RunConfig
    step: int
    device: torch.device

    @classmethod
    def load(cls, run: Path) -> _Trained:
        import torch

        from mmpt.train.checkpoint import load_model

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, config, step = load_model(run, str(device))
        return cls(run=run, model=model, config=config, step=step, device=device)

    def autocast(self) -> torch.autocast:
        from mmpt.train.step import autocast

        return autocast(self.config, self.device)


def _retrieval(
    trained: _Trained,
    spec: Path,
    split: str,
    item: Literal["image", "audio", "video"] | None = None,
    level: Literal["backbone", "tower"] | None = None,
    captions: Literal["first", "all"] = "first",
) -> Retrieval:
    """Writes and prints the result."""
    from mmpt.evaluate.results import write_result
    from mmpt.evaluate.zero_shot import evaluate_retrieval, retrieval_table

    with trained.autocast():
        found = evaluate_retrieval(
            trained.model, trained.config, spec, split, trained.device, level=level, item=item, captions=captions
        )
    Console().print(retrieval_table(found))
    typer.echo(write_result(trained.run, "retrieval", found.to_json(), trained.config, trained.step, spec, split, found.variant))
    return found


def _language(trained: _Trained, spec: Path, split: str) -> None:
    from mmpt.evaluate.language import evaluate_language, language_json, language_table
    from mmpt.evaluate.results import write_result

    with trained.autocast():
        found = evaluate_language(trained.model, trained.config, spec, split, trained.device)
    Console().print(language_table(found))
    typer.echo(write_result(trained.run, "language", language_json(found), trained.config, trained.step, spec, split))


def report_run(run: Path) -> None:
    """Measure a run on the held-out splits of its own data, as far as it has any, and write its report."""
    from mmpt.evaluate.report import write_report

    trained = _Trained.load(run)
    examples = _measure_held_out(trained)
    typer.echo(write_report(run, examples))


def _measure_held_out(trained: _Trained) -> ReportExamples | None:
    """Retrieval on each split that has pairs, language where tokens are predicted; examples of the first split with pictures."""
    from mmpt.data.spec import load_mixture
    from mmpt.evaluate.gallery import gallery
    from mmpt.evaluate.split import HeldOut
    from mmpt.train.evaluation import SPLIT
    from mmpt.types import IMAGE, MODALITIES

    examples, config = None, trained.config
    specs = [spec for spec in load_mixture(config.data.spec).corpora() if SPLIT in spec.split]
    opened = [HeldOut(config, spec.path, SPLIT) for spec in specs]
    for held_out in opened:
        for item, level in product(held_out.paired_items(), config.model.levels):
            found = _retrieval(trained, held_out.spec, SPLIT, MODALITIES[item], level)
            if item == IMAGE and examples is None:
                with trained.autocast():
                    examples = gallery(trained.model, held_out, found.embedded, trained.device)
    is_asked = config.objectives.next_token.weight and config.model.fusion and config.model.transformer.mask != "bidirectional"
    if is_asked and any(held_out.predicts for held_out in opened):
        _language(trained, Path(config.data.spec), SPLIT)
    return examples
