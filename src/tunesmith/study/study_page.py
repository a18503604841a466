"""The page of a study: summary first, then each experiment, then every run. A pure function of the study's records.

What is special about experiments that are known beforehand comes as `Known`, from `study.paper`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from tunesmith.jsontext import Json
from tunesmith.page import document
from tunesmith.study.figures import Drawn, Missing, Spec
from tunesmith.study.own import conclusion
from tunesmith.study.parts import Links, anchor, details, esc, figure, folded_text, notes, side_by_side, table
from tunesmith.study.records import RunRecord, Study
from tunesmith.study.tables import Table

Column = tuple[str, RunRecord, int]
"""Whose answers, the run that gave them, and at which step."""
SHOWN = 6  # prompts whose answers stand open
METHOD = """
<p>A figure over seeds is a mean with Student's 95 % interval; one over prompts comes from a paired bootstrap over the same
prompts; a share of pairs has Wilson's interval. {} The best
checkpoint is picked on one half of the prompts and judged on the other.</p>
<p>Memory is in GB of 10<sup>9</sup> bytes: allocated tensors on a GPU (accurate to 0.5 %), the whole process on a CPU (2 %);
time is that of the training steps. Loss is in nats per target token, or in nats per pair for DPO and reward models. The interval
of a quantity that cannot be negative ends at 0. {}</p>"""


@dataclass(frozen=True)
class Known:
    """What is known beforehand of some experiments; the page says of any other what came out of it.

    about: experiment -> a sentence. lead: HTML that opens the summary. judged: what the summary says of them. method: what
    "How to read this page" says of their claims, and of their scale. columns: whose answers stand side by side.
    """

    experiments: Sequence[str]
    about: Mapping[str, str]
    figures: Sequence[Spec]
    tables: Mapping[str, Sequence[Table]]
    lead: str
    judged: Callable[[Links], str]
    method: tuple[str, str]
    columns: Sequence[Column]


def render_study(
    study: Study, known: Known, figures: Mapping[str, Sequence[Drawn]], tables: Mapping[str, Sequence[Table]]
) -> str:
    """The page as text."""
    links = Links()
    sections: list[tuple[str, str, str]] = []
    sections.append(("summary", "Summary", _summary(study, known, links)))
    for key in [*study.experiments, *(k for k in figures if k not in study.experiments)]:
        title = study.experiments[key].title if key in study.experiments else "Reward during training"
        heading = f"{named(key)} · {title}" if key in known.experiments and title.lower() != key else title
        own = key in study.experiments and key not in known.experiments
        result = conclusion(study.experiments[key]) if own else known.about.get(key, "")
        sections.append((key, heading, _experiment(result, figures.get(key, []), tables.get(key, []), links)))
    if answers := _answers(known.columns):
        sections.append(("answers", "Answers side by side", answers))
    sections.append(("method", "How to read this page", METHOD.format(*known.method)))
    overview = table(tables[""][0], links)  # before the runs: they list the lines that were linked
    sections.append(("runs", "Every run", overview + "".join(_run(run, links) for run in study.runs.values())))
    contents = "".join(f'<li><a href="#{esc(i)}">{esc(h)}</a></li>' for i, h, _ in sections)
    head = f"<h1>{esc(study.title)}</h1>{_progress(study)}"
    body = "".join(f'<section id="{esc(i)}"><h2>{esc(h)}</h2>{text}</section>' for i, h, text in sections)
    return document(
        f"tunesmith: {study.name}", f"<nav><ol>{contents}</ol></nav>\n<main>{head}{body}</main>", kind="study"
    )


# ---- summary ---------------------------------------------------------------------------------------------------------


def _progress(study: Study) -> str:
    """How many runs stand where, and why those are not finished that are not."""
    states = Counter(run.state for run in study.runs.values())
    order = ("finished", "running", "waiting", "stopped", "diverged", "failed", "missing")
    inorder = sorted(states, key=lambda s: order.index(s) if s in order else 9)
    counts = ", ".join(f"{states[s]} {'not run yet' if s == 'waiting' else s}" for s in inorder)
    scale = f", {study.scale} scale" if study.scale else ""
    return f'<p class="dim">Study {esc(study.name)}{esc(scale)}: {len(study.runs)} runs, {esc(counts)}.</p>'


def _summary(study: Study, known: Known, links: Links) -> str:
    trouble = [f"{run.name}: {run.trouble}" for run in study.runs.values() if run.trouble]
    trouble += [f"{run.name}: {line}" for run in study.runs.values() for line in run.damage]
    heading = "<h3>Runs that did not finish, and damaged files</h3>" if known.lead and trouble else ""
    return f"{known.lead}{_own_results(study, known)}{known.judged(links)}{heading}{notes(trouble)}"


def _own_results(study: Study, known: Known) -> str:
    """The result of every experiment that is not known beforehand, a sentence each."""
    own = [e for key, e in study.experiments.items() if key not in known.experiments]
    if len(own) == 1 == len(study.experiments):
        return f'<p class="lead">{esc(conclusion(own[0]))}</p>'
    items = "".join(f'<li><a href="#{esc(e.id)}">{esc(e.title)}</a>: {esc(conclusion(e))}</li>' for e in own)
    return f'<ul class="results">{items}</ul>' if own else ""


# ---- experiments and answers -----------------------------------------------------------------------------------------


def _experiment(words: str, drawn: Sequence[Drawn], tables: Sequence[Table], links: Links) -> str:
    """Figures and tables below what is known of the experiment, or came out of it, in words."""
    parts = [f"<p>{esc(words)}</p>"] if words else []
    for item in drawn:
        if isinstance(item, Missing):
            parts.append(notes([f"{numbered(item.name)}{item.title}: not drawn. {item.reason}."]))
        else:
            parts.append(figure(item, numbered(item.name)))
    parts += [table(t, links, numbered(t.name)) for t in tables]
    return "".join(parts) or notes(["Nothing has been logged for this experiment yet."])


def named(key: str) -> str:
    """`E1b`."""
    return key[:1].upper() + key[1:]


def numbered(name: str) -> str:
    """`Figure 3: ` of a figure or table whose name ends in its number; "" of any other."""
    kind, _, number = name.partition("-")
    return f"{kind.capitalize()} {number}: " if number.isdigit() else ""


def _answers(columns: Sequence[Column]) -> str:
    if len(columns) < 2:
        return ""
    by_prompt: list[dict[str, Json]] = []
    for _, run, step in columns:
        first: dict[str, Json] = {}
        for record in run.answers[step]:
            first.setdefault(record["prompt"], record)
        by_prompt.append(first)
    blocks = []
    for prompt, record in by_prompt[0].items():
        answers = [(name, given.get(prompt)) for (name, _, _), given in zip(columns, by_prompt, strict=True)]
        blocks.append(side_by_side(prompt, str(record.get("group", "")), answers))
    rest = blocks[SHOWN:]
    who = "; ".join(
        f'{esc(name)}: <a href="#{anchor(run.name)}">{esc(run.name)}</a>, step {step:,}' for name, run, step in columns
    )
    more = details(f"{len(rest)} more prompts", "".join(rest), "more") if rest else ""
    return f'<p class="dim">The same prompts, one answer from each: {who}.</p>{"".join(blocks[:SHOWN])}{more}'


# ---- runs ------------------------------------------------------------------------------------------------------------


def _run(run: RunRecord, links: Links) -> str:
    """A run's section: how it ended, its configuration and environment, and the log lines that the page links to."""
    facts = [run.state if run.state == "finished" else run.trouble, str(run.plan.get("command", ""))]
    if run.plan.get("needs"):
        facts.append(f"after {', '.join(run.plan['needs'])}")
    words = esc(" · ".join(filter(None, facts)))
    head = f'<section class="run" id="{anchor(run.name)}"><h3>{esc(run.name)}</h3><p class="dim">{words}</p>'
    parts = [head, notes(run.damage), '<div class="folds">']
    if changed := run.plan.get("settings"):
        parts.append(folded_text("Set by the study", _yaml(changed)))
    parts.append(folded_text("Configuration", _yaml(run.config)) if run.config else notes(["No config.yaml."]))
    if run.environment:
        parts.append(folded_text("Environment", _yaml(run.environment)))
    if cited := links.cited.get(run.name):
        by_line = {r["line"]: r for records in run.lines.values() for r in records}
        items = "".join(
            f'<li id="{anchor(run.name, n)}"><b>{n}</b>{esc(json.dumps({k: v for k, v in by_line[n].items() if k != "line"}))}</li>'
            for n in sorted(cited)
        )
        parts.append(details(f"Quoted log lines ({len(cited)})", f'<ul class="log">{items}</ul>'))
    return "".join(parts) + "</div></section>"


def _yaml(content: Json) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip()
