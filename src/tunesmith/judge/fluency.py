"""How likely a language model finds answers after their own prompt and after another one: whether they are fluent and to the point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunesmith.data.chosen_template import AUTO, chat_template
from tunesmith.files.answers import ScoredAnswer, by_prompt
from tunesmith.files.names import load
from tunesmith.generation.context import room_for_prompt
from tunesmith.generation.logprobs import encode_answers, logps_of_both
from tunesmith.judge.measures import interval_record
from tunesmith.stats import ratio_interval

OTHER_PROMPT = 7  # places to the prompt that an answer is held against: the very next ones may be of the same topic


class Reader:
    """A language model that reads answers. name: its MODEL."""

    def __init__(self, name: str, device: str = "auto") -> None:
        self.name = name
        with chat_template(AUTO):  # its own, whatever the models that answered were asked to use
            self.model, self.tokenizer = load(name, device=device)

    def fluency(self, answers: Sequence[ScoredAnswer]) -> dict[str, Any]:
        """`{"nats_per_token", "on_topic_gain"}`, each `{"mean", "low", "high", "n"}` with a 95 % bootstrap interval over prompts.

        nats_per_token: negative log-likelihood of the answers' tokens (this model's, without the end) after their own prompts.
        on_topic_gain: how much higher it is after the prompt OTHER_PROMPT places on; near 0 for answers that suit any question.
        Both weigh every token alike, and are None where no answer has one; so is the gain where there is only one prompt.

        answers: the same number to each prompt.
        Held by tests: equals transformers' log-probabilities of the plain texts.
        """
        given = list(by_prompt(answers).values())
        shift = OTHER_PROMPT % len(given) or 1
        room = room_for_prompt(self.model.longest, max(a.tokens for a in answers))
        pairs, whose = [], []
        for i, own in enumerate(given):
            j = (i - shift) % len(given)  # prompt i is the other one of these answers
            for mine, foreign in zip(own, given[j], strict=True):
                a, b = (replace(x, prompt=mine.prompt, answer=x.answer.strip()) for x in (mine, foreign))
                pairs.append(replace(encode_answers(self.tokenizer, a, b, room), ends=(False, False)))
                whose.append((i, j))
        count, own_nats, other_nats = ([0.0] * len(given) for _ in range(3))
        read = logps_of_both(self.model, pairs, self.tokenizer.end_of_answer)
        for (i, j), (after_own, after_other) in zip(whose, read, strict=True):
            count[i] += len(after_own)
            own_nats[i] -= sum(after_own)
            other_nats[j] -= sum(after_other)
        if not any(count):
            return {"nats_per_token": None, "on_topic_gain": None}
        gain = [b - a for a, b in zip(own_nats, other_nats, strict=True)]
        return {
            "nats_per_token": interval_record(ratio_interval(own_nats, count)),
            "on_topic_gain": interval_record(ratio_interval(gain, count)) if len(given) > 1 else None,
        }
