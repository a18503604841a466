"""Finished runs, or a whole study, to one self-contained HTML page: a pure function of their directories.

Beside the page: figures/ (each as SVG and PNG) and tables/ (each as CSV and LaTeX).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import UsageError, UserError
from tunesmith.files.run import Run, write_atomically
from tunesmith.page import render_page
from tunesmith.progress import span
from tunesmith.study.figures import draw_all, own_figures
from tunesmith.study.look import Plate
from tunesmith.study.outcome import accuracy_text, kind_of, result_of_run, result_of_runs
from tunesmith.study.own import overview, own_tables
from tunesmith.study.paper.summary import known_of
from tunesmith.study.parts import details, esc, figure, folded_text, notes, side_by_side
from tunesmith.study.records import Study, is_study, read_log, read_study
from tunesmith.study.run_figures import loss_curve, preference_curves, reward_curve
from tunesmith.study.study_page import render_study
from tunesmith.study.tables import Cell, Table, as_csv, as_latex
from tunesmith.train.methods.table import METHODS

SHOWN_STEPS = 4  # of the answers of one run beside each other


def write_report(directories: Sequence[str], out: str | None = None, opening: str = "") -> Path:
    """Write the page of runs or of a study, its figures and its tables; returns the page's path.

    opening: HTML that takes the place of the sentence that runs are summed up in.

    Raises: UserError if a directory holds no run, or none has a metric yet; UsageError for a study among other directories.
    """
    studies = [d for d in directories if is_study(d)]
    if studies and len(directories) > 1:
        raise UsageError(f"{studies[0]} is a study and has its own page; report it alone, or name its runs/...")
    if studies:
        study = read_study(studies[0])
        text, plates, tables = render_study_report(study)
        path = Path(out) if out else study.path / "report" / "index.html"
    else:
        runs = [Run(d) for d in directories]
        drawn = [_figures(run) for run in runs]
        text, tables = render_report(runs, drawn, opening), tables_of(runs)
        plates = [plate for several in drawn for plate in several]
        path = Path(out) if out else runs[0].path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files(path.parent, plates, tables)
    write_atomically(path, text)
    return path


def write_files(folder: Path, plates: Iterable[Plate], tables: Iterable[Table]) -> None:
    """figures/NAME.svg and .png, tables/NAME.csv and .tex under `folder`."""
    for name in ("figures", "tables"):
        (folder / name).mkdir(exist_ok=True)
    taken: Counter[str] = Counter()

    def free(name: str) -> str:  # runs of one name in different places
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}-{taken[name]}"

    for plate in plates:
        name = free(plate.name)
        write_atomically(folder / "figures" / f"{name}.svg", plate.svg)
        (folder / "figures" / f"{name}.png").write_bytes(plate.png)
    for table in tables:
        name = free(table.name)
        write_atomically(folder / "tables" / f"{name}.csv", as_csv(table))
        write_atomically(folder / "tables" / f"{name}.tex", as_latex(table))


def render_study_report(study: Study) -> tuple[str, list[Plate], list[Table]]:
    """The page of a study as text, its figures and its tables; the same directory gives the same bytes."""
    known = known_of(study)
    own = [e for key, e in study.experiments.items() if key not in known.experiments]
    drawn = draw_all(study, [*known.figures, *(spec for e in own for spec in own_figures(e))])
    tables = {"": [overview(study)], **known.tables, **{e.id: own_tables(e) for e in own}}
    text = render_study(study, known, drawn, tables)
    plates = [plate for figures in drawn.values() for plate in figures if isinstance(plate, Plate)]
    return text, plates, [table for several in tables.values() for table in several]


# ---- runs ------------------------------------------------------------------------------------------------------------


def render_report(runs: Sequence[Run], drawn: Sequence[Sequence[Plate]] | None = None, opening: str = "") -> str:
    """The page of runs as text; the same run directories give the same bytes. drawn: the figures of each, if at hand."""
    drawn = [_figures(run) for run in runs] if drawn is None else drawn
    body = "".join(_run_section(run, plates, len(runs) == 1) for run, plates in zip(runs, drawn, strict=True))
    title = f"tunesmith: {', '.join(run.path.name for run in runs)}"
    result = result_of_run(runs[0]) if len(runs) == 1 else result_of_runs(runs)
    overview = _overview(runs) if len(runs) > 1 else ""
    return render_page(title, (opening or f'<p class="lead">{esc(result)}</p>') + overview + body)


def _figures(run: Run) -> list[Plate]:
    if not run.metrics("eval"):
        return []
    curves = [loss_curve(run)]
    if METHODS[kind_of(run)].pairs:
        curves.append(preference_curves(run))
    return [*curves, reward_curve(run)] if run.metrics("reward") else curves


def tables_of(runs: Sequence[Run]) -> list[Table]:
    """What the runs came to, and every estimate of each."""
    labels, facts = _compared(runs)
    rows = tuple(
        (Cell(run.path.name), *(Cell(row.get(x, "")) for x in labels)) for run, row in zip(runs, facts, strict=True)
    )
    tables = [Table("runs", "", "Runs", ("run", *labels), rows)]
    for run in runs:
        estimates = run.metrics("eval")
        names = [n for n in estimates[0] if n not in ("event", "time")] if estimates else []
        values = tuple(
            tuple(Cell(f"{v:.6g}" if (v := e.get(n)) is not None else "not finite") for n in names) for e in estimates
        )
        head = tuple(n.replace("_", " ") for n in names)
        tables.append(Table(f"{run.path.name}-estimates", "", f"{run.path.name}: every estimate", head, values))
    return tables


def _run_section(run: Run, plates: Sequence[Plate], alone: bool) -> str:
    status, estimates, train = run.status, run.metrics("eval"), run.metrics("train")
    if not estimates and not train:
        raise UserError(f"{run.path} has no metrics yet (its state is {status['state']!r}); nothing to report")
    name, kind = esc(run.path.name), kind_of(run)
    parts = [f'<h2 id="{name}">{name}: {METHODS[kind].title}{_lora(run)}</h2>']
    if not alone:
        parts.append(f"<p>{esc(result_of_run(run))}</p>")
    parts.append(_facts(run))
    if status.get("reason"):
        parts.append(f"<p>{esc(status['reason'])}</p>")
    parts.append(notes(read_log(run, run.path.name).damage))
    if estimates:
        parts += [figure(plate, files=False) for plate in plates]
        parts.append(_estimates_table(estimates, status.get("best_step")))
    parts.append(_answers(run))
    parts.append(folded_text("Configuration", yaml.safe_dump(run.config, sort_keys=False)))
    if (path := run.path / "environment.json").exists():
        parts.append(folded_text("Environment", path.read_text(encoding="utf-8", errors="replace")))
    return "\n".join(parts)


def _lora(run: Run) -> str:
    rank = run.config.get("lora", {}).get("rank", 0)
    return f", LoRA rank {rank}" if rank else ""


FACTS = (
    "state",
    "validation loss, first and best",
    "validation perplexity, first and best",
    "validation bits per byte, best",
    "validation accuracy at the best step",
    "tokens trained on",
    "time",
    "peak memory",
)


def facts_of(run: Run) -> dict[str, str]:
    """What a run came to, in words: label -> value."""
    status, estimates, train = run.status, run.metrics("eval"), run.metrics("train")
    facts = {"state": f"{status['state']} at step {status['step']:,}"}
    estimates = [e for e in estimates if e["validation_loss"] is not None]  # those that were finite
    if len(estimates) > 1:
        first, best = estimates[0], min(estimates, key=lambda e: e["validation_loss"])
        facts["validation loss, first and best"] = f"{first['validation_loss']:.3f} → {best['validation_loss']:.3f}"
        if "validation_perplexity" in best:
            low, high = math.exp(best["validation_loss"]), math.exp(first["validation_loss"])
            facts["validation perplexity, first and best"] = f"{high:,.1f} → {low:,.1f}"
        if "validation_bits_per_byte" in best:
            facts["validation bits per byte, best"] = f"{best['validation_bits_per_byte']:.3f}"
        if "validation_accuracy" in best:
            facts["validation accuracy at the best step"] = accuracy_text(run, best["validation_accuracy"])
    if train:
        facts["tokens trained on"] = f"{train[-1]['tokens']:,}"
        # Not from the clock: a run may have lain stopped for a night before it went on.
        if spent := read_log(run, run.path.name).minutes:
            facts["time"] = span(60 * spent.value)
        facts["peak memory"] = f"{train[-1]['peak_memory_gb']:.2f} GB"
    return facts


def _compared(runs: Sequence[Run]) -> tuple[list[str], list[dict[str, str]]]:
    """The labels that any of the runs has, and the facts of each."""
    facts = [facts_of(run) for run in runs]
    return [label for label in FACTS if any(label in row for row in facts)], facts


def _facts(run: Run) -> str:
    cells = (f"<div>{label}<b>{esc(value)}</b></div>" for label, value in facts_of(run).items())
    return f'<div class="facts">{"".join(cells)}</div>'


def _overview(runs: Sequence[Run]) -> str:
    """One row a run."""
    labels, facts = _compared(runs)
    head = "".join(f'<th class="number">{label}</th>' for label in labels)
    rows = "".join(
        f'<tr><td><a href="#{esc(run.path.name)}">{esc(run.path.name)}</a><br>'
        f'<span class="group">{METHODS[kind_of(run)].title}{_lora(run)}</span></td>'
        + "".join(f'<td class="number">{esc(row.get(label, ""))}</td>' for label in labels)
        + "</tr>"
        for run, row in zip(runs, facts, strict=True)
    )
    return f'<div class="wide"><table><tr><th>run</th>{head}</tr>{rows}</table></div>'


def _estimates_table(estimates: Sequence[dict[str, Any]], best: int | None) -> str:
    names = [name for name in estimates[0] if name not in ("event", "step", "time")]
    rows = "".join(
        f'<tr><td class="number">{e["step"]:,}{" ★" if e["step"] == best else ""}</td>'
        + "".join(f'<td class="number">{_figure(e.get(name))}</td>' for name in names)
        + "</tr>"
        for e in estimates
    )
    head = "".join(f'<th class="number">{h.replace("_", " ")}</th>' for h in ("step", *names))
    return details(
        "Every estimate (★ best checkpoint)", f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    )


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.4f}"


def _answers(run: Run) -> str:
    """Answers step by step; of many steps the base's, the chosen one's and the last."""
    damage: list[str] = []
    every = {step: records for step, records in run.answers(damage).items() if records}
    if not every:
        return notes(damage)
    wanted = {min(every), run.status.get("best_step"), max(every)} if len(every) > SHOWN_STEPS else every.keys()
    by_step = {step: records for step, records in every.items() if step in wanted}
    names = ["step 0, the base" if s == 0 else f"step {s:,}" for s in by_step]
    numbered = [_by_prompt(records) for records in by_step.values()]
    places = {place: record for step in reversed(numbered) for place, record in step.items()}
    blocks = [
        side_by_side(
            places[p]["prompt"], str(places[p].get("group", "")), zip(names, (s.get(p) for s in numbered), strict=True)
        )
        for p in dict.fromkeys(place for step in numbered for place in step)
    ]
    stopped = " · ".join(
        f"step {s:,}: {sum(r['finish_reason'] == 'stop' for r in rs)} of {len(rs)}" for s, rs in by_step.items()
    )
    note = f'<p class="dim">Answers that ended by themselves: {stopped}.</p>{notes(damage)}'
    return f"<h3>Answers</h3>{note}{''.join(blocks)}"


def _by_prompt(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """(prompt, which of its answers) -> record: a line lost at one step must not move answers under another prompt."""
    count_of: Counter[str] = Counter()
    by_prompt = {}
    for record in records:
        count_of[record["prompt"]] += 1
        by_prompt[record["prompt"], count_of[record["prompt"]]] = record
    return by_prompt
