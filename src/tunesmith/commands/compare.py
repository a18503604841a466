"""`tunesmith compare A B`: the same prompts to two models, side by side, with rewards, verdicts and token changes on request."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.data.chosen_template import chat_template
from tunesmith.data.prompts import Prompt, each_once, load_prompts
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.device import keep_freed_memory
from tunesmith.errors import UsageError, UserError
from tunesmith.files.answers import ANSWER_END, ENDINGS, ScoredAnswer
from tunesmith.files.bases import base_at
from tunesmith.files.names import find_model, load, load_tokenizer, shape_of
from tunesmith.files.run import write_atomically
from tunesmith.generation.context import room_for_prompt
from tunesmith.generation.engine import prepare
from tunesmith.generation.logprobs import encode_answers, logps_of_both, token_texts
from tunesmith.judge.answering import answer_prompts
from tunesmith.judge.endpoint import KEY_VARIABLE, Endpoint
from tunesmith.judge.language_model import Judge
from tunesmith.judge.scorers import Scorer, load_scorer
from tunesmith.judge.two_models import (
    VERSUS,
    Comparison,
    PromptResult,
    TokenLogps,
    judge_text,
    legend,
    level,
    model_rows,
    notes,
    number,
    versus_rows,
)
from tunesmith.judge.two_models_page import render_comparison
from tunesmith.options.commands import CompareCommand
from tunesmith.options.training import GenerateOptions
from tunesmith.progress import Progress

# by level of change, -3 to 3: orange where A finds the token likelier, blue where B does
COLOURS = {
    -3: "white on #b34700",
    -2: "black on #f5a86a",
    -1: "black on #fde0c5",
    1: "black on #cfe8fa",
    2: "black on #7fc0ee",
    3: "white on #0068a8",
}


def compare(a: str, b: str, options: CompareCommand) -> Comparison:
    """Print prompts, answers and the summary, and write what `out` and `html` ask for.

    Raises: UserError, among others where --logprobs meets two tokenizers; if the judge fails, what there is without it
        is printed and written before.
    """
    judge = make_judge(options)
    for file in filter(None, (options.out, options.html)):  # told now, not after minutes
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    with base_at(options.model.base), chat_template(options.chat.template):
        comparison = answered(a, b, options)
    if judge:
        try:
            comparison = judged(comparison, judge)
        except (UserError, KeyboardInterrupt):
            tell(comparison, options)
            raise
    tell(comparison, options)
    return comparison


def answered(a: str, b: str, options: CompareCommand) -> Comparison:
    """Answers of both, with rewards and log-probabilities where asked for; the judge is not asked. Raises: as `compare`."""
    keep_freed_memory()
    for name in (a, b):
        find_model(name)  # what is missing is said now, not after minutes
    prompts = each_once(load_prompts(options.prompts, options.limit))
    if options.logprobs:
        shared_tokenizer(a, b)  # or it is refused here
    scorer = load_scorer(options.reward, device=options.device) if options.reward else None
    of_a, of_b = (answers_of(name, prompts, options.generate, options.device, scorer) for name in (a, b))
    return beside_each_other((a, b), (of_a, of_b), options, scorer.description if scorer else "")


def beside_each_other(
    names: tuple[str, str],
    answers: tuple[Sequence[ScoredAnswer], Sequence[ScoredAnswer]],
    options: CompareCommand,
    scored_by: str,
) -> Comparison:
    """Answers of both to the same prompts, with log-probabilities where asked for. scored_by: what gave the rewards."""
    rows = [PromptResult(x, y) for x, y in zip(*answers, strict=True)]
    if options.logprobs:
        room = room_for_prompt(min(shape_of(name).longest for name in names), options.generate.max_new_tokens)
        rows = with_logps(names, shared_tokenizer(*names), rows, options.device, room)
    return Comparison(names, rows, scored_by, settings=in_words(options.generate))


def answers_of(
    model_name: str,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    device: str = "auto",
    scorer: Scorer | None = None,
) -> list[ScoredAnswer]:
    """One answer a prompt. The streams of chance depend on prompt and seed only, so two models meet the same luck."""
    model, tokenizer = load(model_name, device=device)
    return answer_prompts(prepare(model), tokenizer, prompts, options, scorer=scorer)


def in_words(options: GenerateOptions) -> str:
    """How answers were drawn."""
    if options.temperature == 0:
        return f"Greedy answers of at most {options.max_new_tokens} tokens."
    top_k = f", top_k {options.top_k}" if options.top_k else ""
    drawn = f"temperature {options.temperature:g}, top_p {options.top_p:g}{top_k}, seed {options.seed}"
    return f"Answers of at most {options.max_new_tokens} tokens; {drawn}."


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def shared_tokenizer(a: str, b: str) -> Tokenizer:
    """The tokenizer of both models. Raises: UserError if they have different ones."""
    of_a, of_b = map(load_tokenizer, (a, b))
    if not of_a.same_tokens(of_b):
        raise UserError(
            f"--logprobs compares the same tokens under both models, but {a} ({of_a.vocab_size:,} tokens) and "
            f"{b} ({of_b.vocab_size:,}) have different tokenizers; leave --logprobs out, or compare models with the same tokenizer"
        )
    return of_a


def with_logps(
    names: tuple[str, str],
    tokenizer: Tokenizer,
    rows: Sequence[PromptResult],
    device: str = "auto",
    room: int | None = None,
) -> list[PromptResult]:
    """The rows with the tokens of A's and of B's answer and their log-probabilities under both; one model in memory.

    room: tokens that a prompt may have, for both.
    """
    pairs = [encode_answers(tokenizer, row.a, row.b, room) for row in rows]
    # a generator: the first model is gone before the second is loaded
    end = tokenizer.end_of_answer
    under_a, under_b = (logps_of_both(load(name, device=device)[0], pairs, end) for name in names)
    filled = []
    for row, two, by_a, by_b in zip(rows, pairs, under_a, under_b, strict=True):
        texts = token_texts(tokenizer, two)
        first, second = (list(zip(*x, strict=False)) for x in zip(texts, by_a, by_b, strict=True))
        a, b = ("".join(some[len(logps) : len(ids)]) for some, logps, ids in zip(texts, by_a, two.answers, strict=True))
        filled.append(replace(row, logps=(first, second), unscored=(a, b)))
    return filled


# ---- the judge -------------------------------------------------------------------------------------------------------


def make_judge(options: CompareCommand) -> Judge | None:
    """The judge that the options name, or None. Raises: UsageError if they do not fit together."""
    if not options.judge:
        defaults = CompareCommand()
        for name in ("judge_model", "judge_parallel", "judge_timeout"):
            if getattr(options, name) != getattr(defaults, name):
                raise UsageError(f"--{name} configures a judge, but none is given; add --judge URL")
        return None
    if not options.judge_model:
        raise UsageError(f"--judge {options.judge} needs the name of a model at that URL; add --judge_model NAME")
    for name in ("judge_parallel", "judge_timeout"):
        if getattr(options, name) <= 0:
            raise UsageError(f"--{name} is {getattr(options, name)}, expected more than 0")
    beside = options.out or options.html
    return Judge(
        Endpoint(options.judge, options.judge_model, os.environ.get(KEY_VARIABLE), options.judge_timeout),
        parallel=options.judge_parallel,
        kept=Path(f"{beside}.judge.jsonl") if beside else None,
    )


def judged(comparison: Comparison, judge: Judge) -> Comparison:
    """The same with a judgement of every prompt."""
    pairs = [(row.a.prompt, row.a.answer, row.b.answer) for row in comparison.rows]
    with Progress(2 * len(pairs), unit="question to the judge") as bar:
        spent = 0

        def told(done: int, total: int) -> None:
            nonlocal spent
            now = judge.endpoint.tokens
            bar.advance(done + 2 * len(pairs) - total, None, now - spent)
            spent = now

        verdicts = judge.compare(pairs, told)
    rows = [replace(row, judgement=verdict) for row, verdict in zip(comparison.rows, verdicts, strict=True)]
    return replace(comparison, rows=rows, judge=judge.endpoint.model)


# ---- what comes out --------------------------------------------------------------------------------------------------


def tell(comparison: Comparison, options: CompareCommand) -> None:
    """Print it, and write the files that were asked for."""
    console = Console(highlight=False, emoji=False)
    console.print(side_by_side(comparison))
    summary = comparison.summary()
    if versus := versus_rows(summary):
        console.print(_table(VERSUS, [row.cells for row in versus]))
    console.print(_table(("answers", "A", "B"), model_rows(summary)))
    for line in notes(summary):
        console.print(line, markup=False, soft_wrap=True)
    if "logprobs" in summary:
        console.print(colour_key(), soft_wrap=True)
    if options.out:
        lines = (json.dumps(row.record(), ensure_ascii=False) for row in comparison.rows)
        Path(options.out).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        write_atomically(Path(f"{options.out}.summary.json"), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if options.html:
        Path(options.html).write_text(render_comparison(comparison), encoding="utf-8")


def side_by_side(comparison: Comparison) -> Table:
    """A line a prompt."""
    table = Table(show_lines=True)
    for heading in ("prompt", *(f"{side} {name}" for side, name in zip("AB", comparison.names, strict=True))):
        table.add_column(Text(heading), ratio=1, overflow="fold")
    for row in comparison.rows:
        facts = [f"reward B - A {number(row.difference, signed=True)}"] if row.difference is not None else []
        facts += [judge_text(row.judgement)] if row.judgement else []
        group = [row.a.group] if row.a.group else []
        prompt = Text(row.a.prompt).append("".join(f"\n{line}" for line in (*group, *facts)), "dim")
        logps = row.logps or (None, None)
        sides = zip((row.a, row.b), logps, row.unscored, strict=True)
        table.add_row(prompt, *(_cell(answer, tokens, rest) for answer, tokens, rest in sides))
    return table


def _cell(answer: ScoredAnswer, logps: TokenLogps | None, unscored: str) -> Text:
    facts = [] if answer.finish_reason == "stop" else [ENDINGS[answer.finish_reason]]
    facts += [] if answer.reward is None else [f"reward {number(answer.reward)}"]
    text = coloured(logps, unscored) if logps else Text(re.sub(r"\n\s*\n", "\n", answer.answer.strip()))
    return text.append(f"\n({', '.join(facts)})" if facts else "", "dim")


def coloured(logps: TokenLogps, unscored: str) -> Text:
    """An answer, each token in the colour of its change, and without colour what has no log-probabilities."""
    text, waiting = Text(), 0.0
    for shown, a, b in logps:
        waiting += b - a
        if shown:  # "": a character that goes on in the next token
            shown = "[end]" if shown == ANSWER_END else shown if text else shown.lstrip()
            text.append(shown, COLOURS.get(level(waiting)))
            waiting = 0.0
    return text.append(unscored)


def colour_key() -> Text:
    """What the colours mean."""
    text = Text("log p_B - log p_A of a token, nats: ")
    for step, words in legend():
        text.append(f" {words} ", COLOURS.get(step)).append(" ")
    return text


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
