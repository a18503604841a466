"""What can be said of answers to a set of prompts without a judge, and of rewards for them: measures, summaries, pairs. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tunesmith.files.answers import ScoredAnswer, by_prompt, rewards
from tunesmith.jsontext import is_number
from tunesmith.stats import Interval, Wins, bootstrap_interval, count_wins, paired_difference, wilson_interval, win_rate

REPEATED = 4  # words of the sequences whose repetition is counted
LIKE_LENGTH = 0.2  # answers are of like length where the shorter has at least 80 % of the longer one's tokens
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return _WORD.findall(text.lower())


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-word sequences as a share of all in all texts; 0 where there is none.

    Source: Li et al. 2016, arXiv 1510.03055, distinct-1 and distinct-2.
    """
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str) -> float:
    """Share of a text's four-word sequences that stood in it before; 0 for a short one.

    Source: Welleck et al. 2019, arXiv 1908.04319, seq-rep-4.
    """
    grams = _grams(words(text), REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def measures(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """What needs no judge: mean tokens; distinct-1 and -2; mean repetition; share with a role marker; share that stopped."""
    if not answers:
        raise ValueError("no answers to measure")
    texts = [a.answer for a in answers]
    n = len(answers)
    return {
        "length": sum(a.tokens for a in answers) / n,
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": sum(map(repetition, texts)) / n,
        "role_leaks": sum(a.leaks for a in answers) / n,
        "self_stopped": sum(a.finish_reason == "stop" for a in answers) / n,
    }


def best_rewards(answers: Sequence[ScoredAnswer]) -> list[float]:
    """The highest reward of every prompt's answers: best-of-n."""
    return list(rewards(answers, max).values())


def reward_summary(answers: Sequence[ScoredAnswer]) -> dict[str, Any]:
    """`{"mean", "low", "high", "n", "groups": {group: the same four}}` over prompts, with 95 % bootstrap intervals.

    A prompt counts once, by the mean of its answers: prompts are drawn anew, not answers (a cluster bootstrap).
    """
    values = rewards(answers)
    group_of = {prompt: given[0].group for prompt, given in by_prompt(answers).items()}
    groups = sorted({group for group in group_of.values() if group})
    by_group = {g: [v for prompt, v in values.items() if group_of[prompt] == g] for g in groups}
    return interval_record(bootstrap_interval(list(values.values()))) | {
        "groups": {g: interval_record(bootstrap_interval(v)) for g, v in by_group.items()}
    }


def examples_of(pairs: Mapping[str, Any]) -> tuple[int, str]:
    """How many independent examples the pairs of a run's estimates are, and of what; 0 where it logged none.

    pairs: the event of that name in its log. Pairs of one prompt are not independent: prompts count, which are what their
    pairs are worth at least. A run of an earlier version did not log its prompts: its pairs count.
    """
    unit = "prompts" if "validation_prompts" in pairs else "pairs"
    count = pairs.get(f"validation_{unit}")
    return (int(count) if is_number(count) and count >= 1 else 0), unit


def accuracy_interval(accuracy: float, pairs: Mapping[str, Any]) -> Interval | None:
    """A logged share of validation pairs with Wilson's interval for `examples_of` them; None where no pairs were logged."""
    examples, _ = examples_of(pairs)
    if not examples:
        return None
    return Interval(accuracy, *wilson_interval(accuracy * examples, examples), int(pairs["validation_pairs"]))


def interval_record(interval: Interval) -> dict[str, Any]:
    """`{"mean", "low", "high", "n"}`, with null for bounds that nobody can tell."""
    bounds = {
        name: value if value == value else None for name, value in (("low", interval.low), ("high", interval.high))
    }
    return {"mean": interval.mean, **bounds, "n": interval.n}


@dataclass(frozen=True)
class RewardComparison:
    """Rewards of A and B on the same prompts. difference: A - B. matched: only prompts with answers of like length."""

    difference: Interval
    wins: Wins
    rate: Interval
    matched: Wins
    matched_rate: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        record = {
            "difference": interval_record(self.difference),
            "wins": asdict(self.wins),
            "win_rate": interval_record(self.rate),
        }
        matched = self.matched_rate and interval_record(self.matched_rate)
        return record | {"matched_length": {"wins": asdict(self.matched), "win_rate": matched}}


def compare_rewards(a: Sequence[ScoredAnswer], b: Sequence[ScoredAnswer]) -> RewardComparison:
    """A against B, prompt by prompt, each by the mean of its answers. Raises: ValueError if the prompts are not the same."""
    by_a, by_b = rewards(a), rewards(b)
    if list(by_a) != list(by_b):
        raise ValueError("answers to different prompts cannot be compared")
    of_a, of_b = list(by_a.values()), list(by_b.values())
    wins = count_wins(of_a, of_b)
    like = [i for i, (x, y) in enumerate(zip(_lengths(a), _lengths(b), strict=True)) if like_length(x, y)]
    matched = count_wins([of_a[i] for i in like], [of_b[i] for i in like])
    rate = win_rate(matched) if matched.n else None
    return RewardComparison(paired_difference(of_a, of_b), wins, win_rate(wins), matched, rate)


def like_length(a: float, b: float) -> bool:
    """Whether two lengths are about the same."""
    return min(a, b) >= (1 - LIKE_LENGTH) * max(a, b)


def _lengths(answers: Sequence[ScoredAnswer]) -> list[float]:
    return [fmean(a.tokens for a in given) for given in by_prompt(answers).values()]
