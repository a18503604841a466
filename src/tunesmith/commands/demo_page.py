"""What the demo's report begins with: what each step changed, in figures and in the answers themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tunesmith.commands.compare import in_words
from tunesmith.commands.demo_recipes import Recipe
from tunesmith.files.answers import ScoredAnswer
from tunesmith.judge.two_models import interval_text
from tunesmith.study.parts import details, esc, side_by_side

SHOWN = 4  # prompts whose answers are not folded away


def opening(recipe: Recipe, answers: Mapping[str, Sequence[ScoredAnswer]], scores: Mapping[str, Any]) -> str:
    """HTML: what the demo started from, a row of figures for every model, and all answers side by side.

    answers: of each model to the same prompts, the base's first. scores: as `commands.score.tell_scores` returns them.
    """
    count = len(next(iter(answers.values())))
    rows = [
        side_by_side(given[0].prompt, given[0].group, zip(answers, map(asdict, given), strict=True))
        for given in zip(*answers.values(), strict=True)
    ]
    blocks = rows[:: max(1, count // SHOWN)][:SHOWN]
    rest = details(f"The other {count - len(blocks)} prompts", "".join(row for row in rows if row not in blocks))
    return (
        f"<p>Everything here starts from {esc(recipe.about)}.</p><h2>What each step changed</h2>{_table(recipe, scores)}"
        f"<h3>The answers</h3><p>{esc(in_words(recipe.answers))} The prompts and the random numbers are the same for every model, so the "
        f"answers differ by the weights alone.</p>{''.join(blocks)}{rest}"
    )


def _table(recipe: Recipe, scores: Mapping[str, Any]) -> str:
    """A row a model, and below the table what its columns mean."""
    head = ["model", "tokens an answer", "ended by themselves", "repeated", "reward", "reward, minus the base's"]
    head += ["nats a token", "on-topic gain"] * recipe.reads
    lines = []
    for name, m in scores["models"].items():
        against = scores["against_first"].get(name)
        cells = [f"{m['length']:.0f}", f"{m['self_stopped']:.0%}", f"{m['repetition']:.0%}", interval_text(m["reward"])]
        cells.append(interval_text(against["difference"], signed=True) if against else "")
        if recipe.reads:
            cells += [interval_text(m["nats_per_token"]), interval_text(m["on_topic_gain"], signed=True)]
        numbers = "".join(f'<td class="number">{esc(cell)}</td>' for cell in cells)
        lines.append(f"<tr><td>{esc(name)}</td>{numbers}</tr>")
    titles = "".join(f'<th class="number">{esc(title)}</th>' for title in head[1:])
    words = f"In parentheses 95 % intervals over the prompts. Rewards are {esc(scores['description'])}."
    if recipe.reads:
        words += (
            " Nats a token: how unlikely the answers are after their prompts to the base itself, so this measures the distance from "
            "it as well as sense; on-topic gain: how much more unlikely they are after another prompt. An answer that would suit "
            "any question gains nothing, and a base never trained on these dialogues is the only judge of it here."
        )
    table = f'<div class="wide"><table><tr><th>{head[0]}</th>{titles}</tr>{"".join(lines)}</table></div>'
    return f'{table}<p class="dim">{words}</p>'
