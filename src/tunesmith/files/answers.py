"""Answers to a set of prompts as records, and the JSONL file that keeps them. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, NoReturn

from tunesmith.data.hh_template import HH
from tunesmith.errors import UserError
from tunesmith.files.run import write_atomically
from tunesmith.jsontext import json_lines

FinishReason = Literal["stop", "length", "context"]
"""Why an answer ended: by itself, at the limit of new tokens, or because the model has no further positions."""
ENDINGS: dict[FinishReason, str] = {
    "stop": "ended by itself",
    "length": "cut at the token limit",
    "context": "cut where the model's context ends",
}
ANSWER_END = "<|endoftext|>"
"""How the end of an answer is written among the texts of its tokens, in records and on pages, whichever token it is."""


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer.

    tokens: its length, the end included. reward: what a reward model gave it, None where none was asked.
    leaks: whether it goes on with a turn of its own (`Template.leaks`).
    """

    prompt: str
    group: str
    answer: str
    finish_reason: FinishReason
    tokens: int
    reward: float | None = None
    leaks: bool = False


def write_answers(path: Path, answers: Sequence[ScoredAnswer]) -> None:
    """One JSON object a line; the directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers))


def read_answers(path: Path) -> list[ScoredAnswer]:
    """What `write_answers` wrote. Raises: FileNotFoundError; UserError naming file and line."""

    def refuse(number: int, why: object) -> NoReturn:
        raise UserError(f"{path}:{number}: not a valid answer ({why}); delete the file and score again") from None

    answers = []
    for number, row in json_lines(path, refuse):
        try:
            found = ScoredAnswer(**{k: row[k] for k in ScoredAnswer.__dataclass_fields__ if k in row})
            if "leaks" not in row:  # a file of a version whose models all had the HH form
                found = replace(found, leaks=HH.leaks(found.answer))
            answers.append(found)
        except TypeError as error:
            refuse(number, error)
    return answers


def by_prompt(answers: Iterable[ScoredAnswer]) -> dict[str, list[ScoredAnswer]]:
    """The answers to each prompt, in the order in which the prompts come.

    Prompts are what a figure rests on: they are independent of each other. Several answers to one are not, nor is one that
    stands there twice.
    """
    answers_to: dict[str, list[ScoredAnswer]] = {}
    for answer in answers:
        answers_to.setdefault(answer.prompt, []).append(answer)
    return answers_to


def rewards(answers: Iterable[ScoredAnswer], of: Callable[[list[float]], float] = fmean) -> dict[str, float]:
    """Prompt -> what `of` makes of the rewards of its answers, the mean. Raises: ValueError if an answer has none."""
    reward_of = {}
    for prompt, given in by_prompt(answers).items():
        values = [a.reward for a in given if a.reward is not None]
        if len(values) < len(given):
            raise ValueError("not every answer has a reward")
        reward_of[prompt] = of(values)
    return reward_of
