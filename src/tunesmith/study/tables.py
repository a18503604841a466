"""Tables: rows of cells that know where their numbers stand in the logs, as CSV and as LaTeX (booktabs)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.stats import Interval, t_interval
from tunesmith.study.records import Point


@dataclass(frozen=True)
class Cell:
    """Words, or a number with its interval; `sources`: the log lines it comes from; `run`: the run that the words name."""

    text: str = ""
    value: Interval | None = None
    digits: int = 3
    sources: tuple[Point, ...] = ()
    run: str = ""

    @property
    def shown(self) -> str:
        """`13.52` or `13.52 [13.50, 13.54]`, or the words; "-" where nothing is known."""
        if self.value is None:
            return self.text or "-"
        mean = f"{self.value.mean:,.{self.digits}f}"
        if math.isnan(self.value.low):
            return mean
        return f"{mean} [{self.value.low:,.{self.digits}f}, {self.value.high:,.{self.digits}f}]"


@dataclass(frozen=True)
class Table:
    """figures: the headings of columns that hold figures with intervals. notes: what is missing. folded: long, to be opened."""

    name: str
    experiment: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    notes: tuple[str, ...] = ()
    folded: bool = False
    figures: tuple[str, ...] = ()


def of_seeds(points: Iterable[Point], digits: int = 3, *, signed: bool = False) -> Cell:
    """Mean over seeds with its t interval, which ends at 0. signed: of what may be negative: rewards, margins, log-ratios."""
    if not (sources := tuple(points)):
        return Cell()
    interval = t_interval([p.value for p in sources], at_least=-math.inf if signed else 0.0)
    return Cell(value=interval, digits=digits, sources=sources)


def interval_words(interval: Interval, digits: int = 3, unit: str = "") -> str:
    """`0.012 [-0.003, 0.027] GB`; without an interval only the mean."""
    unit = f" {unit}" if unit else ""
    # + 0.0: no -0
    mean, low, high = (f"{round(x, digits) + 0.0:.{digits}f}" for x in (interval.mean, interval.low, interval.high))
    return f"{mean}{unit}" if math.isnan(interval.low) else f"{mean} [{low}, {high}]{unit}"


def plain(value: float | None, digits: int = 2) -> Cell:
    """A number without an interval."""
    return Cell("" if value is None else f"{value:,.{digits}f}")


def as_csv(table: Table) -> str:
    """Comma-separated; a column of figures becomes four: mean, low, high and n."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [[h, f"{h}, low", f"{h}, high", f"{h}, n"] if h in table.figures else [h] for h in table.head]
    writer.writerow([x for h in heads for x in h])
    for row in table.rows:
        cells = [_csv_cells(cell, h in table.figures) for cell, h in zip(row, table.head, strict=True)]
        writer.writerow([x for c in cells for x in c])
    return out.getvalue()


def _csv_cells(cell: Cell, figure: bool) -> list[str]:
    if not figure:
        return [cell.text.replace(",", "") if _numeric(cell.text) else cell.text]
    if cell.value is None:
        return [cell.text, "", "", ""]
    v = cell.value
    bounds = [f"{x:.{cell.digits}f}" if x == x else "" for x in (v.low, v.high)]
    return [f"{v.mean:.{cell.digits}f}", *bounds, str(v.n)]


def _numeric(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("-", "").isdigit()


LATEX = {c: rf"\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "⁹": "$^9$",
    "→": r"$\rightarrow$",
    "±": r"$\pm$",
}


def latex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def as_latex(table: Table) -> str:
    """A `table` for \\usepackage{booktabs}, with caption and label."""
    numeric = [
        h in table.figures or all(_numeric(row[i].text) or not row[i].text for row in table.rows)
        for i, h in enumerate(table.head)
    ]
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex(table.title)}}}",
        rf"  \label{{tab:{table.name}}}",
        rf"  \begin{{tabular}}{{{''.join('r' if n else 'l' for n in numeric)}}}",
        r"    \toprule",
        "    " + " & ".join(latex(h) for h in table.head) + r" \\",
        r"    \midrule",
        *("    " + " & ".join(latex(cell.shown) for cell in row) + r" \\" for row in table.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
