"""The command line: parse, call one function, print. Every mistake of the user's ends in one line, in `main`.

Commands import what they need when they run: torch takes seconds, and `--help` should not.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import typer
from rich.console import Console
from typer.exceptions import TyperException

from mmpt.cli.base import ConfigPath, Overrides, group
from mmpt.cli.cost import cost
from mmpt.cli.data import build_emoji, data_app
from mmpt.cli.evaluate import RunPath, eval_app, report_run
from mmpt.cli.export import export
from mmpt.cli.verify import verify_app

DEMO = Path("configs/demo.yaml")
OF_THE_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR)
"""Operating system errors that a path of the user's causes; any other is a fault of mmpt's and keeps its traceback."""

app = group(help="Pretrain multimodal models on tar shards, and see what they find.", epilog="Start with: mmpt demo")
config_app = group(help="Look at configs.")
app.add_typer(eval_app, name="eval")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(verify_app, name="verify")
app.command(epilog="mmpt export runs/demo --to safetensors")(export)
config_app.command(epilog="mmpt config cost configs/long_1m.yaml --bandwidth 45")(cost)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a mistake of the user's, 130 when stopped by Ctrl-C."""
    try:
        code = int(app(arguments, prog_name="mmpt", standalone_mode=False) or 0)
        if code == 130 and os.environ.get("RANK", "0") == "0":  # typer's for Ctrl-C, which reaches all ranks
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


@app.command(epilog="mmpt report runs/demo")
def report(run: RunPath) -> None:
    """Write a run's report.html.

    One page that opens offline: loss curves, throughput, the config, retrieval and language on the held-out splits of the run's
    own data, every other result of `mmpt eval`, and examples of what the model finds and says.
    """
    report_run(run)


@config_app.command(
    epilog="mmpt config show configs/demo.yaml model.transformer.layers=12\n\nmmpt config show configs/models/llama_3_1_8b.yaml"
)
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved config of a run, or of a model alone.

    Every default is written out; the parameters of the model, part by part, stand below as comments.
    """
    import torch

    from mmpt.config import dump, load_either
    from mmpt.model.multimodal import MultimodalModel, parameter_counts

    resolved = load_either(config, overrides)
    with torch.device("meta"):
        counts = parameter_counts(MultimodalModel(getattr(resolved, "model", resolved)))
    typer.echo(dump(resolved))
    typer.echo("# parameters")
    for part, count in counts.items():
        typer.echo(f"# {part:<20} {count:>18,}")


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
    report_run(run_training(config, console=Console()))
    typer.echo(f"{time.monotonic() - began:.0f} s in all")


def _is_stale(spec: Path) -> bool:
    """Whether shards are missing, or older than the code that writes them."""
    from mmpt.data import shards, tokens
    from mmpt.recipes import emoji

    written_by = [Path(module.__file__) for module in (emoji, shards, tokens)]
    return not spec.is_file() or spec.stat().st_mtime < max(path.stat().st_mtime for path in written_by)
