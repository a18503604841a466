"""Tokenised data sets as memory-mapped files, keyed by content: a second start reads nothing anew."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.data.datasets import Source
from tunesmith.data.dialogue import END, NEXT, Preference, Row, Text, prose, render, segments
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.readers import Located, Report
from tunesmith.data.tokenizer import Tokenizer

IGNORE_INDEX = -100  # the target of a token that carries no loss, as torch and transformers have it
VERSION = 3  # raise it when the meaning of a stored byte changes
ROWS_AT_A_TIME = 8192

Array = np.ndarray[Any, Any]
Form = Literal["dialogues", "texts", "pairs", "prose"]


@dataclass(frozen=True)
class TokenStore:
    """The rows of one split as tokens.

    tokens: (N,) uint16 or int32, all rows one after the other.
    flags: (N,) uint8, bits NEXT and END of `dialogue.py`.
    offsets: (rows + 1,) int64, where each row begins.
    plain: (rows,) bool, True for plain text.
    places: (rows, 2) int32, file number and line of each row.
    digests: name of each file that was read -> SHA-256 of its content.
    """

    tokens: Array
    flags: Array
    offsets: Array
    plain: Array
    places: Array
    end_of_text: int
    source: Source
    split: str
    report: Report
    digests: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Array:
        """(rows,) int64, tokens of each row."""
        return np.diff(self.offsets)

    def row(self, index: int, loss_on: str, start: int = 0, stop: int | None = None) -> tuple[Array, Array]:
        """Tokens and targets of a row, or of the stretch [start, stop) of it; each (n,) int64.

        Targets are shifted here and nowhere else: `targets[t]` is what the model should say after `tokens[t]`, or
        IGNORE_INDEX. loss_on: `assistant` (answers and their ends) or `all` (every next token and the text's end).
        """
        a, b = int(self.offsets[index]), int(self.offsets[index + 1])
        tokens, flags = self.tokens[a:b].astype(np.int64), self.flags[a:b]
        following = np.append(tokens[1:], self.end_of_text)
        if loss_on == "all":
            targets = following
        else:
            targets = np.where(flags & NEXT, following, IGNORE_INDEX)
            targets[(flags & END) != 0] = self.end_of_text
        return tokens[start:stop], targets[start:stop]

    def place(self, index: int) -> str:
        """`file:line` of a row."""
        file, line = self.places[index]
        return self.source.place(self.split, int(file), int(line))


def cache_directory() -> Path:
    """Where tokenised data is kept: $TUNESMITH_CACHE, else tunesmith in the user's cache directory."""
    if "TUNESMITH_CACHE" in os.environ:
        return Path(os.environ["TUNESMITH_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / (
        "Library/Caches" if sys.platform == "darwin" else ".cache"
    )
    return Path(base) / "tunesmith"


def tokenise(source: Source, split: str, tokenizer: Tokenizer, *, form: Form = "dialogues") -> TokenStore:
    """The split's tokens, from the cache if these very bytes were tokenised before.

    form: `dialogues`: a row a dialogue, encoded segment by segment; `texts`: each as one text (for the paper's windows);
        `pairs`: three rows a preference: prompt, chosen and rejected answer, each encoded as it is within a dialogue;
        `prose`: a row a text, a dialogue's turns without their roles (for pretraining).
    Raises: UserError if no row is usable.
    """
    digests = source.digests(split)
    key = content_hash([repr((VERSION, source.fingerprint(split, digests), tokenizer.fingerprint, form))])
    directory = cache_directory() / "tokens" / key[:32]
    stored = _read(directory)
    if stored is None:
        report = Report()
        stored = _encode(source.rows(split, report, pairs=form == "pairs"), tokenizer, form), report
        with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
            _write(*stored, directory)
            stored = _read(directory) or stored
    arrays, report = stored
    end = tokenizer.end_of_text
    return TokenStore(**arrays, end_of_text=end, source=source, split=split, report=report, digests=digests)


def _read(directory: Path) -> tuple[dict[str, Array], Report] | None:
    """What `_write` has written; None if it is not there, or damaged: then it is made anew."""
    try:
        names = ("tokens", "flags", "offsets", "plain", "places")
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names}
        return arrays, Report(**json.loads((directory / "report.json").read_text(encoding="utf-8")))
    except (OSError, EOFError, ValueError):
        return None


def _write(arrays: dict[str, Array], report: Report, directory: Path) -> None:
    """All files appear at once: written aside, then renamed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".writing-"))
    try:
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        (aside / "report.json").write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)  # a damaged one
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _encode(rows: Iterator[Located], tokenizer: Tokenizer, form: Form) -> dict[str, Array]:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    tokens, flags, lengths, plain, places = [], [], [], [], []
    while block := list(islice(rows, ROWS_AT_A_TIME)):
        encoded = [(pieces, located) for located in block for pieces in stored_rows(located.value, form)]
        ids, marks, counts = encode_rows([pieces for pieces, _ in encoded], tokenizer)
        tokens.append(ids.astype(dtype))
        flags.append(marks)
        lengths.append(counts)
        plain += [form == "prose" or isinstance(located.value, Text) for _, located in encoded]
        places += [(located.file, located.line) for _, located in encoded]
    return {
        "tokens": np.concatenate(tokens),
        "flags": np.concatenate(flags),
        "offsets": np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        "plain": np.array(plain),
        "places": np.array(places, np.int32),
    }


Pieces = list[tuple[str, bool]]


def stored_rows(row: Row, form: Form = "dialogues") -> list[Pieces]:
    """What is stored of a row, as (text, carries loss) pieces; of a preference as a dialogue, the chosen one."""
    if form == "pairs":
        assert isinstance(row, Preference)
        *prompt, chosen = segments(row.chosen.messages)
        return [prompt, [chosen], [segments(row.rejected.messages)[-1]]]
    if form == "prose":
        return [[(prose(row), True)]]
    dialogue = row.chosen if isinstance(row, Preference) else row
    if isinstance(dialogue, Text):
        return [[(dialogue.text, True)]]
    return [[(render(dialogue.messages), False)] if form == "texts" else segments(dialogue.messages)]


def encode_rows(rows: Sequence[Pieces], tokenizer: Tokenizer) -> tuple[Array, Array, Array]:
    """Tokens of many rows, as if every piece were encoded by itself, at nearly the cost of encoding whole rows.

    Each row is encoded once as a whole. A byte-level token has a known number of bytes, so the tokens' running sum
    shows where each piece ends. Where every end falls between two tokens the whole's tokens are the pieces' tokens:
    no merge crossed a border, and before an answer's space and before a marker's line break the pre-tokeniser cuts
    anyway. Rows for which this does not hold (odd white space, answers without a space) are encoded piece by piece.

    Returns: ids (N,) int64 and flags (N,) uint8 of all rows one after the other, and tokens a row (rows,) int64.
    """
    texts = ["".join(text for text, _ in row) for row in rows]
    encoded = tokenizer.encode_batch(texts)
    counts = np.array([len(ids) for ids in encoded], np.int64)
    ids = np.fromiter(chain.from_iterable(encoded), np.int64, counts.sum())
    token_ends = np.cumsum(tokenizer.token_bytes[ids])
    pieces = [piece for row in rows for piece in row]
    first = np.array([i == 0 for row in rows for i in range(len(row))])
    supervised = np.array([answer for _, answer in pieces])
    piece_ends = np.cumsum([len(text) if text.isascii() else len(text.encode()) for text, _ in pieces])
    stops = np.searchsorted(token_ends, piece_ends)  # the token with which each piece ends
    on_border = token_ends[np.minimum(stops, len(ids) - 1)] == piece_ends
    safe = on_border & (first | ~supervised | np.array([text.startswith(" ") for text, _ in pieces]))
    row_of_piece = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    slow = np.unique(row_of_piece[~safe])
    flags = np.zeros(len(ids), np.uint8)
    fast = supervised & ~np.isin(row_of_piece, slow)
    starts = np.concatenate([[-1], stops[:-1]])  # the token before each piece
    change = np.zeros(len(ids) + 1, np.int64)
    np.add.at(change, starts[fast] + first[fast], 1)  # a row's first token is nobody's target
    np.add.at(change, stops[fast], -1)
    flags[np.cumsum(change[:-1]) > 0] |= NEXT
    flags[stops[fast]] |= END
    if len(slow):
        borders = np.cumsum(counts)[:-1]
        ids_of, flags_of = np.split(ids, borders), np.split(flags, borders)
        for row in slow:
            parts = tokenizer.encode_batch([text for text, _ in rows[row]])
            marked = mark_targets(list(zip(parts, (answer for _, answer in rows[row]), strict=True)))
            ids_of[row], flags_of[row] = np.array(marked[0], np.int64), marked[1]
            counts[row] = len(marked[0])
        ids, flags = np.concatenate(ids_of), np.concatenate(flags_of)
    return ids, flags, counts


def mark_targets(pieces: Sequence[tuple[list[int], bool]]) -> tuple[list[int], Array]:
    """Ids of a row and the bits of each token, from its encoded (ids, carries loss) pieces.

    The token before a supervised one gets NEXT; the last token of a supervised piece gets END.
    """
    ids = list(chain.from_iterable(piece for piece, _ in pieces))
    marks = np.zeros(len(ids), np.uint8)
    start = 0
    for piece, supervised in pieces:
        stop = start + len(piece)
        if supervised and stop > start:
            marks[max(start - 1, 0) : stop - 1] |= NEXT
            marks[stop - 1] |= END
        start = stop
    return ids, marks
