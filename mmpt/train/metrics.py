"""What a run says of itself: a line of metrics.jsonl, a TensorBoard event, and a line or a bar for the person who waits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """runs/NAME/metrics.jsonl and TensorBoard events. Opened at a step, it forgets what was logged after that step:
    a resumed run writes those lines again."""

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        self.seconds_before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.rename(self.path)
        self.events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        with self.path.open("a") as lines:
            lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            self.events.add_scalar(name if "/" in name else f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.events.close()


def read_metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Clock:
    """Seconds of training, evaluation left out, and the rates since they were last read."""

    def __init__(self, seconds_before: float) -> None:
        self.total, self.began = seconds_before, time.perf_counter()
        self.seconds_per_step = 0.0
        self._reset()

    def _reset(self) -> None:
        self.samples = self.steps = 0

    def count(self, samples: float) -> None:
        """A step is done: how many samples it had."""
        self.samples, self.steps = self.samples + samples, self.steps + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.began
        self.total, self.began = self.total + elapsed, time.perf_counter()
        self.seconds_per_step = elapsed / max(self.steps, 1)
        rates = {"samples_per_second": self.samples / elapsed}
        self._reset()
        return {"seconds": self.total, **rates}


class Ticker:
    """Live progress: a bar on a terminal, a plain line at each logged step elsewhere; silent on every rank but the first."""

    def __init__(self, console: Console, steps: int, done: int, *, silent: bool) -> None:
        self.console, self.silent = console, silent
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=silent or not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, completed=done, figures="")
        self.steps = steps

    def __enter__(self) -> Ticker:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def log(self, step: int, values: Mapping[str, float], seconds_left: float) -> None:
        """Show the figures of a logged step."""
        parts = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in objectives(values).items())
        figures = f"loss {values['loss']:.3f}{f' ({parts})' if parts else ''}  {values['samples_per_second']:.0f} samples/s"
        self.bar.update(self.task, figures=figures)
        if not self.silent and not self.console.is_terminal:
            self.say(f"step {step}/{self.steps}  {figures}  {_clock(seconds_left)} left")

    def say(self, line: str) -> None:
        if not self.silent:
            self.console.print(line, highlight=False, soft_wrap=True)


def objectives(values: Mapping[str, float]) -> dict[str, float]:
    """The weighted loss of each objective among the figures of a step: those of one objective's terms added up."""
    sums: dict[str, float] = {}
    for name, value in values.items():
        kind, _, rest = name.partition("/")
        objective = rest.split("/")[0]
        if kind == "loss" and objective not in ("", "source", "modality"):
            sums[objective] = sums.get(objective, 0.0) + value
    return sums


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
