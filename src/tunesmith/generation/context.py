"""What a model reads of a conversation that is longer than its positions: one rule for chat, generation and judges.

1. The answer has room reserved: `max_new_tokens`, but at most a quarter of the model's positions (`room_for_prompt`).
2. A longer conversation loses whole exchanges from its beginning, as few as possible. System turns and the last question
   always stay.
3. If these alone are too long, the last question loses its beginning, since a long message mostly asks at its end. A system
   prompt that fills more than half of the room leaves none for a question and is refused.
4. Nothing is dropped in silence. A chat says so with the answer, a command in a note. Measuring a model allows no half
   questions (`turns`), and by default nothing may be left out (`refuse`): both raise an error with the figures.
5. An answer that reaches the last position ends with the reason `context`.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.data.dialogue import Message
from tunesmith.data.prompts import Conversation, encode_prompt, turns_of
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UsageError, UserError, note

MOST_RESERVED = 4  # an answer keeps at most one in so many of the positions, even if max_new_tokens is more

TooLong = Literal["refuse", "turns", "cut"]
"""What is done with a prompt that is too long: nothing is left out; whole turns are; the beginning of the question too."""


def room_for_prompt(positions: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have.

    >>> room_for_prompt(1024, 128), room_for_prompt(128, 128)
    (896, 96)

    Raises: UsageError if max_new_tokens is below 1.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    return positions - min(max_new_tokens, positions // MOST_RESERVED)


@dataclass(frozen=True)
class Reading:
    """What is read of a conversation.

    turns: how many were left out at its beginning. characters: how many of the last question were, at its beginning.
    """

    messages: list[Message]
    turns: int = 0
    characters: int = 0

    @property
    def left_out(self) -> str:
        """What was left out, as a sentence; "" for nothing."""
        if self.characters:
            earlier = f" and {self.turns} earlier turns are" if self.turns else " is"
            what = f"its beginning ({self.characters:,} characters){earlier} left out"
            return f"the message is longer than the model can read: {what}"
        if self.turns:
            return f"the conversation is longer than the model can read: its beginning is left out ({self.turns} turns)"
        return ""


def fit(messages: Sequence[Message], length: Callable[[Sequence[Message]], int], room: int) -> Reading:
    """The part of a conversation that is read in `room` tokens, by the rule above.

    length: tokens of some turns as the reader would read them.
    Raises: UserError if the system prompt alone takes more than half of the room.
    """
    if length(messages) <= room:
        return Reading(list(messages))
    last = len(messages) - 1
    starts = [i for i in range(last) if messages[i].role == "user"] + [last]

    def from_exchange(n: int) -> list[Message]:
        scene = [m for m in messages[: starts[n]] if m.role == "system"]
        return [*scene, *messages[starts[n] :]]

    first = bisect_left(range(len(starts) - 1), True, key=lambda n: length(from_exchange(n)) <= room)
    kept = from_exchange(first)
    turns = len(messages) - len(kept)
    if length(kept) <= room:
        return Reading(kept, turns)
    *scene, question = kept

    def without(characters: int) -> list[Message]:
        return [*scene, dataclasses.replace(question, content=question.content[characters:])]

    whole = len(question.content)
    before = length(without(whole))
    if scene and before > room // 2:
        raise UserError(
            f"the system prompt has {before:,} tokens, and the model reads at most {room:,} before its answer: shorten it to "
            "half of that to leave room for a question"
        )
    if before >= room:
        raise UserError(
            f"the marks of a turn take {before:,} tokens, and the model reads at most {room:,} before its answer: use a model "
            "with more positions"
        )
    cut = bisect_left(range(whole), True, key=lambda n: length(without(n)) <= room)
    return Reading(without(cut), turns, cut)


def fit_with_answer(
    messages: Sequence[Message], length: Callable[[Sequence[Message]], int], answer: int, positions: int
) -> Reading:
    """The part of a conversation that is read before an answer that is there already: as `fit`.

    answer: its tokens. The conversation keeps a quarter of the positions; what then stands beyond them is the answer's end.
    """
    kept = positions // MOST_RESERVED
    return fit(messages, length, max(positions - answer, kept))


def read_prompts(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    positions: int,
    max_new_tokens: int,
    too_long: TooLong = "refuse",
) -> list[list[int]]:
    """Every conversation as the ids that a model of so many positions reads before its answer.

    A note says what was left out of which.
    Raises: UserError naming the first prompt that is not a conversation, or of which more would have to be left out than `too_long` allows.
    """
    room = room_for_prompt(positions, max_new_tokens)

    def length(turns: Sequence[Message]) -> int:
        return len(encode_prompt(tokenizer, turns))

    found, shortened = [], []
    for number, conversation in enumerate(conversations, 1):
        ids = encode_prompt(tokenizer, conversation)
        if len(ids) > room:
            where = (
                f"prompt {number} has {len(ids):,} tokens; the model has {positions:,} positions, of which {positions - room:,} "
                "are reserved for the answer"
            )
            try:
                reading = fit(turns_of(conversation), length, room)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if too_long == "refuse":
                raise UserError(f"{where}. Shorten it, or drop its beginning with cut_front=True")
            if reading.characters and too_long == "turns":
                raise UserError(f"{where}, and its last question alone is too long. Shorten it")
            shortened.append((number, reading))
            ids = encode_prompt(tokenizer, reading.messages)
        found.append(ids)
    if shortened:
        which = ", ".join(str(number) for number, _ in shortened[:5]) + (", ..." if len(shortened) > 5 else "")
        turns, cut = sum(r.turns for _, r in shortened), sum(bool(r.characters) for _, r in shortened)
        cuts = {
            f"{turns:,} early turn{'s' * (turns > 1)}": turns,
            f"the beginning of {cut:,} question{'s' * (cut > 1)}": cut,
        }
        what = " and ".join(words for words, count in cuts.items() if count)
        note(
            f"{len(shortened):,} of {len(found):,} prompts are longer than the {room:,} tokens that the model can read before its "
            f"answer; left out: {what} (prompt {which})"
        )
    return found
