"""What is known of the report's experiments before anybody runs them, for the page of a study: their words, claims, figures, tables."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.study.paper.claims import Claim, Finding, judge_all
from tunesmith.study.paper.experiments import EXPERIMENTS, FULL, dpo_runs, judged, ranks
from tunesmith.study.paper.figures import specs_of
from tunesmith.study.paper.tables import tables_of
from tunesmith.study.paper.verdicts import FAILS, HOLDS, OPEN
from tunesmith.study.parts import Links, esc, gathered, notes
from tunesmith.study.records import RunRecord, Study
from tunesmith.study.select import best_step
from tunesmith.study.study_page import Column, Known, named

BADGES = {HOLDS: ("holds", "✓"), FAILS: ("fails", "✗"), OPEN: ("open", "?")}
ABOUT = {
    "e1": "All weights trained on dialogues, then continued from the checkpoint.",
    "e1b": "Learning rates at which the paper's training did not converge.",
    "e2": "The checkpoints' answers scored by a reward model; step 0 is the untrained base.",
    "e4": "Five optimizers on the same batches in the same order.",
    "e5": "Low-rank adapters of four sizes compared with training all weights.",
    "e6": "Helpful dialogues only.",
    "e7": "Does a larger batch help, and does accumulation give the same result?",
    "e8": "Direct preference optimisation, which the paper could not run.",
}
ON_CLAIMS = """A claim <em>holds</em> or <em>does not hold</em> only if such an interval lies
entirely on one side; otherwise it is <em>undecided</em>. Claims about a method (an optimizer, a rank, a batch size) need at least
two seeds: a single training run is a single draw. Two curves are alike if the whole interval of their difference lies within
5 % of the total fall in loss. A curve counts as turning only if it rises by 3.5 standard errors of its own noise."""
ON_SCALE = """The paper trained gpt2-medium on a P100 of 16 GB; compare its
numbers only with those of the same scale."""


def known_of(study: Study) -> Known:
    """What the page of a study says beforehand of those of the report's experiments that it has."""
    findings = [(c, f) for c, f in judge_all(study) if study.experiment(c.experiment).members]
    return Known(
        experiments=EXPERIMENTS,
        about=ABOUT,
        figures=specs_of(study),
        tables=tables_of(study),
        lead=_counts(findings) if findings else "",
        judged=lambda links: _claims(study, findings, links),
        method=(ON_CLAIMS, ON_SCALE),
        columns=answer_columns(study),
    )


def _counts(findings: Sequence[tuple[Claim, Finding]]) -> str:
    """How many claims hold, in words and in tiles."""
    counts = {kind: sum(f.verdict.verdict == kind for _, f in findings) for kind in BADGES}
    lead = (
        f"Of {len(findings)} claims, {counts[HOLDS]} {_verb(counts[HOLDS], 'holds', 'hold')}, "
        f"{counts[FAILS]} {_verb(counts[FAILS], 'does', 'do')} not hold, and {counts[OPEN]} cannot be decided from these runs."
    )
    words = {HOLDS: ("holds", "hold"), FAILS: ("does not hold", "do not hold"), OPEN: ("undecided", "undecided")}
    tiles = "".join(f"<div><b>{counts[kind]}</b>{_verb(counts[kind], *words[kind])}</div>" for kind in words)
    return f'<p class="lead">{lead}</p><div class="tiles">{tiles}</div>'


def _claims(study: Study, findings: Sequence[tuple[Claim, Finding]], links: Links) -> str:
    """Every claim with its verdict, and which experiments are not in the study."""
    if not findings:
        none = "This study has none of the paper's experiments, so there are no claims of the paper to judge."
        return f'<p class="dim">{none}</p>'
    absent = [named(e) for e in EXPERIMENTS if e not in study.experiments]
    missing = notes([f"Not in this study: {', '.join(absent)}."]) if absent else ""
    items = "".join(_claim(claim, finding, links) for claim, finding in findings)
    return f'{missing}<h3>The claims</h3><ul class="claims">{items}</ul>'


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


def answer_columns(study: Study) -> list[Column]:
    """Whose answers stand side by side: base, fine-tuned, LoRA, DPO; each at its chosen checkpoint."""
    columns: list[Column] = []
    if one := next(iter(judged(study)), None):
        chosen = max(one.at) if one.best is None else one.best
        columns = [(name, *one.at[step]) for name, step in (("base", 0), ("fine-tuned", chosen)) if step in one.at]
    e5 = study.experiment("e5")
    lora = [run for rank in reversed(ranks(e5)) for run in e5.runs(rank).values() if run.answers]
    if not lora and FULL not in e5.labels:
        lora = [m.run for m in e5.members if m.run.answers]
    if lora:
        columns += _at_choice(f"LoRA, rank {lora[0].config.get('lora', {}).get('rank', '?')}", lora[0])
    if dpo := next((r for r in dpo_runs(study).values() if r.answers), None):
        columns += _at_choice("DPO", dpo)
    return columns


def _at_choice(name: str, run: RunRecord) -> list[Column]:
    steps = [s for s in run.answers if s > 0]
    best = best_step(run)
    return [(name, run, best if best in steps else steps[-1])] if steps else []
