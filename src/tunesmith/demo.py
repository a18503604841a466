"""`tunesmith demo`: the whole chain on the embedded sample, with a report at the end."""

from __future__ import annotations

import json
import os
import sys
import time
import webbrowser
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tunesmith.options import (
    CheckpointOptions,
    DataOptions,
    DemoCommand,
    EvalOptions,
    GenerateOptions,
    ModelOptions,
    OptimizerOptions,
    SFTConfig,
    TrainOptions,
)
from tunesmith.prompts import load_prompts
from tunesmith.recipes.compare import answer_prompts
from tunesmith.recipes.sft import sft
from tunesmith.runlog import Run, new_run_directory, step_name, write_atomically
from tunesmith.study.report import write_report

SHOWN = 4


def demo(options: DemoCommand) -> Path:
    """Run all parts; returns and prints the report's path."""
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    out = new_run_directory(options.out, "runs/demo", resume=False)

    console.rule("[bold]1 of 3  supervised fine-tuning of the embedded base on 480 sample dialogues")
    run = sft(demo_config(str(out), options.steps))

    console.rule("[bold]2 of 3  answers before and after, to 40 prompts that are in no training row")
    best = int(run.status["best_step"])
    write_answers(run, 0, "sample")
    write_answers(run, best, f"{out}@{best}")
    show_answers(console, run, best)

    console.rule("[bold]3 of 3  report")
    report = write_report([str(out)])
    console.print(
        f"All of it took {(time.monotonic() - began) / 60:.1f} minutes. Talk to the model: tunesmith chat {out}"
    )
    console.print(f"Report: {report.resolve()}")
    if options.open is True or (options.open == "auto" and sys.stdout.isatty() and os.environ.get("DISPLAY")):
        webbrowser.open(report.resolve().as_uri())
    return report


def demo_config(out: str, steps: int) -> SFTConfig:
    """The fine-tuning of the demo: a few passes over the sample, small batches, a cosine to the end."""
    return SFTConfig(
        model=ModelOptions(name="sample"),
        data=DataOptions(name="sample"),
        train=TrainOptions(steps=steps, batch_size=2),
        optimizer=OptimizerOptions(lr=1e-3, schedule="cosine", warmup_steps=min(10, steps // 4)),
        eval=EvalOptions(every=max(1, steps // 12), iters=8),
        checkpoint=CheckpointOptions(keep=1),
        out=out,
    )


def write_answers(run: Run, step: int, model: str) -> None:
    """Answers of a model to the embedded prompts, as `answers/step-XXXXXXXX.jsonl` of the run."""
    prompts = load_prompts()
    answers = answer_prompts(model, prompts, GenerateOptions(max_new_tokens=96), device="cpu")
    lines = [
        {"prompt": p.text, "group": p.group, "answer": a.text, "finish_reason": a.finish_reason, "tokens": a.tokens}
        for p, a in zip(prompts, answers, strict=True)
    ]
    folder = run.path / "answers"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{step_name(step)}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def show_answers(console: Console, run: Run, best: int) -> None:
    """The first prompts with both answers."""
    before, after = (
        [
            json.loads(line)
            for line in (run.path / "answers" / f"{step_name(s)}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for s in (0, best)
    )
    for a, b in list(zip(before, after, strict=True))[:: len(before) // SHOWN][:SHOWN]:
        before_text, after_text = (escape(" ".join(r["answer"].split())) for r in (a, b))
        console.print(
            f"[bold]{escape(a['prompt'])}[/bold]\n  [dim]base [/dim] {before_text}\n  [green]tuned[/green] {after_text}"
        )
