"""Curves of a run as inline SVG: lines of metrics.jsonl -> Series -> <svg>.

Colours are written as CSS variables of the page and text stays text, so that one drawing serves light and dark,
and the page's font. A chart is drawn at the width of a phone, where its text keeps its size; wider screens put more side by side.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

WIDTH, HEIGHT = 360, 220  # CSS pixels
POINTS = 300  # a line of more points is averaged down to as many
COLORS = {"#010101": "--ink", "#020202": "--faint", "#030303": "--rule"} | {
    f"#{4 + place:02}{4 + place:02}{4 + place:02}": f"--{name}"
    for place, name in enumerate(("first", "second", "third", "fourth", "fifth", "sixth"))
}
INK, FAINT, RULE, *PALETTE = COLORS
FIRST, SECOND = PALETTE[:2]

Unit = Literal["plain", "percent", "small"]

STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "mmpt",  # the same run gives the same bytes
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.labelcolor": FAINT,
    "axes.xmargin": 0.02,
    "figure.dpi": 72,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "xtick.color": RULE,
    "xtick.labelcolor": FAINT,
    "ytick.color": RULE,
    "ytick.labelcolor": FAINT,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart; the page writes the label. `light` draws it behind the others; `dots` marks its points."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: str = FIRST  # one of PALETTE
    light: bool = False
    dots: bool = False

    @property
    def css_color(self) -> str:
        return f"var({COLORS[self.color]})"


def line_chart(series: Sequence[Series], unit: Unit = "plain", from_zero: bool = False) -> str:
    """An <svg> of the series over optimizer steps, for inlining into a page that defines COLORS."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.add_subplot()
        for line in series:
            steps, values = thin(line.steps, line.values)
            axes.plot(
                steps,
                values,
                color=line.color,
                alpha=0.4 if line.light else 1.0,
                zorder=2 if line.light else 3,
                marker="o" if line.dots else None,
                markersize=3.5,
            )
        _dress(axes, unit, from_zero)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue())


def _dress(axes: Axes, unit: Unit, from_zero: bool) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    formats = {
        "plain": EngFormatter(sep=""),
        "percent": PercentFormatter(1.0, decimals=0),
        "small": FuncFormatter(lambda y, _: f"{y:.2g}"),
    }
    axes.yaxis.set_major_formatter(formats[unit])
    if from_zero:
        axes.set_ylim(bottom=0)


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: neighbours are averaged. Points that are not finite are left out."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _inline(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # numbered anew in each chart: one page would hold them twice
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    for color, variable in COLORS.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
