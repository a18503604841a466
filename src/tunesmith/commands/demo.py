"""`tunesmith demo`: the whole chain on a small base and the embedded dialogues, with a report at the end."""

from __future__ import annotations

import os
import sys
import time
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tunesmith.commands.compare import answers_of, beside_each_other
from tunesmith.commands.demo_page import opening
from tunesmith.commands.demo_recipes import Recipe, recipe_of
from tunesmith.commands.score import tell_scores
from tunesmith.commands.training import dpo, sft, train_reward_model
from tunesmith.data.prompts import load_prompts
from tunesmith.errors import UserError
from tunesmith.files.answers import ScoredAnswer, write_answers
from tunesmith.files.names import find_model
from tunesmith.files.run import Run
from tunesmith.judge.scorers import load_scorer
from tunesmith.judge.two_models_page import render_comparison
from tunesmith.options.commands import CompareCommand, DemoCommand, ScoreCommand
from tunesmith.study.outcome import accuracy_text
from tunesmith.study.report import write_report

SHOWN = 4


class Chapters:
    """Headings that say which of how many parts begins, and how long it will still take."""

    def __init__(self, console: Console, recipe: Recipe) -> None:
        self.console, self.parts, self.began, self.number = console, recipe.parts, time.monotonic(), 0

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    def next(self) -> None:
        """The next part begins."""
        done = sum(share for _, share in self.parts[: self.number])
        left = f", about {self.minutes * (1 - done) / done:.1f} minutes left" if done else ""
        title = self.parts[self.number][0]
        self.number += 1
        self.console.rule(f"[bold]{self.number} of {len(self.parts)}  {title}[/bold][dim]{left}[/dim]")


def demo(options: DemoCommand) -> Path:
    """Run all parts; returns and prints the report's path. Raises: UserError if the model cannot be had or a training ends early."""
    console = Console(highlight=False, soft_wrap=True)
    recipe = recipe_of(options.model, options.steps)
    out = free_directory(options.out)
    find_model(recipe.base)  # what is missing is said now
    console.print(f"This starts from {recipe.about}.", markup=False)
    chapters = Chapters(console, recipe)
    chapters.next()
    runs = {"SFT": finished(sft(recipe.sft(out / "sft")))}
    tuned = str(runs["SFT"].path)
    if not recipe.rank:
        chapters.next()
        runs["LoRA"] = finished(sft(recipe.sft(out / "lora", beside=True)))
        for name, run in zip(("all weights", "LoRA"), runs.values(), strict=True):
            console.print(f"{name:12} best validation loss {run.status['best_validation_loss']:.3f}")
    chapters.next()
    judge = finished(train_reward_model(recipe.reward(out / "reward", tuned)))
    tell_accuracy(console, judge)
    chapters.next()
    runs["DPO"] = finished(dpo(recipe.dpo(out / "dpo", tuned, str(judge.path))))
    tell_accuracy(console, runs["DPO"])
    chapters.next()
    answers, scores = scored_answers(recipe, runs, judge, out)
    show_answers(console, answers)
    chapters.next()
    names = (tuned, str(runs["DPO"].path))
    options_of_page = CompareCommand(logprobs=True, generate=recipe.answers)
    both = beside_each_other(names, (answers["SFT"], answers["DPO"]), options_of_page, scores["description"])
    (out / "compare.html").write_text(render_comparison(both), encoding="utf-8")
    directories = [str(run.path) for run in (*list(runs.values())[:-1], judge, runs["DPO"])]
    report = write_report(directories, str(out / "report.html"), opening(recipe, answers, scores))
    console.print(f"The whole demo took {chapters.minutes:.1f} minutes and started from {recipe.about}.", markup=False)
    console.print(f"Talk to the model: tunesmith chat {runs['DPO'].path}", markup=False)
    console.print(f"SFT against DPO, prompt by prompt: {(out / 'compare.html').resolve()}", markup=False)
    console.print(f"Report: {report.resolve()}", markup=False)
    if options.open is True or (options.open == "auto" and sys.stdout.isatty() and os.environ.get("DISPLAY")):
        webbrowser.open(report.resolve().as_uri())
    return report


def free_directory(out: str | None) -> Path:
    """Where the demo writes. Raises: UserError if a directory named by the user already holds something."""
    if out is not None:
        path = Path(out)
        if path.exists() and any(path.iterdir()):
            raise UserError(f"--out {path} is not empty; name another directory")
        return path
    path, number = Path("runs/demo"), 2
    while path.exists():
        path, number = Path(f"runs/demo-{number}"), number + 1
    return path


def finished(run: Run) -> Run:
    """The run, if it came to its end. Raises: UserError if it was stopped or has diverged; the rest would be built on sand."""
    if run.status["state"] != "finished":
        raise UserError(
            f"the demo stops here: {run.path} is {run.status['state']} ({run.status['reason']}). "
            "Run it again: it starts from the beginning, in another directory"
        )
    return run


def tell_accuracy(console: Console, run: Run) -> None:
    """How often the held-out better answer is preferred, beside what length alone would reach."""
    best = next(e for e in run.metrics("eval") if e["step"] == run.status["best_step"])
    pairs = run.metrics("pairs")[0]
    console.print(
        f"held-out pairs with the better answer scored higher: {accuracy_text(run, best['validation_accuracy'])}; "
        f"by length alone {100 * pairs['validation_longer_chosen']:.1f} %"
    )


def scored_answers(
    recipe: Recipe, runs: Mapping[str, Run], judge: Run, out: Path
) -> tuple[dict[str, list[ScoredAnswer]], dict[str, Any]]:
    """Answers of the base and of every run's best checkpoint to the embedded prompts, and what the printed tables hold."""
    scorer = load_scorer(str(judge.path))
    print(f"scored by {scorer.description}")
    models = {"base": recipe.base, **{name: str(run.path) for name, run in runs.items()}}
    answers = {n: answers_of(model, load_prompts(), recipe.answers, scorer=scorer) for n, model in models.items()}
    for name, given in answers.items():
        write_answers(out / "answers" / f"{name}.jsonl", given)
    options = ScoreCommand(shown=0, fluency=recipe.base if recipe.reads else None, out=str(out))
    return answers, tell_scores(answers, scorer, options)


def show_answers(console: Console, answers: Mapping[str, list[ScoredAnswer]]) -> None:
    """A few prompts with the answer of every model."""
    rows = list(zip(*answers.values(), strict=True))
    for row in rows[:: len(rows) // SHOWN][:SHOWN]:
        console.print(f"[bold]{escape(row[0].prompt)}[/bold]")
        for name, answer in zip(answers, row, strict=True):
            console.print(f"  [dim]{name:4}[/dim] {escape(' '.join(answer.answer.split()))}")
