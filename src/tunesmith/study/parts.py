"""Parts of pages in HTML: figures, tables, notes, and links from numbers to their log lines."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.files.answers import ENDINGS
from tunesmith.study.look import INK, PALETTE, Plate
from tunesmith.study.records import Point
from tunesmith.study.tables import Cell, Table

NAMED = dict(zip(PALETTE, ("blue", "vermillion", "green", "orange", "purple", "sky", "grid"), strict=True))


def esc(text: object) -> str:
    return html.escape(str(text))


def details(summary: str, content: str, kind: str = "") -> str:
    """Folded content. kind: a class; what is of the kind `more` is printed though it is folded."""
    mark = f' class="{kind}"' if kind else ""
    return f"<details{mark}><summary>{esc(summary)}</summary>{content}</details>"


def folded_text(summary: str, text: str) -> str:
    """Folded text with its lines as they are."""
    return details(summary, f"<pre>{esc(text)}</pre>")


WHOSE = re.compile(r"(.+?\(\S+\)|[^\s:]+): (.+)", re.DOTALL)


def gathered(lines: Iterable[str]) -> list[str]:
    """Lines `RUN: reason` with the runs of one reason in one line.

    >>> gathered(["a: not run yet", "b: failed", "c: not run yet"])
    ['a, c: not run yet', 'b: failed']
    """
    by_reason: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        match = WHOSE.fullmatch(line)
        by_reason.setdefault(match[2] if match else line, []).append(match[1] if match else "")
    return [f"{', '.join(filter(None, who))}: {reason}" if any(who) else reason for reason, who in by_reason.items()]


def notes(lines: Iterable[str]) -> str:
    """What is missing or doubtful, where nobody overlooks it."""
    gathered_lines = gathered(lines)
    if not gathered_lines:
        return ""
    if len(gathered_lines) == 1:
        return f'<div class="note">{esc(gathered_lines[0])}</div>'
    return f'<div class="note"><ul>{"".join(f"<li>{esc(line)}</li>" for line in gathered_lines)}</ul></div>'


def side_by_side(prompt: str, group: str, answers: Iterable[tuple[str, Mapping[str, Any] | None]]) -> str:
    """A prompt and below it the answers to it in columns of equal width. answers: whose it is, and its record if there is one."""
    cells = "".join(f"<div><b>{esc(name)}</b>{_answer(record)}</div>" for name, record in answers)
    kind = f" <span>{esc(group)}</span>" if group else ""
    return f'<p class="prompt">{esc(prompt)}{kind}</p><div class="answers">{cells}</div>'


def _answer(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "<i>no answer to this prompt</i>"
    reward = record.get("reward")
    end = ENDINGS.get(record["finish_reason"], record["finish_reason"])
    facts = f"{end}{f' · reward {reward:.2f}' if isinstance(reward, int | float) else ''}"
    return f"{esc(record['answer'].strip()) or '<i>nothing</i>'}<small>{facts}</small>"


def anchor(run: str, line: int | None = None) -> str:
    """The id of a run's section, or of one of its log lines."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", run)
    return f"run-{safe}" if line is None else f"run-{safe}-line-{line}"


class Links:
    """Links to log lines, and the memory of which lines were linked, so that the page holds exactly those."""

    def __init__(self) -> None:
        self.cited: dict[str, set[int]] = {}

    def to(self, point: Point, text: str) -> str:
        """A link with this text."""
        self.cited.setdefault(point.run, set()).add(point.line)
        return f'<a href="#{anchor(point.run, point.line)}" title="{esc(point.run)}, metrics.jsonl line {point.line}">{text}</a>'

    def sources(self, points: Sequence[Point]) -> str:
        """All of them, folded where they are many."""
        unique = list(dict.fromkeys(points))
        links = " ".join(self.to(p, f"{esc(p.run)}:{p.line}") for p in unique)
        if len(unique) <= 2:
            return f'<span class="dim">{links}</span>'
        return f'<details class="sources"><summary>{len(unique)} log lines</summary>{links}</details>'

    def cell(self, cell: Cell) -> str:
        """A table's cell: one source makes the number a link, several follow it as small figures."""
        text, rest = esc(cell.shown), ""
        if cell.run:
            return f'<a href="#{anchor(cell.run)}">{text}</a>'
        if cell.value is not None and "[" in text:
            mean, _, rest = text.partition(" ")
            text, rest = mean, f'<span class="dim">{rest}</span>'
        if len(cell.sources) == 1:
            text = self.to(cell.sources[0], text)
        elif cell.sources:
            text += "<sup>" + " ".join(self.to(p, str(i)) for i, p in enumerate(cell.sources, 1)) + "</sup>"
        return f"{text} {rest}" if rest else text


def inline(plate: Plate) -> str:
    """A figure's SVG for the page: ids of its own, colours that follow light and dark, its title for screen readers."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{re.sub(r'[^A-Za-z0-9_-]', '-', plate.name)}-", plate.svg)
    head = f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\\1" role="img" aria-label="{esc(plate.title)}"'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', f"<svg {head}>", svg, count=1)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    for colour, name in NAMED.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace(INK, "currentColor").strip()


def figure(plate: Plate, number: str = "", files: bool = True) -> str:
    """A figure with its caption, its files and what is missing from it."""
    links = f' <span class="files"><a href="figures/{plate.name}.svg">SVG</a> · <a href="figures/{plate.name}.png">PNG</a></span>'
    name = f"{esc(number)}{esc(plate.title)}"
    return (
        f'<figure id="{esc(plate.name)}"><div class="plot">{inline(plate)}</div>'
        f"<figcaption><b>{name}.</b> {esc(plate.caption)}{links if files else ''}</figcaption>{notes(plate.notes)}</figure>"
    )


def table(content: Table, links: Links, number: str = "") -> str:
    """A table with its caption, its files and what is missing from it."""
    if not content.rows:
        return notes([f"{number}{content.title}: nothing to show yet."]) + notes(content.notes)
    numeric = [
        h in content.figures or all(re.fullmatch(r"[-\d.,e+ ]*", row[i].shown) for row in content.rows)
        for i, h in enumerate(content.head)
    ]
    kinds = [' class="number"' if n else "" for n in numeric]
    head = "".join(f'<th scope="col"{k}>{esc(h)}</th>' for h, k in zip(content.head, kinds, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{k}>{links.cell(c)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in content.rows
    )
    files = f'<span class="files"><a href="tables/{content.name}.csv">CSV</a> · <a href="tables/{content.name}.tex">LaTeX</a></span>'
    text = (
        f'<div class="wide" id="{content.name}"><table class="data">'
        f"<caption><b>{esc(number)}{esc(content.title)}.</b> {esc(content.caption)} {files}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes(content.notes)}"
    )
    return details(content.title, text) if content.folded else text
