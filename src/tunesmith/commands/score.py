"""`tunesmith score MODEL...`: answers to the prompt set, scored by a reward model.

    tunesmith score runs/sft runs/dpo --reward runs/reward
    tunesmith score runs/sft@all --reward runs/reward

Every mean reward has its 95 % bootstrap interval over the prompts; several models are compared prompt by prompt with the first.
What can be counted without a judge stands in columns of its own and is never blended into the reward.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunesmith.data.chosen_template import chat_template
from tunesmith.data.prompts import each_once, load_prompts
from tunesmith.device import keep_freed_memory
from tunesmith.errors import UsageError
from tunesmith.files.answers import ScoredAnswer, by_prompt, rewards, write_answers
from tunesmith.files.bases import base_at
from tunesmith.files.names import checkpoints_of, find_model, load, run_and_step
from tunesmith.files.run import step_name, write_atomically
from tunesmith.generation.engine import prepare
from tunesmith.judge.answering import answer_prompts
from tunesmith.judge.fluency import Reader
from tunesmith.judge.measures import best_rewards, compare_rewards, interval_record, measures, reward_summary
from tunesmith.judge.scorers import Scorer, load_scorer
from tunesmith.judge.two_models import interval_text
from tunesmith.options.commands import ScoreCommand
from tunesmith.stats import bootstrap_interval
from tunesmith.train.choice import choice_lines, choose, read_estimates

Answers = Mapping[str, Sequence[ScoredAnswer]]
SHOWN_WORDS = 60


def score(names: Sequence[str], options: ScoreCommand) -> dict[str, Any]:
    """Print the tables; return `{"scorer", "models": {name: reward, measures, best_of_n, fluency}, "against_first": {name: ...}}`.

    Raises: UserError if a model, the reward model or the prompts cannot be had; UsageError for options out of range.
    """
    if options.samples < 1 or options.shown < 0:
        raise UsageError(
            f"--samples is {options.samples}, expected at least 1; --shown is {options.shown}, expected 0 or more"
        )
    keep_freed_memory()
    with base_at(options.model.base), chat_template(options.chat.template):
        return _score(names, options)


def _score(names: Sequence[str], options: ScoreCommand) -> dict[str, Any]:
    """As `score`, its options checked."""
    models = list(dict.fromkeys(model for name in names for model in checkpoints_of(name)))
    for name in [*models, *filter(None, [options.fluency])]:
        find_model(name)  # what is missing is said now, not after minutes
    prompts = each_once(load_prompts(options.prompts, options.limit))
    scorer = load_scorer(options.reward, device=options.device)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"scored by {scorer.description}", markup=False)
    answers: dict[str, list[ScoredAnswer]] = {}
    for name in models:
        model, tokenizer = load(name, device=options.device)
        answers[name] = answer_prompts(
            prepare(model), tokenizer, prompts, options.generate, scorer=scorer, samples=options.samples
        )
        if file := answers_file(name, options.out):
            write_answers(file, answers[name])
    result = tell_scores(answers, scorer, options)
    for line in choice_of_run(answers):
        console.print(line, markup=False)
    return result


def tell_scores(answers: Answers, scorer: Scorer, options: ScoreCommand) -> dict[str, Any]:
    """Print the tables of scored answers and write what `options.out` asks for; returns as `score`. answers: by names to be shown."""
    console = Console(highlight=False, soft_wrap=True)
    result: dict[str, Any] = {"scorer": scorer.name, "description": scorer.description, "samples": options.samples}
    result |= summarise(answers, best=options.samples > 1)
    if options.fluency:
        reader = Reader(options.fluency, options.device)
        result["reader"] = reader.name
        for name, given in answers.items():
            result["models"][name] |= reader.fluency(given)
    label = labels(list(answers))
    print_scores(console, result, label)
    if options.fluency:
        print_fluency(console, result, label)
    print_groups(console, result, label)
    print_extremes(console, answers, label, options.shown)
    if options.out:
        write_atomically(Path(options.out) / "scores.json", json.dumps(result, indent=2) + "\n")
    return result


def answers_file(name: str, out: str | None) -> Path | None:
    """Where a model's answers go: into `out`, else into its run; None where there is none, or that run judged itself."""
    if out is not None:
        return Path(out) / "answers" / f"{re.sub('[^A-Za-z0-9._@-]+', '-', name).strip('-')}.jsonl"
    checkpoint = run_and_step(name)
    if checkpoint is None or checkpoint[0].metrics("reward"):
        return None
    return checkpoint[0].path / "answers" / f"{step_name(checkpoint[1])}.jsonl"


def summarise(answers: Answers, *, best: bool) -> dict[str, Any]:
    """The figures of all tables, JSON-able. best: best-of-n too."""
    models = {}
    for name, given in answers.items():
        models[name] = {"reward": reward_summary(given), **measures(given)}
        if best:
            models[name]["best_of_n"] = interval_record(bootstrap_interval(best_rewards(given)))
    first, *others = answers
    against = {name: compare_rewards(answers[name], answers[first]) for name in others}
    return {"models": models, "against_first": {name: compared.as_dict() for name, compared in against.items()}}


def print_scores(console: Console, result: dict[str, Any], label: Mapping[str, str]) -> None:
    """Rewards, each model with its best-of-n below it; what needs no judge; every further model against the first."""
    samples, models, against = result["samples"], result["models"], result["against_first"]
    first = next(iter(models))
    drawn = f", {samples} answers each" if samples > 1 else ""
    others = [f"minus that of {label[first]}"] if against else []
    table = new_table(
        f"mean reward of {models[first]['reward']['n']} prompts{drawn}, 95 % interval", "model", "reward", *others
    )
    for name, measured in models.items():
        difference = [interval_text(against[name]["difference"], signed=True)] if name in against else []
        table.add_row(label[name], interval_text(measured["reward"]), *difference)
        if samples > 1:
            nats = math.log(samples) - (samples - 1) / samples
            table.add_row(f"  best of {samples} (KL at most {nats:.2f} nats)", interval_text(measured["best_of_n"]))
    console.print(table)
    headings = ("tokens", "distinct-1", "distinct-2", "repeated", "role leaks", "stops")
    table = new_table("without a judge", "model", *headings)
    for name, measured in models.items():
        numbers = (f"{measured['length']:.0f}", f"{measured['distinct_1']:.2f}", f"{measured['distinct_2']:.2f}")
        shares = (f"{measured[key]:.0%}" for key in ("repetition", "role_leaks", "self_stopped"))
        table.add_row(label[name], *numbers, *shares)
    console.print(table)
    if against:
        table = new_table(f"against {label[first]}, prompt by prompt", "model", "win/tie/loss", "win rate")
        for name, measured in against.items():
            table.add_row(label[name], *win_texts(measured))
            table.add_row("  where both are of similar length", *win_texts(measured["matched_length"]))
        console.print(table)


def print_fluency(console: Console, result: dict[str, Any], label: Mapping[str, str]) -> None:
    """How likely the reader finds each model's answers."""
    title = f"nats a token of the answers under {result['reader']}, 95 % interval over the prompts"
    table = new_table(title, "model", "after their prompt", "more after another prompt")
    for name, m in result["models"].items():
        table.add_row(label[name], interval_text(m["nats_per_token"]), interval_text(m["on_topic_gain"], signed=True))
    console.print(table)


def print_groups(console: Console, result: dict[str, Any], label: Mapping[str, str]) -> None:
    """Mean reward by group of prompts, the models of each one below the other."""
    models = result["models"]
    groups = list(next(iter(models.values()))["reward"]["groups"])
    if len(groups) < 2:
        return
    table = new_table("mean reward by group", "group", "reward")
    for group in groups:
        rewards_of = {name: m["reward"]["groups"][group] for name, m in models.items()}
        table.add_row(f"{escape(group)}, {next(iter(rewards_of.values()))['n']} prompts")
        for name, record in rewards_of.items():
            table.add_row(f"  {label[name]}", interval_text(record))
    console.print(table)


def new_table(title: str, first: str, *others: str) -> Table:
    """A table whose first column is text and whose others are figures that are not broken over lines."""
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=len(others) < 6)
    return table


def labels(names: Sequence[str]) -> dict[str, str]:
    """Model -> its name without the directories before it, where that still tells them apart."""
    short = {name: escape(name.rstrip("/").rpartition("/")[2]) for name in names}
    return short if len(set(short.values())) == len(short) else {name: escape(name) for name in names}


def win_texts(record: dict[str, Any]) -> tuple[str, str]:
    """`3/1/2` and the rate with its interval."""
    return "/".join(str(x) for x in record["wins"].values()), interval_text(record["win_rate"], percent=True)


def print_extremes(console: Console, answers: Answers, label: Mapping[str, str], shown: int) -> None:
    """The prompts with the highest and the lowest reward of every model, each with its first answer."""
    for name, given in answers.items():
        values, first = rewards(given), by_prompt(given)
        order = sorted(values, key=lambda prompt: -values[prompt])
        shown = min(shown, len(order) // 2)
        for title, chosen in (("best", order[:shown]), ("worst", order[len(order) - shown :][::-1])):
            for prompt in chosen:
                console.print(
                    f"[dim]{title} of[/dim] {label[name]}  [bold]{values[prompt]:.2f}[/bold]  {escape(prompt)}"
                )
                console.print(f"    {escape(shortened(first[prompt][0].answer))}")


def shortened(text: str) -> str:
    """The text on one line, cut after SHOWN_WORDS words."""
    words = text.split()
    return " ".join(words[:SHOWN_WORDS]) + (" ..." if len(words) > SHOWN_WORDS else "")


def choice_of_run(answers: Answers) -> list[str]:
    """Which checkpoint to use, in words, where all models are checkpoints of one run."""
    checkpoints = [run_and_step(name) for name in answers]
    if len(checkpoints) < 2 or None in checkpoints or len({f[0].path for f in checkpoints if f}) > 1:
        return []
    run = next(f[0] for f in checkpoints if f)
    by_step = {f[1]: list(rewards(given).values()) for f, given in zip(checkpoints, answers.values(), strict=True) if f}
    estimates = read_estimates(run)
    choice = choose(estimates, by_step)
    return choice_lines(choice, estimates) if choice else []
