"""Which rows of one data set stand in another: by fingerprints of their prompts and of their whole texts.

A fingerprint is one of the words alone: roles count, but not a row's form, nor case, white space and Unicode's variants.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tunesmith.data.audit.rows import prompt_of
from tunesmith.data.dialogue import Message, Preference, Row, Text


@dataclass(frozen=True)
class Overlap:
    """Rows whose prompt, or one of whose whole texts, also stands in `other`; places: `here = there`, all of them.

    rows: compared. unread: rows of `other` that could not be, because they cannot be read.
    whose: which rows were compared, if not all of a split.
    """

    other: str
    rows: int
    prompts: int
    texts: int
    places: tuple[str, ...]
    unread: int = 0
    whose: str = ""


@dataclass(frozen=True, slots=True)
class Print:
    """Fingerprints of a row's normalised texts: of its prompt, and of it whole (of a pair: chosen, rejected)."""

    place: str
    usable: bool
    prompt: bytes | None
    texts: tuple[bytes, ...]


def fingerprint(row: Row, place: str = "", usable: bool = True) -> Print:
    """What two rows share that say the same in different forms, case or white space."""
    if isinstance(row, Text):
        return Print(place, usable, None, (_digest([row.text]),) if row.text.strip() else ())
    dialogues = (row.chosen, row.rejected) if isinstance(row, Preference) else (row,)
    turns = dialogues[0].messages
    last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=len(turns))
    before = prompt_of(turns) if isinstance(row, Preference) else turns[:last]
    return Print(
        place,
        usable,
        _digest(_lines(before)) if before else None,
        tuple(_digest(_lines(d.messages)) for d in dialogues),
    )


def _lines(turns: Sequence[Message]) -> Iterator[str]:
    return (f"{m.role} {m.content}" for m in turns)


def _digest(texts: Iterable[str]) -> bytes:
    digest = blake2b(digest_size=16)
    for text in texts:
        plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
        digest.update(" ".join(plain.casefold().split()).encode() + b"\n")
    return digest.digest()


def overlap(rows: Sequence[Print], others: Sequence[Print], name: str, *, unread: int = 0, whose: str = "") -> Overlap:
    """Which of `rows` stand among `others`."""
    prompts = {p.prompt: p.place for p in reversed(others) if p.prompt}  # reversed: the first place stays
    whole = {text: p.place for p in reversed(others) for text in p.texts}
    by_prompt = [(p.place, prompts[p.prompt]) for p in rows if p.prompt in prompts]
    by_text = [(p.place, whole[text]) for p in rows for text in [t for t in p.texts if t in whole][:1]]
    places = {here: f"{here} = {there}" for here, there in [*by_prompt, *by_text]}
    return Overlap(name, len(rows), len(by_prompt), len(by_text), tuple(places.values()), unread, whose)
