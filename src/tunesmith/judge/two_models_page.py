"""A comparison of two models as one self-contained HTML page."""

from __future__ import annotations

import html
from typing import Any

from tunesmith.files.answers import ANSWER_END, ENDINGS, ScoredAnswer
from tunesmith.judge.language_model import Judgement
from tunesmith.judge.two_models import (
    VERSUS,
    Comparison,
    PromptResult,
    TokenLogps,
    Versus,
    groups,
    interval_text,
    judge_text,
    legend,
    level,
    model_rows,
    notes,
    number,
    result_line,
    versus_rows,
)
from tunesmith.page import render_page

# A is orange and B blue throughout (Okabe & Ito), and never by colour alone: words, underlines, the order on the page.
STYLE = """
:root { --a: light-dark(#b34700, #f0a060); --b: light-dark(#0068a8, #6cc0f0); --none: light-dark(#ccc, #555);
  --a1: light-dark(#fdebd9, #3a2a1c); --a2: light-dark(#fbcf9f, #6b3f12); --a3: light-dark(#f2994a, #a85a0c);
  --b1: light-dark(#e2f1fb, #1b2c3a); --b2: light-dark(#b0d9f3, #164a6b); --b3: light-dark(#62b4e6, #0f6fa8); }
article { border: 1px solid var(--edge); border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0; break-inside: avoid; }
article h3 { margin: 0 0 .6rem; font-size: 1rem; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.side { border-left: 3px solid; padding-left: .7rem; min-width: 0; } .side.a { border-color: var(--a); } .side.b { border-color: var(--b); }
.side h4 { margin: 0; font-size: .85rem; overflow-wrap: anywhere; } .a h4, .name.a { color: var(--a); } .b h4, .name.b { color: var(--b); }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.verdict { margin: .6rem 0 0; font-size: .9rem; } .verdict b { font-variant-numeric: tabular-nums; }
.whole { white-space: nowrap; }
.bar { display: flex; height: .5rem; margin-top: .2rem; min-width: 7rem; border-radius: 3px; overflow: hidden; }
.bar i { display: block; } .bar .b { background: var(--b); } .bar .t { background: var(--none); } .bar .a { background: var(--a); }
.token { border-radius: 2px; } .end { font-size: .75em; opacity: .8; }
.u1 { background: var(--b1); } .u2 { background: var(--b2); } .u3 { background: var(--b3); }
.d1 { background: var(--a1); } .d2 { background: var(--a2); } .d3 { background: var(--a3); }
.u3 { text-decoration: underline; } .d3 { text-decoration: underline dotted; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: baseline; font-size: .9rem; }
details.replies { font-size: .85rem; } details.replies pre { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .sides { grid-template-columns: minmax(0, 1fr); } }
@media print { .whole { white-space: normal; } .bar { min-width: 3rem; } .bar, .token, .facts div { print-color-adjust: exact; } }
"""


DOT = " \u00b7 "
KINDS = {-3: "d3", -2: "d2", -1: "d1", 0: "", 1: "u1", 2: "u2", 3: "u3"}


def render_comparison(comparison: Comparison) -> str:
    """The page as text; the same comparison gives the same bytes."""
    summary = comparison.summary()
    parts = [f'<p class="lead">{_e(result_line(summary))}</p>', _names(comparison)]
    parts += [f'<p class="dim">{_e(comparison.settings)}</p>' if comparison.settings else "", _facts(summary)]
    versus = versus_rows(summary)
    if versus:
        head = "".join(f"<th{_right(i)}>{_e(h)}</th>" for i, h in enumerate(VERSUS))
        rows = "".join(_versus(row) for row in versus)
        parts.append(f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>')
    rows = "".join(
        f'<tr><td>{_e(label)}</td><td class="number">{_interval(a)}</td><td class="number">{_interval(b)}</td></tr>'
        for label, a, b in model_rows(summary)
    )
    head = '<th>answers</th><th class="number name a">A</th><th class="number name b">B</th>'
    parts.append(f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>')
    parts += [f'<p class="dim">{_e(line)}</p>' for line in notes(summary)]
    if "logprobs" in summary:
        parts.append(_legend())
    count, named = 0, groups(comparison.rows)
    for name, some in named.items():
        parts.append(f"<h2>{_e(name or ('Prompts' if len(named) == 1 else 'Other prompts'))}</h2>")
        for row in some:
            count += 1
            parts.append(_article(row, count, comparison))
    return render_page(f"{comparison.names[1]} against {comparison.names[0]}", "\n".join(parts), STYLE)


def _e(text: str) -> str:
    return html.escape(text)


def _right(column: int) -> str:
    return "" if column == 0 else ' class="number"'


def _names(comparison: Comparison) -> str:
    a, b = map(_e, comparison.names)
    return f'<p><b class="name a">A</b> is {a}, <b class="name b">B</b> is {b}; {len(comparison.rows)} prompts, the same for both.</p>'


def _facts(summary: dict[str, Any]) -> str:
    facts = {}
    for measure, words in (("reward", "by reward"), ("judge", "by the judge")):
        compared = summary.get(measure, {})
        if "difference" in compared:
            facts["reward B - A"] = interval_text(compared["difference"], signed=True)
        if "win_rate" in compared:
            facts[f"win rate of B {words}"] = interval_text(compared["win_rate"], percent=True)
        if compared.get("agreement"):
            facts["the judge's two orders agree"] = interval_text(compared["agreement"], percent=True)
    cells = "".join(f"<div>{_e(label)}<b>{_e(value)}</b></div>" for label, value in facts.items())
    return f'<div class="facts">{cells}</div>' if facts else ""


def _versus(row: Versus) -> str:
    label, rate, *rest = row.cells
    cells = "".join(f'<td class="number">{_interval(cell)}</td>' for cell in rest)
    w = row.wins
    widths = {"b": w.wins / w.n, "t": w.ties / w.n, "a": w.losses / w.n}
    parts = "".join(f'<i class="{kind}" style="width: {100 * share:.2f}%"></i>' for kind, share in widths.items())
    words = f"B wins {w.wins}, ties {w.ties}, A wins {w.losses}"
    bar = f'<div class="bar" role="img" aria-label="{words}">{parts}</div>'
    return f'<tr><td>{_e(label)}</td><td class="number">{_interval(rate)}{bar}</td>{cells}</tr>'


def _interval(text: str) -> str:
    """A mean and its bounds, each of which stays on one line."""
    mean, opened, bounds = _e(text).partition(" (")
    return f'<span class="whole">{mean}</span> <span class="whole dim">({bounds}</span>' if opened else mean


def _article(row: PromptResult, count: int, comparison: Comparison) -> str:
    sides = "".join(
        _side(side, name, answer, row.logps[i] if row.logps else None, row.unscored[i])
        for i, (side, name, answer) in enumerate(zip("ab", comparison.names, (row.a, row.b), strict=True))
    )
    facts = []
    if row.difference is not None:
        facts.append(f"reward B - A <b>{number(row.difference, signed=True)}</b>")
    if row.judgement:
        facts.append(_e(judge_text(row.judgement)))
    verdict = f'<p class="verdict">{DOT.join(facts)}</p>' if facts else ""
    return (
        f'<article id="p{count}"><h3>{_e(row.a.prompt)}</h3><div class="sides">{sides}</div>'
        f"{verdict}{_replies(row.judgement)}</article>"
    )


def _side(side: str, name: str, answer: ScoredAnswer, logps: TokenLogps | None, unscored: str) -> str:
    text = _tokens(logps) + _e(unscored) if logps else _e(answer.answer.strip())
    ended = ENDINGS[answer.finish_reason]
    facts = [ended, f"{answer.tokens} tokens"] + ([] if answer.reward is None else [f"reward {number(answer.reward)}"])
    if logps:
        change = sum(b for _, _, b in logps) - sum(a for _, a, _ in logps)
        facts.append(f"change in log p {number(change, signed=True)}")
    return (
        f'<div class="side {side}"><h4>{side.upper()} {_e(name)}</h4><div class="answer">{text or "<i>nothing</i>"}</div>'
        f'<div class="dim">{DOT.join(facts)}</div></div>'
    )


def _tokens(logps: TokenLogps) -> str:
    """An answer with every token in the colour of its change; the number is in its tooltip."""
    cells: list[str] = []
    waiting = (0.0, 0.0)
    for text, a, b in logps:
        a, b = a + waiting[0], b + waiting[1]
        if not text:  # a character that goes on in the next token
            waiting = (a, b)
            continue
        waiting, change = (0.0, 0.0), b - a
        title = f"{number(change, signed=True)} nats: log p {number(a)} under A, {number(b)} under B"
        kind = KINDS[level(change)]
        shown = '<span class="end">[end]</span>' if text == ANSWER_END else _e(text if cells else text.lstrip())
        cells.append(f'<span class="token {kind}" title="{title}">{shown}</span>')
    return "".join(cells)


def _legend() -> str:
    cells = "".join(f'<span class="token {KINDS[step]}">{words}</span>' for step, words in legend())
    words = "log p_B - log p_A of a token, nats (orange, dotted: likelier under A; blue, underlined: under B):"
    return f'<p class="legend">{words} {cells}</p>'


def _replies(judgement: Judgement | None) -> str:
    if judgement is None or not judgement.asked:
        return ""
    first, second = map(_e, judgement.replies)
    shown = f"A first:<pre>{first}</pre>B first:<pre>{second}</pre>"
    return f'<details class="replies"><summary>Replies of the judge</summary>{shown}</details>'
