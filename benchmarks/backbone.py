"""Model FLOP/s of a shared transformer, forward and backward, over one document and over packed ones.

    python benchmarks/backbone.py [--model configs/models/base_1b.yaml] [--tokens 2048 32768] [--rounds 9] [--compile]

Counted: 6 FLOP a weight and token for the matrix products, and 12 a layer, width and pair of tokens for attention; a pass that
recomputes nothing. `causal` counts the pairs that attend, `square` all pairs of a document, as many papers do. Utilisation is
of what a large bf16 matrix product reaches on the same machine in the same run, and of the maker's figure where it is known.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import record
import torch
from rich.console import Console
from rich.table import Table

from mmpt.config import TransformerConfig, load_model
from mmpt.model.attention import AttentionLayout
from mmpt.model.rotary import rotary_angles
from mmpt.model.transformer import Transformer

DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by a part of the device's name
MEAN_DOCUMENT = 1_665  # tokens, log-normal, as in benchmarks/plan.py


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def flops(self, config: TransformerConfig, weights: int, *, causal: bool) -> float:
        """Of one forward and one backward pass."""
        pairs = sum(n * (n + 1) / 2 if causal else n * n for n in self.lengths)
        return 6.0 * weights * self.tokens + 12.0 * config.layers * config.dim * pairs


def packed(tokens: int) -> tuple[int, ...]:
    """Document lengths that add up to `tokens`."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = float(torch.empty(1).log_normal_(mean=6.92, std=1.0, generator=generator))  # mean 1,665
        lengths.append(max(1, min(round(drawn), tokens - sum(lengths))))
    return tuple(lengths)


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device: torch.device, side: int) -> float:
    """FLOP/s of a square bf16 matrix product: the median of nine."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        began = synchronized()
        a @ b
        times.append(synchronized() - began)
    return 2.0 * side**3 / statistics.median(times[1:])


def make_pass(model: Transformer, config: TransformerConfig, case: Case, device: torch.device) -> Callable[[], None]:
    lengths = torch.tensor(case.lengths, device=device)
    layout = AttentionLayout.from_lengths(lengths, causal=True)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    positions = (torch.arange(case.tokens, device=device) - starts)[None]
    x = torch.randn(case.tokens, config.dim, device=device)

    def one() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            rotary = rotary_angles(positions, config.head_dim, config.rope_theta, scaling=config.rope_scaling)
            hidden, _ = model(x, layout, rotary)
        hidden.sum().backward()
        model.zero_grad(set_to_none=True)

    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("configs/models/base_1b.yaml"))
    parser.add_argument("--overrides", nargs="*", default=[], help="of the model: transformer.layers=2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 32768])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_model(arguments.model, arguments.overrides).transformer
    model = Transformer(config)
    model.initialize()
    model.to(device)
    if arguments.compile:
        model.compile_blocks()
    weights = sum(p.numel() for p in model.parameters())
    cases = [
        Case(f"{n:,} {kind}", of(n)) for n in arguments.tokens for kind, of in (("dense", lambda n: (n,)), ("packed", packed))
    ]
    passes = {case: make_pass(model, config, case, device) for case in cases}
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for number in range(arguments.rounds + 1):
        for case, one in passes.items():
            began = synchronized()
            one()
            if number:  # the first round warms up
                times[case].append(synchronized() - began)
    reached = matmul_rate(device, 8192 if device.type == "cuda" else 2048)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    sheet = next((rate for part, rate in DATA_SHEET.items() if part in name), None)
    figures = {"weights": weights, "matmul_flops": reached, "data_sheet_flops": sheet}
    table = Table("case", "tokens/s", "TFLOP/s causal", "of matmul", "of data sheet", "TFLOP/s square", "of data sheet")
    for case in cases:
        seconds = statistics.median(times[case])
        causal, square = (case.flops(config, weights, causal=half) / seconds for half in (True, False))
        shares = {
            "of_matmul": causal / reached,
            "of_sheet": sheet and causal / sheet,
            "square_of_sheet": sheet and square / sheet,
        }
        figures[case.name] = {"seconds": seconds, "causal_flops": causal, "square_flops": square, **shares}
        shown = {key: f"{value:.1%}" if value else "-" for key, value in shares.items()}
        table.add_row(
            case.name,
            f"{case.tokens / seconds:,.0f}",
            f"{causal / 1e12:.2f}",
            shown["of_matmul"],
            shown["of_sheet"],
            f"{square / 1e12:.2f}",
            shown["square_of_sheet"],
        )
    Console().print(table)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(record.write(f"backbone_{device.type}", settings, figures, ("torch", "mmpt")))


if __name__ == "__main__":
    main()
