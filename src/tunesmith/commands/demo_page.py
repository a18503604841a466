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
    """A column a model, and below the table what its rows mean."""
    models, against = scores["models"], scores["against_first"]
    differences = ["", *(interval_text(found["difference"], signed=True) for found in against.values())]
    rows = {
        "tokens an answer": [f"{m['length']:.0f}" for m in models.values()],
        "ended by themselves": [f"{m['self_stopped']:.0%}" for m in models.values()],
        "repeated four-word sequences": [f"{m['repetition']:.0%}" for m in models.values()],
        "reward": [interval_text(m["reward"]) for m in models.values()],
        "reward, minus the base's": differences,
    }
    words = f"In parentheses 95 % intervals over the prompts. Rewards are those of {scores['description']}."
    if recipe.reads:
        rows["nats a token, under the base"] = [interval_text(m["nats_per_token"]) for m in models.values()]
        rows["on-topic gain, nats a token"] = [interval_text(m["on_topic_gain"], signed=True) for m in models.values()]
        words += (
            " Nats a token: how unlikely the base finds the answers after their prompts, so this grows with the distance from it. "
            "On-topic gain: how much more unlikely they are after another prompt; one that would suit any question gains nothing."
        )
    head = "".join(f'<th class="number">{esc(name)}</th>' for name in models)
    body = "".join(
        f"<tr><td>{esc(title)}</td>" + "".join(f'<td class="number">{esc(cell)}</td>' for cell in cells) + "</tr>"
        for title, cells in rows.items()
    )
    return (
        f'<div class="wide"><table><tr><th>answers</th>{head}</tr>{body}</table></div><p class="dim">{esc(words)}</p>'
    )
