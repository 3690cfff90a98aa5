"""`mmpt data ...`: from a corpus to shards, and what is in them."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mmpt.cli.base import Bar, group

if TYPE_CHECKING:
    from mmpt.config import RunConfig
    from mmpt.data.cache import Cache
    from mmpt.data.tokens import Tokenizer

data_app = group(help="Build shards, index, check and see them.")

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Data spec, YAML.")]
AnySpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Data spec or mixture, YAML.")]
Split = Annotated[str, typer.Option(help="Split of the spec.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
TokenizerPath = Annotated[Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json, or open_clip:NAME.")]
RunConfigPath = Annotated[
    Path | None, typer.Option("--config", metavar="CONFIG", help="A run's config: tokens as it would see them.")
]
CacheFolder = Annotated[Path, typer.Option("--cache", metavar="DIR", help="For copies of remote shards; 64 GiB at most.")]
CACHE = Path("~/.cache/mmpt")
CACHE_BYTES = 64 * 2**30
EMOJI = "emoji"


@data_app.command(epilog="mmpt data build emoji --out data/emoji\n\nmmpt data build data_specs/obelics.yaml --out data/obelics")
def build(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="emoji, or a data spec of another format (YAML).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the shards and their spec.yaml.")],
) -> None:
    """Write a corpus as shards.

    SOURCE is the emoji recipe, or a spec of format text, mmc4, obelics, llava or csv. Stopped and given again, a build goes
    on after its last whole shard; the result is the same to the byte. Rows that are faulty stand in DIR/build_faults.jsonl.
    """
    if source == EMOJI:
        build_emoji(out)
        return
    if not Path(source).is_file():
        raise typer.BadParameter(f"{source!r} is neither {EMOJI!r} nor a file", param_hint="SOURCE")
    from mmpt.data.spec import load_spec
    from mmpt.recipes.build import FAULTS, Progress, build_spec

    with Bar("building", "bytes") as tell:

        def show(progress: Progress) -> None:
            tell(progress.bytes_done, progress.bytes_total)
            last.append(progress)

        last: deque[Progress] = deque(maxlen=1)
        spec = build_spec(load_spec(source), out, show)
    for told in last:
        counts = f"{told.documents:,} documents; {told.skipped:,} rows skipped, {told.left_out:,} pictures left out"
        typer.echo(counts + (f": see {out / FAULTS}" if told.skipped or told.left_out else ""))
    typer.echo(f"{spec} and its shards are written")


def build_emoji(out: Path) -> None:
    from mmpt.recipes import emoji

    typer.echo(f"building {out}")
    with Bar("building", "documents") as tell:
        spec = emoji.build(out, tell)
    typer.echo(f"{spec} and its shards are written")


@data_app.command(epilog="mmpt data index data/emoji/spec.yaml --tokenizer data/emoji/tokenizer.json")
def index(
    spec: AnySpecPath,
    config: RunConfigPath = None,
    tokenizer: TokenizerPath = None,
    workers: Workers = 2,
    cache: CacheFolder = CACHE,
) -> None:
    """Index shards, all splits of them.

    A sidecar is written beside each shard, so that training starts at once: where members lie, what the parts of every
    document are, and with --tokenizer, or the --config that names it, how many tokens its texts have. What is up to date
    stays as it is.
    """
    from mmpt.data.corpus import Corpus
    from mmpt.data.quarantine import index_faults
    from mmpt.data.spec import load_mixture

    words = _tokenizer(tokenizer, _run(config))
    for one in load_mixture(spec).corpora():
        for split in one.split:
            with Bar(f"indexing {one.name}", "shards") as tell:
                corpus = Corpus.open(one, split, _cache(cache), workers, tell)
            text = f"{one.name} {split}: {len(corpus):,} documents in {len(corpus.shards):,} shards"
            if words:
                with Bar(f"counting {one.name}", "shards") as tell:
                    text += f", {corpus.token_counts(words, workers, tell).sum():,} tokens of text"
            faults = index_faults(corpus)
            typer.echo(text + (f", {len(faults):,} faulty: see `mmpt data validate`" if faults else ""))


@data_app.command(epilog="mmpt data validate data/emoji/spec.yaml")
def validate(
    spec: SpecPath,
    split: Annotated[list[str] | None, typer.Option(help="Split of the spec; all of them if none is given.")] = None,
    workers: Workers = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache: CacheFolder = CACHE,
) -> None:
    """Read every byte and decode every medium; name every fault.

    Damaged or unsorted tars, duplicate keys, missing members, media that do not decode or have another size than is written.
    The exit code is 1 if there is any.
    """
    from mmpt.data.spec import load_spec
    from mmpt.data.validate import render
    from mmpt.data.validate import validate as check

    with Bar("reading", "shards") as tell:
        report = check(load_spec(spec), split, workers, tell, _cache(cache))
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
    else:
        Console().print(
            render(report) if report.faults else f"{report.documents:,} documents of {report.shards:,} shards: no faults"
        )
    raise typer.Exit(1 if report.faults else 0)


@data_app.command(epilog="mmpt data stats data/emoji/spec.yaml --config configs/demo.yaml")
def stats(
    spec: AnySpecPath,
    split: Split = "train",
    config: RunConfigPath = None,
    tokenizer: TokenizerPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache: CacheFolder = CACHE,
) -> None:
    """Count documents, parts, sizes, seconds and tokens."""
    from mmpt.data.stats import render
    from mmpt.data.stats import stats as count

    run = _run(config)
    words = _tokenizer(tokenizer, run)
    with Bar("indexing", "shards") as tell:
        found = count(spec, split, words, run, _cache(cache), progress=tell)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        Console().print(render(found))


def _cache(folder: Path) -> Cache:
    from mmpt.data.cache import Cache

    return Cache(path=folder.expanduser(), max_bytes=CACHE_BYTES)


def _run(config: Path | None) -> RunConfig | None:
    from mmpt.config import load

    return load(config) if config else None


def _tokenizer(path: Path | None, run: RunConfig | None) -> Tokenizer | None:
    """The tokenizer that was named, else the run's, if there is one."""
    from mmpt.data.tokens import Tokenizer

    return Tokenizer.load(path) if path else Tokenizer.of(run.data) if run else None


@data_app.command(epilog="mmpt data preview data/emoji/spec.yaml --config configs/demo.yaml")
def preview(
    spec: AnySpecPath,
    config: Annotated[Path, typer.Option(metavar="CONFIG", help="The run's config: its tokenizer, media and packs.")],
    split: Split = "train",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; else beside SPEC, with its name.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="The most documents to show.")] = 24,
) -> None:
    """Show documents as the model sees them.

    Writes one page that opens offline: packs coloured by document, and of each document its parts, pictures, players and tokens.
    """
    from mmpt.config import load
    from mmpt.data.preview import preview as write_page

    typer.echo(write_page(load(config), out or spec.with_suffix(".html"), spec=spec, split=split, documents=documents))
