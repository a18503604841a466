"""The page of a study: summary first, then each experiment, then every run. A pure function of the study's records."""

from __future__ import annotations

import json
from collections.abc import Sequence

import yaml

from tunesmith.jsontext import Json
from tunesmith.page import document
from tunesmith.study.own import conclusion
from tunesmith.study.paper.claims import Claim, Finding
from tunesmith.study.paper.experiments import FULL, dpo_runs, judged, ranks
from tunesmith.study.paper.figures import Drawn, Missing
from tunesmith.study.paper.tables import PAPER_EXPERIMENTS
from tunesmith.study.parts import Links, anchor, details, esc, figure, gathered, notes, side_by_side, table
from tunesmith.study.read import RunRecord, Study
from tunesmith.study.select import best_step
from tunesmith.study.tables import Table
from tunesmith.study.verdicts import FAILS, HOLDS, OPEN

BADGES = {HOLDS: ("holds", "✓"), FAILS: ("fails", "✗"), OPEN: ("open", "?")}
WHAT = {
    "e1": "All weights trained on dialogues, then continued from the checkpoint.",
    "e1b": "Learning rates at which the paper's training did not converge.",
    "e2": "The checkpoints' answers scored by a reward model; step 0 is the untrained base.",
    "e4": "Five optimizers on the same batches in the same order.",
    "e5": "Low-rank adapters of four sizes compared with training all weights.",
    "e6": "Helpful dialogues only.",
    "e7": "Does a larger batch help, and does accumulation give the same result?",
    "e8": "Direct preference optimisation, which the paper could not run.",
}
SHOWN = 6  # prompts whose answers stand open
METHOD = """
<p>A figure over seeds is a mean with Student's 95 % interval; one over prompts comes from a paired bootstrap over the same
prompts; a share of pairs has Wilson's interval. A claim <em>holds</em> or <em>does not hold</em> only if such an interval lies
entirely on one side; otherwise it is <em>undecided</em>. Claims about a method (an optimizer, a rank, a batch size) need at least
two seeds: a single training run is a single draw. Two curves are alike if the whole interval of their difference lies within
5 % of the total fall in loss. A curve counts as turning only if it rises by 3.5 standard errors of its own noise. The best
checkpoint is picked on one half of the prompts and judged on the other.</p>
<p>Memory is in GB of 10<sup>9</sup> bytes: allocated tensors on a GPU (accurate to 0.5 %), the whole process on a CPU (2 %);
time is that of the training steps. Loss is in nats per target token, or in nats per pair for DPO and reward models. The interval
of a quantity that cannot be negative ends at 0. The paper trained gpt2-medium on a P100 of 16 GB; compare its
numbers only with those of the same scale.</p>"""


def render_study(
    study: Study,
    findings: Sequence[tuple[Claim, Finding]],
    figures: dict[str, list[Drawn]],
    tables: dict[str, list[Table]],
) -> str:
    """The page as text."""
    links = Links()
    sections: list[tuple[str, str, str]] = []
    sections.append(("summary", "Summary", _summary(study, findings, links)))
    for key in [*study.experiments, *(k for k in figures if k not in study.experiments)]:
        title = study.experiments[key].title if key in study.experiments else "Reward during training"
        heading = f"{named(key)} · {title}" if key in PAPER_EXPERIMENTS and title.lower() != key else title
        result = "" if key in PAPER_EXPERIMENTS or key not in study.experiments else conclusion(study.experiments[key])
        sections.append((key, heading, _experiment(key, result, figures.get(key, []), tables.get(key, []), links)))
    if answers := _answers(study):
        sections.append(("answers", "Answers side by side", answers))
    sections.append(("method", "How to read this page", METHOD))
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
    states: dict[str, int] = {}
    for run in study.runs.values():
        states[run.state] = states.get(run.state, 0) + 1
    order = ("finished", "running", "waiting", "stopped", "diverged", "failed", "missing")
    names = {"waiting": "not run yet"}
    told = ", ".join(
        f"{states[s]} {names.get(s, s)}" for s in sorted(states, key=lambda s: order.index(s) if s in order else 9)
    )
    scale = f", {study.scale} scale" if study.scale else ""
    return f'<p class="dim">Study {esc(study.name)}{esc(scale)}: {len(study.runs)} runs, {esc(told)}.</p>'


def _summary(study: Study, findings: Sequence[tuple[Claim, Finding]], links: Links) -> str:
    trouble = [f"{run.name}: {run.trouble}" for run in study.runs.values() if run.trouble]
    trouble += [f"{run.name}: {line}" for run in study.runs.values() for line in run.damage]
    absent = [named(e) for e in PAPER_EXPERIMENTS if e not in study.experiments]
    of_paper = [(c, f) for c, f in findings if study.experiment(c.experiment).members]
    own = _own_results(study)
    if not of_paper:
        none = "This study has none of the paper's experiments, so there are no claims of the paper to judge."
        return f'{own}<p class="dim">{none}</p>{notes(trouble)}'
    counts = {kind: sum(f.verdict.verdict == kind for _, f in of_paper) for kind in BADGES}
    lead = (
        f"Of {len(of_paper)} claims, {counts[HOLDS]} {_verb(counts[HOLDS], 'holds', 'hold')}, "
        f"{counts[FAILS]} {_verb(counts[FAILS], 'does', 'do')} not hold, and {counts[OPEN]} cannot be decided from these runs."
    )
    tiles = "".join(
        f"<div><b>{counts[kind]}</b>{_verb(counts[kind], *words)}</div>"
        for kind, words in {
            HOLDS: ("holds", "hold"),
            FAILS: ("does not hold", "do not hold"),
            OPEN: ("undecided",) * 2,
        }.items()
    )
    items = "".join(_claim(claim, finding, links) for claim, finding in of_paper)
    missing = notes([f"Not in this study: {', '.join(absent)}."]) if absent else ""
    return (
        f'<p class="lead">{lead}</p><div class="tiles">{tiles}</div>{own}{missing}'
        f'<h3>The claims</h3><ul class="claims">{items}</ul>'
        + (f"<h3>Runs that did not finish, and damaged files</h3>{notes(trouble)}" if trouble else "")
    )


def _own_results(study: Study) -> str:
    """The result of every experiment that is not the paper's, a sentence each."""
    own = [e for key, e in study.experiments.items() if key not in PAPER_EXPERIMENTS]
    if len(own) == 1 == len(study.experiments):
        return f'<p class="lead">{esc(conclusion(own[0]))}</p>'
    items = "".join(f'<li><a href="#{esc(e.id)}">{esc(e.title)}</a>: {esc(conclusion(e))}</li>' for e in own)
    return f'<ul class="results">{items}</ul>' if own else ""


def _verb(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _claim(claim: Claim, finding: Finding, links: Links) -> str:
    name, mark = BADGES[finding.verdict.verdict]
    sources = links.sources(finding.sources) if finding.sources else ""
    left = f'<p class="dim">Left out: {esc("; ".join(gathered(finding.left_out)))}.</p>' if finding.left_out else ""
    return (
        f'<li id="claim-{claim.id}"><span class="badge {name}"><i>{mark}</i> {finding.verdict.verdict}</span>'
        f'<span class="words">{esc(claim.words)} <a class="dim" href="#{claim.experiment}">{named(claim.experiment)}</a></span>'
        f'<div class="here">{esc(finding.verdict.evidence)}. {sources}{left}</div>'
        f'<div class="paper"><span>Paper</span> {esc(claim.paper)}.</div></li>'
    )


# ---- experiments and answers -----------------------------------------------------------------------------------------


def _experiment(key: str, result: str, drawn: Sequence[Drawn], tables: Sequence[Table], links: Links) -> str:
    """Figures and tables; result: what came out, of an experiment that no claim is judged on."""
    parts = [f"<p>{esc(text)}</p>" for text in (WHAT.get(key), result) if text]
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
    """`Figure 3: ` of the paper's; nothing of our own."""
    kind, _, number = name.partition("-")
    return f"{kind.capitalize()} {number}: " if number.isdigit() else ""


def answer_columns(study: Study) -> list[tuple[str, RunRecord, int]]:
    """Whose answers stand side by side: base, fine-tuned, LoRA, DPO; each at its chosen checkpoint."""
    found: list[tuple[str, RunRecord, int]] = []
    if one := next(iter(judged(study)), None):
        chosen = max(one.at) if one.best is None else one.best
        found = [(name, *one.at[step]) for name, step in (("base", 0), ("fine-tuned", chosen)) if step in one.at]
    lora = [
        r for x in reversed(ranks(study.experiment("e5"))) for r in study.experiment("e5").runs(x).values() if r.answers
    ]
    if not lora and FULL not in study.experiment("e5").labels:
        lora = [m.run for m in study.experiment("e5").members if m.run.answers]
    if lora:
        found += _at_choice(f"LoRA, rank {lora[0].config.get('lora', {}).get('rank', '?')}", lora[0])
    if dpo := next((r for r in dpo_runs(study).values() if r.answers), None):
        found += _at_choice("DPO", dpo)
    return found


def _at_choice(name: str, run: RunRecord) -> list[tuple[str, RunRecord, int]]:
    steps = [s for s in run.answers if s > 0]
    best = best_step(run)
    return [(name, run, best if best in steps else steps[-1])] if steps else []


def _answers(study: Study) -> str:
    columns = answer_columns(study)
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
        answers = [(name, found.get(prompt)) for (name, _, _), found in zip(columns, by_prompt, strict=True)]
        blocks.append(side_by_side(prompt, str(record.get("group", "")), answers))
    rest = blocks[SHOWN:]
    who = "; ".join(
        f'{esc(name)}: <a href="#{anchor(run.name)}">{esc(run.name)}</a>, step {step:,}' for name, run, step in columns
    )
    return (
        f'<p class="dim">The same prompts, one answer from each: {who}.</p>'
        + "".join(blocks[:SHOWN])
        + (details(f"{len(rest)} more prompts", "".join(rest), "more") if rest else "")
    )


# ---- runs ------------------------------------------------------------------------------------------------------------


def _run(run: RunRecord, links: Links) -> str:
    """A run's section: how it ended, its configuration and environment, and the log lines that the page links to."""
    facts = [run.state if run.state == "finished" else run.trouble, str(run.plan.get("command", ""))]
    if run.plan.get("needs"):
        facts.append(f"after {', '.join(run.plan['needs'])}")
    parts = [
        f'<section class="run" id="{anchor(run.name)}"><h3>{esc(run.name)}</h3><p class="dim">{esc(" · ".join(filter(None, facts)))}</p>'
    ]
    parts.append(notes(run.damage))
    parts.append('<div class="folds">')
    changed = run.plan.get("settings") or {}
    if changed:
        parts.append(details("Set by the study", f"<pre>{_yaml(changed)}</pre>"))
    parts.append(
        details("Configuration", f"<pre>{_yaml(run.config)}</pre>") if run.config else notes(["No config.yaml."])
    )
    if run.environment:
        parts.append(details("Environment", f"<pre>{_yaml(run.environment)}</pre>"))
    if cited := links.cited.get(run.name):
        by_line = {r["line"]: r for records in run.lines.values() for r in records}
        items = "".join(
            f'<li id="{anchor(run.name, n)}"><b>{n}</b>{esc(json.dumps({k: v for k, v in by_line[n].items() if k != "line"}))}</li>'
            for n in sorted(cited)
        )
        parts.append(details(f"Quoted log lines ({len(cited)})", f'<ul class="log">{items}</ul>'))
    return "".join(parts) + "</div></section>"


def _yaml(content: Json) -> str:
    return esc(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip())
