"""Finished runs to one self-contained HTML page: a pure function of run directories."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import UserError
from tunesmith.runlog import STEP_NAME, Run, write_atomically
from tunesmith.study.figures import loss_curve

STYLE = """
:root { color-scheme: light dark; --edge: light-dark(#ddd, #444); --soft: light-dark(#f6f6f4, #222);
  --accent: light-dark(#0072b2, #56b4e9); }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--edge); padding-bottom: .3rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid var(--edge); }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption, .dim { opacity: .7; font-size: .9rem; } .group { color: var(--accent); font-size: .85rem; }
.cut::after { content: " … cut at the token limit"; opacity: .6; font-size: .85em; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; border-radius: 6px; font-size: .85rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem; }
.facts div { background: var(--soft); border-radius: 6px; padding: .6rem 1rem; } .facts b { display: block; font-size: 1.3rem; }
"""


def write_report(directories: Sequence[str], out: str | None = None) -> Path:
    """Write the page and return its path. Raises: UserError if a directory holds no run, or none has a metric yet."""
    runs = [Run(d) for d in directories]
    page = render_report(runs)
    path = Path(out) if out else runs[0].path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def render_report(runs: Sequence[Run]) -> str:
    """The page as text; the same run directories give the same bytes."""
    body = "".join(_run_section(run) for run in runs)
    title = f"tunesmith: {', '.join(run.path.name for run in runs)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}</body></html>
"""


def _run_section(run: Run) -> str:
    status, estimates, train = run.status, run.metrics("eval"), run.metrics("train")
    if not estimates and not train:
        raise UserError(f"{run.path} has no metrics yet (its state is {status['state']!r}); nothing to report")
    name = html.escape(run.path.name)
    parts = [f'<h2 id="{name}">{name}</h2>', _facts(status, estimates, train)]
    if status.get("reason"):
        parts.append(f"<p>{html.escape(status['reason'])}</p>")
    if estimates:
        caption = (
            "Loss over the training. Estimates are means over always the same rows, every token weighing the same."
        )
        parts.append(f"<figure>{loss_curve(run)}<figcaption>{caption}</figcaption></figure>")
        parts.append(_estimates_table(estimates, status.get("best_step")))
    parts.append(_answers(run))
    parts.append(
        f"<details><summary>Configuration</summary><pre>{html.escape(yaml.safe_dump(run.config, sort_keys=False))}</pre></details>"
    )
    return "\n".join(parts)


def _facts(status: dict[str, Any], estimates: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]]) -> str:
    facts = [("state", f"{status['state']} at step {status['step']:,}")]
    if len(estimates) > 1:
        first, best = estimates[0]["validation_loss"], min(e["validation_loss"] for e in estimates)
        facts.append(("validation loss, first and best", f"{first:.3f} → {best:.3f}"))
        facts.append(("validation perplexity, first and best", f"{math.exp(first):,.1f} → {math.exp(best):,.1f}"))
    if train:
        seconds = train[-1]["time"] - train[0]["time"]
        facts.append(("tokens trained on", f"{train[-1]['tokens']:,}"))
        facts.append(("time", f"{seconds / 60:.1f} min"))
        facts.append(("peak memory", f"{train[-1]['peak_memory_gb']:.2f} GB"))
    return (
        '<div class="facts">'
        + "".join(f"<div>{label}<b>{html.escape(value)}</b></div>" for label, value in facts)
        + "</div>"
    )


def _estimates_table(estimates: Sequence[dict[str, Any]], best: int | None) -> str:
    rows = "".join(
        f'<tr><td class="number">{e["step"]:,}{" ★" if e["step"] == best else ""}</td><td class="number">{e["train_loss"]:.4f}</td>'
        f'<td class="number">{e["validation_loss"]:.4f}</td><td class="number">{e["validation_perplexity"]:,.2f}</td></tr>'
        for e in estimates
    )
    head = "".join(
        f'<th class="number">{h}</th>'
        for h in ("step", "loss on training rows", "loss on validation rows", "validation perplexity")
    )
    return (
        f"<details><summary>Every estimate (★ best checkpoint)</summary><table><tr>{head}</tr>{rows}</table></details>"
    )


def read_answers(run: Run) -> dict[int, list[dict[str, Any]]]:
    """Step -> the records of `answers/step-XXXXXXXX.jsonl`, in order of the steps."""
    found = {}
    for path in sorted((run.path / "answers").glob("step-*.jsonl")):
        if match := STEP_NAME.fullmatch(path.stem):
            found[int(match[1])] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return found


def _answers(run: Run) -> str:
    by_step = read_answers(run)
    if not by_step:
        return ""
    steps = list(by_step)
    head = "".join(f"<th>{'step 0, the base' if s == 0 else f'step {s:,}'}</th>" for s in steps)
    rows = []
    for records in zip(*by_step.values(), strict=False):
        cells = "".join(f"<td{_cut(r)}>{html.escape(r['answer'].strip()) or '<i>nothing</i>'}</td>" for r in records)
        group = f'<br><span class="group">{html.escape(records[0].get("group", ""))}</span>'
        rows.append(f"<tr><td>{html.escape(records[0]['prompt'])}{group}</td>{cells}</tr>")
    stopped = " · ".join(
        f"step {s:,}: {sum(r['finish_reason'] == 'stop' for r in rs)} of {len(rs)}" for s, rs in by_step.items()
    )
    note = f'<p class="dim">Answers that ended by themselves: {stopped}.</p>'
    return f"<h3>Answers</h3>{note}<table><tr><th>prompt</th>{head}</tr>{''.join(rows)}</table>"


def _cut(record: dict[str, Any]) -> str:
    return "" if record["finish_reason"] == "stop" else ' class="cut"'
