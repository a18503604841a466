"""Any Jinja `chat_template` as a `Template`: which of its tokens are the template's, and which carry loss, is derived.

Nothing is assumed of a template but that it is a function from turns to text. It is rendered with a placeholder in place of
every turn's words. That shows where the words land, and what stands around them is its skeleton; special tokens
are looked for in the skeleton alone, so that words which spell one stay words. The skeleton without an answer, but with the
prompt for one, has to be a prefix of the whole: where it ends the answer begins, at the very tokens that a model reads
before it answers. The answer ends with the token that ends the turn; a line break behind that is context.

Every row is then rendered as it is too, and is refused if that differs from its skeleton with the words filled in.

Templates that change earlier turns once there are later ones (reasoning that is dropped, a system prompt that moves to the
last question): a row is always the dialogue as the template renders it. An answer before which another text stands there
than stood when the model gave it, or of which the template leaves something out, is read and not learned; `data.tokenstore`
counts such answers, and refuses a row of which none is left. What a template itself puts before an answer's words and does
not write into the prompt (an empty block of reasoning) is the model's to say: it is learned with the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tokenizers import AddedToken

from tunesmith.data.dialogue import BadRow, Message
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.jinja_sandbox import Rendering, Turn
from tunesmith.data.template import Segment, Template
from tunesmith.errors import UserError

FIRST_PLACE = 0x100000  # of a plane for private use: no text of a template, no white space, in no case
MOST_PLACES = 0xFFFE
Pattern = tuple[tuple[str, str], ...]
"""Role and content of each turn, a placeholder in place of words."""
_PLACE = re.compile("[\U00100000-\U0010fffd]")
KEPT = 4096  # skeletons; a data set has few patterns of roles, but some templates look into the words


@dataclass(frozen=True)
class Stretch:
    """A piece of a skeleton that becomes a segment. parts: literal text, or the number of the words that stand there.

    answer: number of the turn that says it; -1: nobody.
    """

    parts: tuple[str | int, ...]
    answer: int = -1
    special: bool = False
    closes: bool = False


class Span(NamedTuple):
    """Where an answer stands in a rendered dialogue, its end included. closes: nothing there ends it, the end of text does."""

    begin: int
    end: int
    closes: bool = False


@dataclass(frozen=True)
class Skeleton:
    """A dialogue of some pattern, without its words.

    rendered: what the template makes of it, its literals and numbers of words in turn. answers: turns that can be learned.
    refusals: of the other assistant turns, the reason.
    """

    rendered: tuple[str | int, ...]
    stretches: tuple[Stretch, ...]
    answers: frozenset[int]
    refusals: Mapping[int, str] = field(default_factory=dict)


def from_jinja(
    text: str, special: Sequence[AddedToken], variables: Mapping[str, str], where: str = "chat_template"
) -> Template:
    """The form of a dialogue that a chat_template writes.

    Args:
        text: the template.
        special: the tokenizer's special tokens; `lstrip` and `rstrip` of one take white space beside it away.
        variables: `bos_token`, `eos_token` and what else the template may name, with their texts.
        where: what messages call the template.

    Raises: UserError if it is no Jinja template, does not render one question, or ends an answer with a text that is no token.
    """
    renderer = Renderer(Rendering(text, variables, where), special)
    end, lead, trail = renderer.ends()
    sides = sorted((t.content, t.lstrip, t.rstrip) for t in special)
    return Template(
        name=f"jinja-{content_hash([repr((text, sides, sorted(variables.items()), renderer.rendering.day))])[:16]}",
        segments=renderer.segments,
        jinja=text,
        end=end,
        lead=lead,
        trail=trail,
        refusal=renderer.refusal,
    )


class Renderer:
    """Segments of dialogues in a chat template; remembers the skeletons that it has found."""

    def __init__(self, rendering: Rendering, special: Sequence[AddedToken]) -> None:
        self.rendering, self.where = rendering, rendering.where
        self._eats_before = {token.content for token in special if token.lstrip}
        self._eats_after = {token.content for token in special if token.rstrip}
        longest_first = sorted((t.content for t in special if t.content), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        marks = sorted((m for m in rendering.marks if not self._special.search(m)), key=len, reverse=True)
        self._marks = re.compile("(" + "|".join(map(re.escape, marks)) + ")") if marks else None
        self._skeletons: dict[tuple[Pattern, bool], Skeleton] = {}
        self._texts: dict[tuple[Pattern, bool], str] = {}
        self.end = ""

    # ---- from the outside --------------------------------------------------------------------------------------------

    def segments(self, messages: Sequence[Message], answer_follows: bool) -> list[Segment]:
        """As `Template.segments`. Raises: BadRow if the template refuses the dialogue, or writes what no skeleton explains."""
        pattern, words = self._pattern(messages)
        skeleton = self._skeleton(pattern, answer_follows)
        rendered = self.rendering([_turn(m.role, m.content) for m in messages], answer_follows)
        if _filled(skeleton.rendered, words) != rendered:
            raise BadRow(
                f"{self.where} changes the text of a turn, so that its words cannot be told from the template's"
            )
        found = []
        for stretch in skeleton.stretches:
            text = _filled(stretch.parts, words)
            learned = stretch.answer >= 0 and messages[stretch.answer].weight != 0
            found.append(Segment(text, learned, stretch.special, stretch.closes and learned))
        return found

    def refusal(self, messages: Sequence[Message]) -> str:
        """Why the last answer of a dialogue cannot be learned; "" if it can."""
        skeleton = self._skeleton(self._pattern(messages)[0], False)
        last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
        return skeleton.refusals.get(last, "")

    def ends(self) -> tuple[str, str, str]:
        """The token that ends an answer, "" where none does; what the template writes before an answer's words, and behind them.

        Raises: UserError if the template cannot be used at all.
        """
        question, answer = ("user", chr(FIRST_PLACE)), ("assistant", chr(FIRST_PLACE + 1))
        way_out = "choose a template with --chat.template"
        try:
            asked, plain = (self._render((question,), follows) for follows in (True, False))
            self.segments([Message("user", "x Y?")], True)  # real words too: it may change what it is given
        except BadRow as reason:
            raise UserError(f"{reason}: it does not render a single question; {way_out}") from None
        try:
            before, found, after = self._render((question, answer), False).partition(answer[1])
        except BadRow:
            found = ""
        if not found:
            return "", "", ""  # one can talk to it; a row to train on is refused with the template's reason
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        if asked == plain and lead.strip():
            raise UserError(
                f"{self.where} has no prompt for an answer (add_generation_prompt changes nothing), but begins one with {lead!r}; "
                f"{way_out}"
            )
        end = self._special.search(after)
        if end is None:
            if after.strip():
                raise UserError(
                    f"{self.where} ends an answer with {after.strip()!r}, which is no special token of this tokenizer, so that a model "
                    f"could not end one. Add the token to the tokenizer, and its embedding to the model, or {way_out}"
                )
            return "", "" if self._special.search(lead) else lead, ""
        self.end = end[0]
        return end[0], "" if self._special.search(lead) else lead, after[: end.start()]

    # ---- patterns ----------------------------------------------------------------------------------------------------

    def _pattern(self, messages: Sequence[Message]) -> tuple[Pattern, list[str]]:
        """Roles and contents with a placeholder for words, and the words.

        What a template may look at stays: white space around a content, whether there is anything in it, and marks that
        the template looks for.
        """
        turns, words = list[tuple[str, str]](), list[str]()
        for m in messages:
            content = ""
            for part in self._marks.split(m.content) if self._marks else (m.content,):
                core = part.strip()
                if not core or (self._marks and self._marks.fullmatch(part)):
                    content += part
                    continue
                at = part.index(core)
                content += part[:at] + chr(FIRST_PLACE + len(words)) + part[at + len(core) :]
                words.append(core)
            turns.append((m.role, content))
        if len(words) > MOST_PLACES:
            raise BadRow(f"more than {MOST_PLACES:,} turns")
        return tuple(turns), words

    def _render(self, pattern: Pattern, answer_follows: bool) -> str:
        """A pattern's rendering. Raises: BadRow if the template raises."""
        key = pattern, answer_follows
        if key not in self._texts:
            if len(self._texts) >= KEPT:
                self._texts.clear()
            self._texts[key] = self.rendering([_turn(*turn) for turn in pattern], answer_follows)
        return self._texts[key]

    def _skeleton(self, pattern: Pattern, answer_follows: bool) -> Skeleton:
        key = pattern, answer_follows
        if key not in self._skeletons:
            if len(self._skeletons) >= KEPT:
                self._skeletons.clear()
            self._skeletons[key] = self._made(pattern, answer_follows)
        return self._skeletons[key]

    # ---- a skeleton --------------------------------------------------------------------------------------------------

    def _made(self, pattern: Pattern, answer_follows: bool) -> Skeleton:
        text = self._render(pattern, answer_follows)
        for role, content in pattern:
            if role != "assistant" and any(place not in text for place in _PLACE.findall(content)):
                raise BadRow(f"{self.where} leaves out what the {role} says")
        spans, refusals = dict[int, Span](), dict[int, str]()
        for number, (role, _) in enumerate(pattern):
            if role == "assistant":
                found = self._answer(text, pattern, number)
                if isinstance(found, str):
                    refusals[number] = found
                else:
                    spans[number] = found
        return Skeleton(_parts(text), tuple(self._stretches(text, spans)), frozenset(spans), refusals)

    def _answer(self, text: str, pattern: Pattern, number: int) -> Span | str:
        """Where the answer of a turn stands in a rendered dialogue; or why it cannot be learned there."""
        try:
            prompt = self._render(pattern[:number], True)
            found = self._span(text, prompt, pattern[number][1])
            if isinstance(found, str) or number + 1 == len(pattern):
                return found
            given = self._render(pattern[: number + 1], False)
        except BadRow as reason:
            return str(reason)
        at_first = self._span(given, prompt, pattern[number][1])
        if isinstance(at_first, str):
            return at_first
        if text[found.begin : found.end] != given[at_first.begin : at_first.end]:
            return f"{self.where} changes earlier answers once there are later turns"
        return found

    def _span(self, text: str, prompt: str, content: str) -> Span | str:
        """Where an answer stands in a text, given its prompt and its content in the pattern; or why that is not to be found."""
        if not text.startswith(prompt):
            return self._difference(prompt, text)
        places = _PLACE.findall(content)
        if any(text.count(place) != 1 for place in places):
            return f"{self.where} leaves out a part of an answer, or writes it twice"
        begin = len(prompt)
        if any(text.index(place) < begin for place in places):
            return f"{self.where} writes an answer before its prompt"
        after = text.index(places[-1]) + 1 if places else begin
        if not self.end:
            space = content.rpartition(places[-1])[2] if places else ""
            return Span(begin, after + (len(space) if text.startswith(space, after) else 0), closes=True)
        following = _PLACE.search(text, after)
        limit = following.start() if following else len(text)
        end = next((m for m in self._special.finditer(text, after, limit) if m[0] == self.end), None)
        return f"{self.where} does not end every answer with {self.end}" if end is None else Span(begin, end.end())

    def _difference(self, prompt: str, text: str) -> str:
        """Why a prompt is no prefix of the dialogue, as far as that can be said."""
        same = next(
            (i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text))
        )
        if not _PLACE.search(prompt, same):
            return (
                f"{self.where} puts {prompt[same:]!r} into the prompt for an answer, but not before the answer in a dialogue: what was "
                "trained would not be what is asked"
            )
        return (
            f"{self.where} changes earlier turns once there are later ones: this answer was given to a different text"
        )

    def _stretches(self, text: str, spans: Mapping[int, Span]) -> Iterator[Stretch]:
        """A rendered pattern cut at its special tokens, and where answers begin and end."""
        special = {m.start(): m.end() for m in self._special.finditer(text)}
        answer_at = {span.begin: number for number, span in spans.items()}
        borders = {at for span in spans.values() for at in (span.begin, span.end)}
        cuts = sorted({0, len(text), *special, *special.values(), *borders})
        number, eaten = -1, False
        for a, b in pairwise(cuts):
            if a in answer_at or (number >= 0 and a >= spans[number].end):
                number = answer_at.get(a, -1)
            piece = text[a:b]
            if a in special:
                yield Stretch((piece,), number, special=True)
                eaten = piece in self._eats_after
                continue
            if eaten:  # what transformers' tokenizer leaves out here, before words and all
                piece = piece.lstrip()
                eaten = not piece
            if special.get(b, 0) and text[b : special[b]] in self._eats_before:
                piece = piece.rstrip()
            if piece:
                closes = number >= 0 and spans[number].closes and b == spans[number].end
                yield Stretch(_parts(piece), number, closes=closes)


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _parts(text: str) -> tuple[str | int, ...]:
    """A text with placeholders as literals and numbers of words."""
    found, at = list[str | int](), 0
    for place in _PLACE.finditer(text):
        found += [text[at : place.start()], ord(place[0]) - FIRST_PLACE]
        at = place.end()
    return tuple(part for part in [*found, text[at:]] if part != "")


def _filled(parts: Sequence[str | int], words: Sequence[str]) -> str:
    return "".join([part if isinstance(part, str) else words[part] for part in parts])
