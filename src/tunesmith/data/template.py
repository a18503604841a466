"""What a dialogue is to a model: how turns become text and tokens, which of these carry loss, and what ends an answer.

A `Template` cuts a dialogue into segments, and a tokenizer makes ids of each by itself. One cut serves training, chat and
scoring, so what a model reads before an answer has exactly the ids that it had in training.

A new form is one file that ends in its `Template`, as `hh_template.py` does, and one line in `templates.TEMPLATES`;
tests/data/test_template.py then holds it to the laws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from tunesmith.data.dialogue import BadRow, Message


class Segment(NamedTuple):
    """A stretch of a dialogue that is encoded by itself.

    text: its words; of a `special` one the text of a single special token, which becomes that token's id. Words never do,
        even if they spell one.
    loss: its tokens are targets. The template's `end` that is one ends an answer.
    closes: behind its last token the end of text is a target, but does not stand in the row: no later token reads it.
    """

    text: str
    loss: bool = False
    special: bool = False
    closes: bool = False


@dataclass(frozen=True)
class Template:
    """The form of a dialogue that a model is trained with.

    name: stands for all the rest: under it a template is in `templates.TEMPLATES` and its tokens are in the store, and two
        of one name encode alike.
    segments: (messages, whether an answer is to follow) -> the dialogue in pieces; with True they end where the answer's
        words begin. Laws, for any messages: before each answer stand the segments of its prompt, and those with loss are
        the words of the answers that have weight, each with its end.
    jinja: the same form for transformers' `apply_chat_template`.
    end: text of the special token that ends an answer; "": the tokenizer's end of text does.
    stop_texts: an answer also ends before any of these.
    lead, trail: what the form writes before an answer's first word and after its last, for the model to say as well.
    opens: the token with which a tokenizer begins every text, if it has one, stands before the dialogue too; False: the
        segments begin with all there is.
    refusal: messages -> why the form does not let the last answer be learned, "" where it does. Its segments then have no loss.
    borders: whether words hold what looks like the border of a turn in this form; None: see `border_inside`.
    leak: whether an answer goes on with a turn of its own, which a reader should never see; None: as `border_inside`.

    `segments` and all that rest on it raise BadRow for a dialogue that the form does not know, as one without a question.
    """

    name: str
    segments: Callable[[Sequence[Message], bool], list[Segment]]
    jinja: str
    end: str = ""
    stop_texts: tuple[str, ...] = ()
    lead: str = ""
    trail: str = ""
    opens: bool = False
    refusal: Callable[[Sequence[Message]], str] = field(default=lambda messages: "")
    borders: Callable[[str], bool] | None = None
    leak: Callable[[str], bool] | None = None

    def text(self, messages: Sequence[Message]) -> str:
        """The dialogue as a person reads it, special tokens by their names."""
        return "".join([s.text for s in self.segments(messages, False)])

    def whole(self, messages: Sequence[Message]) -> list[Segment]:
        """The dialogue without loss, in as few segments as there can be: one where the form has no special tokens."""
        joined: list[Segment] = []
        for special, run in groupby(self.segments(messages, False), lambda s: s.special):
            texts = [s.text for s in run]
            joined += [Segment(text, special=True) for text in texts] if special else [Segment("".join(texts))]
        return joined

    def answered(self, messages: Sequence[Message]) -> tuple[list[Segment], list[Segment]]:
        """A dialogue that ends with an answer of weight 1: what stands before that, and its words, without their end.

        Raises: BadRow if the form does not let it be learned.
        """
        if reason := self.refusal(messages):
            raise BadRow(reason)
        prompt = self.segments(messages[:-1], True)
        learned = [s for s in self.segments(messages, False)[len(prompt) :] if s.loss]
        return prompt, learned[:-1] if self.end and learned and learned[-1].text == self.end else learned

    def cut_at_stop(self, answer: str) -> tuple[str, bool]:
        """An answer up to the first stop text, and whether there was one."""
        places = [at for at in (answer.find(stop) for stop in self.stop_texts) if at >= 0]
        return (answer[: min(places)], True) if places else (answer, False)

    def words(self, decoded: str) -> str:
        """What an answer says. decoded: the text of its tokens."""
        return self.cut_at_stop(decoded)[0].removeprefix(self.lead).removesuffix(self.trail)

    def settled(self, answer: str) -> int:
        """How many characters of an answer's beginning stay, however it goes on: all but the beginning of a stop text at its end.

        answer: without a stop text (`cut_at_stop`).
        """
        return len(answer) - max(
            (n for stop in self.stop_texts for n in range(1, len(stop)) if answer.endswith(stop[:n])), default=0
        )

    def ends_learned(self, segments: Sequence[Segment]) -> int:
        """How many answers of a dialogue carry loss, each with its end."""
        return sum(s.closes or (s.loss and s.special and s.text == self.end) for s in segments)

    def border_inside(self, words: str) -> bool:
        """Whether words hold what begins or ends a turn in this form: a model that learns them learns to write both sides."""
        if any(stop in words for stop in self.stop_texts):
            return True
        return self.borders(words) if self.borders else self._borders.search(words) is not None

    def leaks(self, answer: str) -> bool:
        """Whether an answer goes on with a turn of its own."""
        return (self.leak or self.border_inside)(answer)

    @cached_property
    def _borders(self) -> re.Pattern[str]:
        """The form's special tokens anywhere, and what else it writes before a turn where a line begins, unless that is a mere word."""
        said = [Message("user", "\ue000"), Message("assistant", "\ue001"), Message("user", "\ue002")]
        pieces = self.segments(said, False)
        special = {re.escape(s.text) for s in pieces if s.special}
        between = re.split("[\ue000-\ue002]|\0", "".join("\0" if s.special else s.text for s in pieces))
        heads = {re.escape(text.strip()) for text in between[1:-1]}
        lines = [rf"^[ \t]*{head}" for head in sorted(heads) if not re.fullmatch(r"\w*", head)]
        return re.compile("|".join([*sorted(special), *lines]) or "(?!)", re.MULTILINE)

    @property
    def longest_stop(self) -> int:
        """Bytes of the longest stop text, and so the most tokens that it can take."""
        return max((len(stop.encode()) for stop in self.stop_texts), default=0)
