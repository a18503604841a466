"""`tunesmith demo`: the whole chain on the embedded sample, with a report at the end."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape

from tunesmith.commands.compare import answered, answers_of
from tunesmith.commands.score import score
from tunesmith.commands.training import dpo, sft, train_reward_model
from tunesmith.data.prompts import load_prompts
from tunesmith.errors import UserError
from tunesmith.files.answers import read_answers, write_answers
from tunesmith.files.run import Run, step_name
from tunesmith.judge.scorers import load_scorer
from tunesmith.judge.two_models_page import render_comparison
from tunesmith.options.commands import CompareCommand, DemoCommand, ScoreCommand
from tunesmith.options.configs import with_options
from tunesmith.options.training import DPOConfig, GenerateOptions, RewardConfig, SFTConfig
from tunesmith.study.outcome import accuracy_text
from tunesmith.study.report import write_report

SHOWN = 4
PARTS = (  # what is done, and about how long it takes, as a share of the whole
    ("SFT of the embedded base on 480 dialogues", 0.17),
    ("the same with LoRA: 3 % of the weights", 0.15),
    ("a reward model from 480 pairs of answers", 0.16),
    ("DPO: learning to prefer the better answers, scored by the reward model along the way", 0.36),
    ("scores of all four on 40 new prompts", 0.11),
    ("report", 0.05),
)
ANSWERS = GenerateOptions(max_new_tokens=96)


class Chapters:
    """Headings that say which of how many parts begins, and how long it will still take."""

    def __init__(self, console: Console) -> None:
        self.console, self.began, self.number = console, time.monotonic(), 0

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    def next(self) -> None:
        """The next part begins."""
        done = sum(share for _, share in PARTS[: self.number])
        left = f", about {self.minutes * (1 - done) / done:.1f} minutes left" if done else ""
        title = PARTS[self.number][0]
        self.number += 1
        self.console.rule(f"[bold]{self.number} of {len(PARTS)}  {title}[/bold][dim]{left}[/dim]")


def demo(options: DemoCommand) -> Path:
    """Run all parts; returns and prints the report's path."""
    console = Console(highlight=False, soft_wrap=True)
    out, steps, chapters = free_directory(options.out), options.steps, Chapters(console)

    chapters.next()
    tuned = finished(sft(trained_on_sample(SFTConfig(), out / "sft", "sample", steps, 1e-3, train__batch_size=2)))
    chapters.next()
    adapters = {"train__batch_size": 2, "lora__rank": 8}  # which want a larger learning rate
    light = finished(sft(trained_on_sample(SFTConfig(), out / "lora", "sample", steps, 5e-3, **adapters)))
    for name, run in (("all weights", tuned), ("LoRA", light)):
        console.print(f"{name:12} best validation loss {run.status['best_validation_loss']:.3f}")
    chapters.next()
    judge = finished(
        train_reward_model(trained_on_sample(RewardConfig(), out / "reward", str(tuned.path), steps, 1e-4))
    )
    tell_accuracy(console, judge)
    chapters.next()
    scored = {"eval__reward": str(judge.path), "eval__max_new_tokens": ANSWERS.max_new_tokens}
    aligned = finished(dpo(trained_on_sample(DPOConfig(), out / "dpo", str(tuned.path), steps, 2e-5, **scored)))
    tell_accuracy(console, aligned)
    chapters.next()
    write_base_answers(tuned, str(judge.path))
    names = ["sample", *(str(run.path) for run in (tuned, light, aligned))]
    score(names, ScoreCommand(reward=str(judge.path), generate=ANSWERS, shown=0))
    show_answers(console, {"base": (tuned, 0), "SFT": (tuned, best_step(tuned)), "DPO": (aligned, best_step(aligned))})
    chapters.next()
    options_of_page = CompareCommand(reward=str(judge.path), logprobs=True, generate=ANSWERS)
    page = out / "compare.html"
    page.write_text(render_comparison(answered(str(tuned.path), str(aligned.path), options_of_page)), encoding="utf-8")
    report = write_report([str(run.path) for run in (tuned, light, judge, aligned)], str(out / "report.html"))
    console.print(
        f"The whole demo took {chapters.minutes:.1f} minutes. Talk to the model: tunesmith chat {aligned.path}"
    )
    console.print(f"SFT against DPO, prompt by prompt: {page.resolve()}")
    console.print(f"Report: {report.resolve()}")
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


C = TypeVar("C", SFTConfig, RewardConfig, DPOConfig)


def trained_on_sample(config: C, out: Path, model: str, steps: int, lr: float, **options: Any) -> C:
    """The options of one of the demo's trainings: a few passes over the sample, small batches, a cosine to the end.

    Ten estimates on the held-out rows. options: further ones, `__` for the dot.
    """
    return with_options(
        dataclasses.replace(config, out=str(out)),
        {
            "model.name": model,
            "data.name": "sample",
            "train.steps": steps,
            "optimizer.lr": lr,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": min(10, steps // 4),
            "eval.every": max(1, steps // 10),
            "eval.iters": 8,
            "checkpoint.keep": 1,
            **{name.replace("__", "."): value for name, value in options.items()},
        },
    )


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


def best_step(run: Run) -> int:
    """The step of the checkpoint that was chosen."""
    return int(run.status["best_step"])


def write_base_answers(run: Run, judge: str) -> None:
    """The embedded base's answers with their rewards, as those of step 0 of the run that started from it."""
    answers = answers_of("sample", load_prompts(), ANSWERS, scorer=load_scorer(judge))
    write_answers(run.path / "answers" / f"{step_name(0)}.jsonl", answers)


def show_answers(console: Console, which: dict[str, tuple[Run, int]]) -> None:
    """A few prompts with the answer of every model."""
    files = [run.path / "answers" / f"{step_name(step)}.jsonl" for run, step in which.values()]
    rows = list(zip(*map(read_answers, files), strict=True))
    for row in rows[:: len(rows) // SHOWN][:SHOWN]:
        console.print(f"[bold]{escape(row[0].prompt)}[/bold]")
        for name, answer in zip(which, row, strict=True):
            console.print(f"  [dim]{name:4}[/dim] {escape(' '.join(answer.answer.split()))}")
