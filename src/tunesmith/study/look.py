"""How figures look: axes with units, the same bytes every time, as SVG text and as PNG.

Lines differ in colour (Okabe and Ito's palette, told apart by the colour-blind), in dashes and in markers, so that a
grey print still tells them apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
INK, GRID = "#1b1b1a", "#dcdcd8"
PALETTE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GRID)
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
_DASHED = ((5, 1.6), (6, 1.5, 1.2, 1.5), (1.4, 1.2), (9, 2), (3, 1, 1, 1, 1, 1))
DASHES: tuple[Any, ...] = ("-", *((0, pattern) for pattern in _DASHED), "-")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "\\\\", "xx")
TRAIN, VALIDATION, MARK = BLUE, VERMILLION, GREEN
STEPS = "optimizer step"  # what most figures count on their x axis
DPI = 160
STYLE: Any = {
    "svg.hashsalt": "tunesmith", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10.5,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.7, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8, "lines.markersize": 5,
    "hatch.linewidth": 0.6, "axes.formatter.useoffset": False,
}  # fmt: skip


@dataclass(frozen=True)
class Plate:
    """A finished figure. `notes`: what is missing from it or not comparable in it."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    notes: tuple[str, ...] = ()


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, independent of the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(rows: int = 1, columns: int = 1, height: float = 4.2) -> tuple[Any, Any]:
    """A figure and its axes: one, or an array of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def to_plate(figure: Any, name: str, title: str, caption: str, notes: Sequence[str] = ()) -> Plate:
    """Render as SVG and as PNG, without dates or random ids. Call it, as all drawing, inside `style()`."""
    text, pixels = io.StringIO(), io.BytesIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    figure.set_layout_engine("none")  # as laid out for the SVG
    figure.savefig(pixels, format="png", dpi=DPI, metadata={"Software": None})
    svg = text.getvalue()
    return Plate(name, title, caption, svg[svg.index("<svg") :], pixels.getvalue(), tuple(dict.fromkeys(notes)))


def thousands(axes: Any) -> None:
    """Whole numbers with commas on the axis of the steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def name_axes(axes: Any, ylabel: str, xlabel: str = STEPS) -> None:
    """What the axes count, steps on the horizontal one."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    thousands(axes)


def mark_chosen(axes: Any, step: int, label: str, width: float = 1) -> None:
    """A line at the checkpoint to use."""
    axes.axvline(step, color=MARK, linestyle="--", linewidth=width, label=label)


def mark_alike(axes: Any, steps: Sequence[int], values: Sequence[float]) -> None:
    """Rings around the checkpoints that cannot be told from it."""
    ring = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": MARK}
    axes.plot(steps, values, linestyle="", marker="o", **ring, label="not distinguishable from it")


def legend_above(axes: Any, columns: int) -> None:
    """A legend outside, for axes that are full everywhere."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, columnspacing=1.4)
