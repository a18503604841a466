"""`tunesmith demo`: the whole chain on the embedded sample, with a report at the end."""

from __future__ import annotations

import os
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tunesmith.answers import ScoredAnswer
from tunesmith.answers import write_answers as store_answers
from tunesmith.errors import UserError
from tunesmith.options import (
    CheckpointOptions,
    DataOptions,
    DemoCommand,
    DPOConfig,
    EvalOptions,
    GenerateOptions,
    LoRAOptions,
    ModelOptions,
    OptimizerOptions,
    PairDataOptions,
    RewardConfig,
    SFTConfig,
    TrainOptions,
)
from tunesmith.prompts import load_prompts
from tunesmith.recipes.compare import answers_of
from tunesmith.recipes.dpo import dpo
from tunesmith.recipes.reward import train_reward_model
from tunesmith.recipes.sft import sft
from tunesmith.runlog import Run, step_name
from tunesmith.study.report import accuracy_text, write_report

SHOWN = 4
PARTS = (  # what is done, and about how long it takes, as a share of the whole
    ("SFT of the embedded base on 480 dialogues", 0.22),
    ("the same with LoRA: 3 % of the weights", 0.20),
    ("a reward model from 480 pairs of answers", 0.20),
    ("DPO: to prefer the better answers", 0.25),
    ("answers of all three to 40 new prompts", 0.12),
    ("report", 0.01),
)


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
    tuned = sft(demo_sft(out / "sft", steps))
    chapters.next()
    light = sft(demo_sft(out / "lora", steps, rank=8))
    for name, run in (("all weights", tuned), ("LoRA", light)):
        console.print(f"{name:12} best validation loss {run.status['best_validation_loss']:.3f}")
    chapters.next()
    judge = train_reward_model(demo_reward(out / "reward", str(tuned.path), steps))
    tell_accuracy(console, judge)
    chapters.next()
    aligned = dpo(demo_dpo(out / "dpo", str(tuned.path), steps))
    tell_accuracy(console, aligned)
    chapters.next()
    answers = {
        "base": write_answers(tuned, 0, "sample"),
        "SFT": write_answers(tuned, int(tuned.status["best_step"]), str(tuned.path)),
        "DPO": write_answers(aligned, int(aligned.status["best_step"]), str(aligned.path)),
    }
    show_answers(console, answers)
    chapters.next()
    report = write_report([str(run.path) for run in (tuned, light, judge, aligned)], str(out / "report.html"))
    console.print(f"All of it took {chapters.minutes:.1f} minutes. Talk to the model: tunesmith chat {aligned.path}")
    console.print(f"Report: {report.resolve()}")
    if options.open is True or (options.open == "auto" and sys.stdout.isatty() and os.environ.get("DISPLAY")):
        webbrowser.open(report.resolve().as_uri())
    return report


def free_directory(out: str | None) -> Path:
    """Where the demo writes. Raises: UserError if a directory named by the user already holds something."""
    if out is not None:
        path = Path(out)
        if path.exists() and any(path.iterdir()):
            raise UserError(f"--out {path} already holds something; name another directory")
        return path
    path, number = Path("runs/demo"), 2
    while path.exists():
        path, number = Path(f"runs/demo-{number}"), number + 1
    return path


# A few passes over the sample, small batches, a cosine to the end; ten estimates on the held-out rows.


def _common(out: Path, steps: int, lr: float) -> dict[str, Any]:
    return {
        "optimizer": OptimizerOptions(lr=lr, schedule="cosine", warmup_steps=min(10, steps // 4)),
        "eval": EvalOptions(every=max(1, steps // 10), iters=8),
        "checkpoint": CheckpointOptions(keep=1),
        "out": str(out),
    }


def demo_sft(out: Path, steps: int, rank: int = 0) -> SFTConfig:
    """The fine-tuning of the demo; adapters want a larger learning rate."""
    return SFTConfig(
        model=ModelOptions(name="sample"),
        data=DataOptions(name="sample"),
        train=TrainOptions(steps=steps, batch_size=2),
        lora=LoRAOptions(rank=rank),
        **_common(out, steps, 5e-3 if rank else 1e-3),
    )


def demo_reward(out: Path, model: str, steps: int) -> RewardConfig:
    """The reward model of the demo, made from the fine-tuned model."""
    return RewardConfig(
        model=ModelOptions(name=model),
        data=PairDataOptions(name="sample"),
        train=TrainOptions(steps=steps),
        **_common(out, steps, 1e-4),
    )


def demo_dpo(out: Path, model: str, steps: int) -> DPOConfig:
    """The DPO of the demo, from the fine-tuned model."""
    return DPOConfig(
        model=ModelOptions(name=model),
        data=PairDataOptions(name="sample"),
        train=TrainOptions(steps=steps),
        **_common(out, steps, 2e-5),
    )


def tell_accuracy(console: Console, run: Run) -> None:
    """How often the held-out better answer is preferred, beside what length alone would reach."""
    best = next(e for e in run.metrics("eval") if e["step"] == run.status["best_step"])
    pairs = run.metrics("pairs")[0]
    console.print(
        f"held-out pairs with the better answer ahead: {accuracy_text(run, best['validation_accuracy'])}; "
        f"by length alone {100 * pairs['validation_longer_chosen']:.1f} %"
    )


def write_answers(run: Run, step: int, model: str) -> list[ScoredAnswer]:
    """Answers of a model to the embedded prompts, also written as `answers/step-XXXXXXXX.jsonl` of the run."""
    prompts = load_prompts()
    answers = answers_of(model, prompts, GenerateOptions(max_new_tokens=96), device="cpu")
    store_answers(run.path / "answers" / f"{step_name(step)}.jsonl", answers)
    return answers


def show_answers(console: Console, answers: dict[str, list[ScoredAnswer]]) -> None:
    """A few prompts with the answer of every model."""
    rows = list(zip(*answers.values(), strict=True))
    for row in rows[:: len(rows) // SHOWN][:SHOWN]:
        console.print(f"[bold]{escape(row[0].prompt)}[/bold]")
        for name, record in zip(answers, row, strict=True):
            console.print(f"  [dim]{name:4}[/dim] {escape(' '.join(record.answer.split()))}")
