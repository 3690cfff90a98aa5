"""The contrastive loss alone beside open_clip's ClipLoss: time forward and backward, and memory over the inputs.

    python benchmarks/loss.py [--sizes 256 1024 4096 8192 16384] [--width 512] [--threads 2] [--seconds 12]

Same features, same gradients (both sides and the scale; compared, and printed), one process. Rounds are interleaved and figures
are medians. bf16: features in bf16 for both, and errors are against what fp32 makes of the same features. Memory is the
operating system's high-water mark (VmHWM) in a process of its own, less what was resident before: gradients are part of it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmpt.objectives.pairs import pair_losses

SCALE = 14.3  # CLIP's at the start; neither side's time depends on it
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = (3, 201)  # at least, at most
Run = Callable[[], tuple[Tensor, ...]]


def features(pairs: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit vectors, those of a pair a little alike."""
    generator = torch.Generator().manual_seed(pairs)
    a, b = (F.normalize(torch.randn(pairs, width, generator=generator), dim=-1) for _ in range(2))
    b = F.normalize(b.add_(a, alpha=0.3), dim=-1)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def ours(a: Tensor, b: Tensor) -> Run:
    """Loss and gradients of mmpt; looking for duplicates is part of it."""
    scale = torch.tensor([SCALE], requires_grad=True)
    contents = torch.arange(2 * len(a)).view(2, len(a)).T

    def run() -> tuple[Tensor, ...]:
        total, *_ = pair_losses(a, b, scale, None, contents, loss="infonce", exchange="gather", group=None)
        loss = total / len(a)
        return loss.detach(), *torch.autograd.grad(loss, (a, b, scale))

    return run


def clips(a: Tensor, b: Tensor) -> Run:
    """The same of open_clip."""
    scale, criterion = torch.tensor(SCALE, requires_grad=True), ClipLoss()

    def run() -> tuple[Tensor, ...]:
        loss = criterion(a, b, scale)
        return loss.detach(), *torch.autograd.grad(loss, (a, b, scale))

    return run


RUNS = {"mmpt": ours, "ClipLoss": clips}


def error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest over loss and gradients: norm of the difference over the norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in pairs)


def compare(a: Tensor, b: Tensor) -> dict[str, float]:
    """Errors in loss and gradients. fp32: ours against ClipLoss's; bf16: of both against those of fp32."""
    if a.dtype == torch.float32:
        found = {"mmpt": error(ours(a, b)(), clips(a, b)())}
        assert found["mmpt"] < 1e-5, found
        return found
    reference = ours(*(x.detach().float().requires_grad_() for x in (a, b)))()
    found = {name: error(make(a, b)(), reference) for name, make in RUNS.items()}
    assert found["mmpt"] < 1.2 * found["ClipLoss"], found
    return found


def seconds(runs: dict[str, Run], budget: float) -> dict[str, list[float]]:
    """Of every round, in turns, for about `budget` seconds."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + budget
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() > stop:
            break
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
    return taken


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak(name: str, pairs: int, width: int, kind: str, threads: int) -> None:
    """Print the bytes that a loss takes over its inputs. For a fresh process."""
    torch.set_num_threads(threads)
    RUNS[name](*features(64, width, TYPES[kind]))()
    run = RUNS[name](*features(pairs, width, TYPES[kind]))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident("VmRSS")
    run()
    print(resident("VmHWM") - before)


def measure(arguments: argparse.Namespace, pairs: int, kind: str) -> dict[str, float | int | dict[str, float]]:
    a, b = features(pairs, arguments.width, TYPES[kind])
    errors = compare(a, b)
    taken = seconds({name: make(a, b) for name, make in RUNS.items()}, arguments.seconds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    command = [sys.executable, __file__, "--width", str(arguments.width), "--threads", str(arguments.threads), "--peak"]
    peaks = {
        name: int(
            subprocess.run([*command, name, str(pairs), kind], capture_output=True, text=True, check=True, timeout=300).stdout
        )
        for name in RUNS
    }
    return {
        "rounds": len(taken["mmpt"]),
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "ratio": medians["mmpt"] / medians["ClipLoss"],
        "megabytes": {name: value / 1e6 for name, value in peaks.items()},
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 8192, 16384])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=12.0, help="of rounds, for each size and type")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, pairs, kind = arguments.peak
        peak(name, int(pairs), arguments.width, kind, arguments.threads)
        return
    torch.set_num_threads(arguments.threads)
    table = Table(title=f"Contrastive loss, forward and backward, width {arguments.width}, {arguments.threads} threads")
    for column in ("", "B", "mmpt, ms", "ClipLoss, ms", "ratio", "mmpt, MB", "ClipLoss, MB", "error", "rounds"):
        table.add_column(column, justify="left" if not column else "right")
    figures: dict[str, dict] = {}
    for kind in TYPES:
        for pairs in arguments.sizes:
            found = figures[f"{kind} {pairs}"] = measure(arguments, pairs, kind)
            time_, memory = found["milliseconds"], found["megabytes"]
            table.add_row(
                kind,
                f"{pairs:,}",
                *(f"{time_[name]:.1f}" for name in RUNS),
                f"{found['ratio']:.2f}",
                *(f"{memory[name]:.0f}" for name in RUNS),
                f"{found['errors']['mmpt']:.0e}",
                str(found["rounds"]),
            )
    Console().print(table)
    settings = {"width": arguments.width, "scale": SCALE, "loss": "infonce", "seconds": arguments.seconds}
    print(record.write("loss", settings, figures, ("mmpt", "torch", "open_clip_torch")))


if __name__ == "__main__":
    main()
