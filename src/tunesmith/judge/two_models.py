"""Two models on the same prompts: what is known of each prompt, and what it comes to. B is always told against A. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.files.answers import ScoredAnswer
from tunesmith.judge.language_model import Judgement
from tunesmith.judge.measures import (
    LIKE_LENGTH,
    compare_rewards,
    interval_record,
    like_length,
    measures,
    reward_summary,
)
from tunesmith.stats import Wins, bootstrap_interval, count_wins, share_interval, win_rate

TokenLogps = Sequence[tuple[str, float, float]]
"""Every token of an answer: its text, its log-probability under A, and under B, in nats."""

LEVELS = (0.1, 0.5, 1.5)  # nats; from each of these on a change has a stronger colour


def legend() -> list[tuple[int, str]]:
    """Every level from -3 to 3 and the changes that it stands for."""
    weak, middle, strong = LEVELS
    words = [f"{strong} or more", f"{middle} to {strong}", f"{weak} to {middle}"]
    stronger = list(zip((3, 2, 1), words, strict=True))
    return (
        [(-n, f"-({text})") for n, text in stronger]
        + [(0, f"less than {weak}")]
        + [(n, f"+({text})") for n, text in stronger[::-1]]
    )


def level(change: float) -> int:
    """How strongly a change of log-probability is shown: -3 to 3, 0 for nearly none."""
    strength = sum(abs(change) >= limit for limit in LEVELS)
    return strength if change > 0 else -strength


@dataclass(frozen=True)
class PromptResult:
    """One prompt. judgement: where a judge was asked. logps: of A's answer and of B's, where asked for.

    unscored: what of the two answers' texts has no log-probabilities, because a model has no positions for it.
    """

    a: ScoredAnswer
    b: ScoredAnswer
    judgement: Judgement | None = None
    logps: tuple[TokenLogps, TokenLogps] | None = None
    unscored: tuple[str, str] = ("", "")

    @property
    def difference(self) -> float | None:
        """Reward of B's answer less that of A's."""
        return None if self.a.reward is None or self.b.reward is None else self.b.reward - self.a.reward

    @property
    def like_length(self) -> bool:
        """Whether the answers are of like length."""
        return like_length(self.a.tokens, self.b.tokens)

    def record(self) -> dict[str, Any]:
        """JSON-able: a line of the output."""
        sides: dict[str, Any] = {}
        for i, (side, answer) in enumerate((("a", self.a), ("b", self.b))):
            sides[side] = {k: v for k, v in asdict(answer).items() if k not in ("prompt", "group")}
            if self.logps:
                sides[side]["logps"] = [list(token) for token in self.logps[i]]
        record = {"prompt": self.a.prompt, "group": self.a.group, **sides, "reward_difference": self.difference}
        if self.judgement:
            j = self.judgement
            record["judge"] = {"verdict": j.verdict, "orders": j.orders, "replies": j.replies, "asked": j.asked}
        return record


@dataclass(frozen=True)
class Comparison:
    """names: of A and B. scorer, judge: who gave rewards and verdicts. settings: how the answers were drawn, in words."""

    names: tuple[str, str]
    rows: Sequence[PromptResult]
    scorer: str = ""
    judge: str = ""
    settings: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON-able. Differences, wins and win rates are those of B against A; bounds are of 95 % intervals."""
        record: dict[str, Any] = {"prompts": len({row.a.prompt for row in self.rows}), "settings": self.settings}
        for side, name in zip(("a", "b"), self.names, strict=True):
            answers: list[ScoredAnswer] = [getattr(row, side) for row in self.rows]
            record[side] = {"model": name, **measures(answers)}
            if self.scorer:
                record[side]["reward"] = reward_summary(answers)
        if self.scorer:
            record["reward"] = {"scorer": self.scorer, **_by_rewards(self.rows)}
        if self.judge:
            record["judge"] = {"model": self.judge, **_by_judge(self.rows)}
        if any(row.logps for row in self.rows):
            record["logprobs"] = {side: _changes(self.rows, i) for i, side in enumerate("ab")}
        return record


def groups(rows: Sequence[PromptResult]) -> dict[str, list[PromptResult]]:
    """The rows of each group, in the order in which the groups come."""
    by_group: dict[str, list[PromptResult]] = {}
    for row in rows:
        by_group.setdefault(row.a.group, []).append(row)
    return by_group


def _by_rewards(rows: Sequence[PromptResult]) -> dict[str, Any]:
    def compared(some: Sequence[PromptResult]) -> dict[str, Any] | None:
        if not some:
            return None
        record = compare_rewards([r.b for r in some], [r.a for r in some]).as_dict()
        del record["matched_length"]
        return record

    return _in_parts(rows, compared)


def _in_parts(
    rows: Sequence[PromptResult], compared: Callable[[Sequence[PromptResult]], dict[str, Any] | None]
) -> dict[str, Any]:
    """What is made of all rows, of those of like length, and of each group where there are several."""
    named = groups(rows)
    parts = {name: compared(some) for name, some in named.items() if len(named) > 1}
    return {**(compared(rows) or {}), "matched_length": compared([r for r in rows if r.like_length]), "groups": parts}


def _by_judge(rows: Sequence[PromptResult]) -> dict[str, Any]:
    def compared(some: Sequence[PromptResult]) -> dict[str, Any] | None:
        signs: dict[str, list[int]] = {}  # of each prompt: a repeat of it is no second witness
        for r in some:
            if r.judgement and r.judgement.verdict:
                signs.setdefault(r.a.prompt, []).append({"a": -1, "tie": 0, "b": 1}[r.judgement.verdict])
        wins = count_wins([sum(of_prompt) for of_prompt in signs.values()], [0] * len(signs))
        return {"wins": asdict(wins), "win_rate": interval_record(win_rate(wins))} if wins.n else None

    rows = list({r.a.prompt: r for r in rows}.values())
    judged = [r.judgement for r in rows if r.judgement and r.judgement.asked]
    both = [j.orders for j in judged if None not in j.orders]
    first = [side == shown for j in judged for side, shown in zip(j.orders, "ab", strict=True) if side in ("a", "b")]
    return {
        **_in_parts(rows, compared),
        "agreement": _share(sum(x == y for x, y in both), len(both)),
        "first_position": _share(sum(first), len(first)),
        "no_verdict": len(judged) - len(both),
        "same_answers": len(rows) - len(judged),
    }


def _share(k: int, n: int) -> dict[str, Any] | None:
    return interval_record(share_interval(k, n)) if n else None


def _changes(rows: Sequence[PromptResult], side: int) -> dict[str, Any]:
    """Tokens, and log p_B - log p_A of whole answers, of one side's answers."""
    answers = [logps[side] for logps in {row.a.prompt: row.logps for row in rows}.values() if logps]
    whole = [([b for _, _, b in tokens], [a for _, a, _ in tokens]) for tokens in answers]
    sums = [sum(b) - sum(a) for b, a in whole]
    return {"tokens": sum(map(len, answers)), "change": interval_record(bootstrap_interval(sums))}


# ---- the summary in words, for the terminal and for the page ---------------------------------------------------------


def number(value: float, signed: bool = False) -> str:
    """Three decimals."""
    return f"{value:{'+' if signed else ''}.3f}"


def interval_text(record: dict[str, Any] | None, *, signed: bool = False, percent: bool = False) -> str:
    """`0.53 (0.41 to 0.65)`; without the bounds where they are unknown."""
    if record is None:
        return "n/a"

    def shown(value: float) -> str:
        return f"{100 * value:.1f}" if percent else number(value, signed)

    text = shown(record["mean"]) + (" %" if percent else "")
    return text if record["low"] is None else f"{text} ({shown(record['low'])} to {shown(record['high'])})"


def model_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, A's, B's) of everything that is measured on one model's answers alone."""

    def both(label: str, shown: Any) -> tuple[str, str, str]:
        return label, shown(summary["a"]), shown(summary["b"])

    rows = [both("mean reward", lambda s: interval_text(s["reward"]))] if "reward" in summary else []
    rows.append(both("mean length, tokens", lambda s: f"{s['length']:.1f}"))
    shares = {
        "self_stopped": "ended by themselves",
        "repetition": "repeated four-word sequences",
        "distinct_1": "distinct words (distinct-1)",
        "distinct_2": "distinct word pairs (distinct-2)",
        "role_leaks": "answers with a role marker",
    }
    return rows + [both(label, lambda s, name=name: f"{100 * s[name]:.1f} %") for name, label in shares.items()]


@dataclass(frozen=True)
class Versus:
    """B against A by one measure on some of the prompts."""

    label: str
    difference: str
    wins: Wins
    rate: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As a line of a table."""
        w = self.wins
        return self.label, self.rate, self.difference, str(w.wins), str(w.ties), str(w.losses), str(w.n)


VERSUS = ("B against A", "win rate of B", "reward B - A", "B wins", "ties", "A wins", "prompts")


def versus_rows(summary: dict[str, Any]) -> list[Versus]:
    """Rewards and verdicts, over all prompts, those of like length, and each group."""
    rows = []
    for measure in ("reward", "judge"):
        if measure not in summary:
            continue
        parts = {"all prompts": summary[measure], "answers of similar length": summary[measure]["matched_length"]}
        for label, compared in (parts | summary[measure]["groups"]).items():
            if compared and "wins" in compared:
                difference = interval_text(compared["difference"], signed=True) if "difference" in compared else ""
                rate = interval_text(compared["win_rate"], percent=True)
                rows.append(Versus(f"{measure}: {label or 'no group'}", difference, Wins(**compared["wins"]), rate))
    return rows


def result_line(summary: dict[str, Any]) -> str:
    """Which model's answers are better, by what and how surely, or that nothing can be told apart."""
    sentences = []
    for measure, by in (("reward", "reward"), ("judge", "the judge's verdicts")):
        compared = summary.get(measure, {})
        if "win_rate" in compared:
            sentences.append(_better(summary, compared, by))
    if sentences:
        return " ".join(sentences)
    if summary.keys() & {"reward", "judge"}:
        return "No prompt has a verdict on both answers, so neither model can be called better."
    return "Nothing scored these answers, so neither model can be called better."


def _better(summary: dict[str, Any], compared: dict[str, Any], by: str) -> str:
    """One measure's sentence: the win rate decides; a mean difference that says more, or surely points the other way, is said too."""
    rate, difference, prompts = compared["win_rate"], compared.get("difference"), Wins(**compared["wins"]).n
    a, b = (f"{side.upper()} ({summary[side]['model']})" for side in "ab")
    by_much = "" if difference is None else f"; mean difference B - A {interval_text(difference, signed=True)}"
    shown = f"B wins {interval_text(rate, percent=True)} of {prompts} prompts, ties half{by_much}"
    wins, mean = _surely(rate, 0.5), _surely(difference, 0)
    if not wins:
        if mean and rate["low"] is not None:
            return f"By {by}, {b if mean > 0 else a} has the higher mean but not clearly more wins: {shown}."
        return f"By {by}, A and B cannot be told apart: {shown}."
    better, worse = (b, a) if wins > 0 else (a, b)
    if mean == -wins:
        return f"By {by}, {better} wins more prompts but has the lower mean: {shown}."
    return f"By {by}, {better} is better than {worse}: {shown}."


def _surely(record: dict[str, Any] | None, middle: float) -> int:
    """1 if an interval lies above `middle`, -1 below, 0 if it holds it or nothing is known."""
    if record is None or record["low"] is None:
        return 0
    return int(record["low"] > middle) - int(record["high"] < middle)


def notes(summary: dict[str, Any]) -> list[str]:
    """What a reader needs to know to read the figures."""
    lines = []
    if summary.keys() & {"reward", "judge", "logprobs"}:
        lines.append("In parentheses: 95 % intervals. A win rate counts a tie as half a win.")
    if "reward" in summary or "judge" in summary:
        lines.append(
            f"Similar length: the shorter answer has at least {100 * (1 - LIKE_LENGTH):.0f} % of the longer one's tokens."
        )
    if "reward" in summary:
        lines.append(f"Rewards by {summary['reward']['scorer']}.")
    if judge := summary.get("judge"):
        lines.append(
            f"Judge: {judge['model']}, asked in both orders; where they disagree the prompt is a tie. The two orders "
            f"agree on {interval_text(judge['agreement'], percent=True)} of the prompts; of the verdicts that are not ties, "
            f"{interval_text(judge['first_position'], percent=True)} favour the answer shown first."
        )
        if judge["same_answers"]:
            lines.append(
                f"Prompts with the same answer from both, ties without asking the judge: {judge['same_answers']}."
            )
        if judge["no_verdict"]:
            lines.append(f"Prompts without a verdict, left out of the judge's win rate: {judge['no_verdict']}.")
    if changes := summary.get("logprobs"):
        a, b = (interval_text(changes[side]["change"], signed=True) for side in "ab")
        lines.append(f"log p_B - log p_A of a whole answer, in nats: for A's answers {a}, for B's answers {b}.")
    return lines


def judge_text(judgement: Judgement) -> str:
    """`judge: B`, and why a tie is one."""
    words = {"a": "A", "b": "B", "tie": "tie", None: "no verdict"}
    first, second = judgement.orders
    if not judgement.asked:
        return "judge: tie, not asked (the answers are the same)"
    if first == second or judgement.verdict is None:
        return f"judge: {words[judgement.verdict]}"
    return f"judge: tie (with A first {words[first]}, with B first {words[second]})"
