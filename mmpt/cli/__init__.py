"""The command line: parse, call one function, print. Every mistake of the user's ends in one line, in `main`.

Commands import what they need when they run: torch takes seconds, and `--help` should not.
"""

from __future__ import annotations

import errno
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.exceptions import TyperException

from mmpt.cli.base import ConfigPath, Overrides, group
from mmpt.cli.data import build_emoji, data_app, verify_app

if TYPE_CHECKING:
    import torch

    from mmpt.config import RunConfig
    from mmpt.evaluate.embed import Embeddings
    from mmpt.model.multimodal import MultimodalModel

DEMO = Path("configs/demo.yaml")
OF_THE_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR)
"""Operating system errors that a path of the user's causes; any other is a fault of mmpt's and keeps its traceback."""

app = group(help="Pretrain multimodal models on tar shards, and see what they find.", epilog="Start with: mmpt demo")
eval_app = group(help="Measure a trained run.")
config_app = group(help="Look at configs.")
app.add_typer(eval_app, name="eval")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(verify_app, name="verify")

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder: runs/NAME")]


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a mistake of the user's, 130 when stopped by Ctrl-C."""
    try:
        code = int(app(arguments, prog_name="mmpt", standalone_mode=False) or 0)
        if code == 130:  # typer's for Ctrl-C
            _complain("stopped; a run goes on from its last checkpoint when the command is given again")
        return code
    except TyperException as error:
        return _complain_of_usage(error)
    except OSError as error:
        if error.errno not in OF_THE_USER:
            raise
        _complain(f"error: {error.filename or 'output'}: {error.strerror}")
        return 2
    except Exception as error:
        from mmpt.types import UserError

        if not isinstance(error, UserError):
            raise
        for line in str(error).splitlines():
            _complain(f"error: {line}")
        return 2
    return 0


def _complain_of_usage(error: TyperException) -> int:
    """A word that no command or option takes, in one line; a group without a command has printed its help already."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if message and not message.startswith("Usage:"):
        where = context.command_path if context else "mmpt"
        _complain(f"error: {message.replace('Value error, ', '').rstrip('.')}; see `{where} --help`")
    elif message:
        print(message)
    return 2


def _complain(line: str) -> None:
    # Names and values in a message may come from a stranger's file: no control character reaches the terminal.
    print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)


@app.command(
    epilog="mmpt train configs/demo.yaml train.steps=2000\n\ntorchrun --nproc-per-node 2 -m mmpt train configs/demo.yaml"
)
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a run, or go on with it.

    The run lies in runs/NAME, NAME being the config's `name`. Where it has a checkpoint, it goes on from the last one.
    """
    from mmpt.config import load
    from mmpt.train.loop import train as run_training

    run_training(load(config, overrides), console=Console())


@eval_app.callback()
def _eval() -> None:
    """Keeps `retrieval` a command of its own while it is the only one."""


@eval_app.command(epilog="mmpt eval retrieval runs/demo --spec data/emoji/spec.yaml")
def retrieval(
    run: RunPath,
    spec: Annotated[Path, typer.Option(metavar="SPEC", help="Data spec, YAML, of the pictures and texts to search.")],
    split: Annotated[str, typer.Option(help="Split of the spec.")] = "val",
) -> None:
    """Find pictures by text, and texts by picture.

    Prints R@1, R@5, R@10 and median rank in both directions, and writes them into the run's folder, under eval/.
    """
    _evaluate(run, spec, split)


@app.command(epilog="mmpt report runs/demo")
def report(run: RunPath) -> None:
    """Write a run's report.html.

    One page that opens offline: loss curves, throughput, the config, retrieval on the held-out split of the run's own data,
    and examples of what the model finds and says.
    """
    _report(run)


@config_app.command(epilog="mmpt config show configs/demo.yaml model.transformer.layers=12")
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved config.

    Every default is written out; the parameters of the model, part by part, stand below as comments.
    """
    import torch

    from mmpt.config import dump, load
    from mmpt.model.multimodal import MultimodalModel, parameter_counts

    resolved = load(config, overrides)
    with torch.device("meta"):
        counts = parameter_counts(MultimodalModel(resolved.model))
    typer.echo(dump(resolved))
    typer.echo("# parameters")
    for part, count in counts.items():
        typer.echo(f"# {part:<20} {count:>15,}")


@config_app.command(epilog="mmpt config schema > run.schema.json")
def schema() -> None:
    """Print the JSON schema of configs.

    Editors complete and check configs by it.
    """
    import json

    from mmpt.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def demo() -> None:
    """Build data, train, evaluate, report.

    Trains configs/demo.yaml on emoji, a few minutes on two cores. Stopped and given again, it goes on where it was.
    """
    from mmpt.config import load
    from mmpt.train import checkpoint
    from mmpt.train.loop import train as run_training
    from mmpt.types import UserError

    began = time.monotonic()
    if not DEMO.is_file():
        raise UserError(f"{DEMO}: no such file here; run `mmpt demo` in the folder of the repository")
    config = load(DEMO)
    if _is_stale(Path(config.data.spec)):
        build_emoji(Path(config.data.spec).parent)
    newest = checkpoint.newest(Path("runs") / config.name)
    if newest and checkpoint.read_state(newest)[0].step == config.train.steps:
        typer.echo(f"runs/{config.name} is trained to its last step already; `rm -r runs/{config.name}` starts it anew")
    _report(run_training(config, console=Console()))
    typer.echo(f"{time.monotonic() - began:.0f} s in all")


def _is_stale(spec: Path) -> bool:
    """Whether shards are missing, or older than the code that writes them."""
    from mmpt.data import shards, tokens
    from mmpt.recipes import emoji

    written_by = [Path(module.__file__) for module in (emoji, shards, tokens)]
    return not spec.is_file() or spec.stat().st_mtime < max(path.stat().st_mtime for path in written_by)


@dataclass(frozen=True, kw_only=True)
class _Evaluated:
    """What the report needs of an evaluation beside its result."""

    model: MultimodalModel
    config: RunConfig
    spec: Path
    embeddings: Embeddings
    device: torch.device


def _evaluate(run: Path, spec: Path | None, split: str) -> _Evaluated:
    """Retrieval by the newest checkpoint of a run, on its own held-out spec if none is given; writes and prints the result."""
    import torch

    from mmpt.evaluate.zero_shot import evaluate_retrieval, retrieval_table, write_result
    from mmpt.train.checkpoint import load_model
    from mmpt.train.evaluation import held_out_spec
    from mmpt.train.step import autocast

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config, step = load_model(run, str(device))
    spec = spec or held_out_spec(config)
    with autocast(config, device):
        result, embeddings = evaluate_retrieval(model, config, spec, split, device)
    path = write_result(run, result, config, step, spec, split)
    Console().print(retrieval_table(result))
    typer.echo(path)
    return _Evaluated(model=model, config=config, spec=spec, embeddings=embeddings, device=device)


def _report(run: Path) -> None:
    from mmpt.data.corpus import Corpus
    from mmpt.data.loader import cache_of
    from mmpt.data.spec import load_spec
    from mmpt.evaluate.gallery import gallery
    from mmpt.evaluate.report import write_report
    from mmpt.train.evaluation import SPLIT
    from mmpt.train.step import autocast

    found = _evaluate(run, None, SPLIT)
    corpus = Corpus.open(load_spec(found.spec), SPLIT, cache_of(found.config.data))
    with autocast(found.config, found.device):
        examples = gallery(found.model, found.config, corpus, SPLIT, found.embeddings, found.device)
    typer.echo(write_report(run, examples))
