"""Tokenised data sets as memory-mapped files, keyed by content: a second start tokenises nothing anew."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.data.datasets import Source
from tunesmith.data.dialogue import BadRow, Dialogue, Preference, Row, Text, prose
from tunesmith.data.encoding import encode_rows, targets_of
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.readers import Located, Report
from tunesmith.data.template import Segment, Template
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.words import Words
from tunesmith.errors import UserError
from tunesmith.jsontext import json_object

VERSION = 6  # raise it when the meaning of a stored byte changes
CHARACTERS_AT_A_TIME = 1 << 20  # what is encoded takes some fifty times its size for a moment
COLUMNS = ("tokens", "flags", "offsets", "taught", "plain", "places")

Array = np.ndarray[Any, Any]
Form = Literal["dialogues", "texts", "pairs", "prose"]


@dataclass(frozen=True)
class TokenStore:
    """The rows of one split as tokens.

    tokens: (N,) uint16 or int32, all rows one after the other.
    flags: (N,) uint8, bits NEXT and END of `encoding.py`.
    offsets: (rows + 1,) int64, where each row begins.
    taught: (rows,) int32, targets of each row with the loss on the assistant: what its flags add up to.
    plain: (rows,) bool, True for plain text.
    places: (rows, 2) int32, file number and line of each row.
    end_of_text, end_of_answer: the tokenizer's.
    fingerprint: of the content of the split's files and what is made of them (`Source.fingerprint`), independent of the tokenizer.
    digests: name of each file that was read -> SHA-256 of its content.
    """

    tokens: Array
    flags: Array
    offsets: Array
    taught: Array
    plain: Array
    places: Array
    end_of_text: int
    end_of_answer: int
    source: Source
    split: str
    report: Report
    fingerprint: str
    digests: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Array:
        """(rows,) int64, tokens of each row."""
        return np.diff(self.offsets)

    def row(self, index: int, loss_on: str, start: int = 0, stop: int | None = None) -> tuple[Array, Array]:
        """Tokens and targets of a row, or of the stretch [start, stop) of it; each (n,) int64.

        `targets[t]` is what the model should say after `tokens[t]`, or IGNORE_INDEX. loss_on: `assistant` (answers and
        their ends) or `all` (every next token and the text's end).
        """
        a, b = int(self.offsets[index]), int(self.offsets[index + 1])
        tokens = self.tokens[a:b].astype(np.int64)
        flags = None if loss_on == "all" else self.flags[a:b]
        return tokens[start:stop], targets_of(tokens, flags, self.end_of_text)[start:stop]

    def firsts(self, rows: Array, each: int = 1, compared: int | None = None) -> list[int]:
        """For every one of some rows the first of them with the same tokens.

        each: stretches of the store that are a row. compared: only so many of them, the first ones; default all.
        """
        first_with: dict[tuple[bytes, bytes], int] = {}
        first_rows = []
        for row in rows.tolist():
            cuts = self.offsets[row * each : row * each + (compared or each) + 1]
            key = self.tokens[int(cuts[0]) : int(cuts[-1])].tobytes(), np.diff(cuts).tobytes()
            first_rows.append(first_with.setdefault(key, row))
        return first_rows

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
    """The split's tokens, from the cache if these very bytes were tokenised before; in bounded memory, however large the files.

    form: `dialogues`: a row a dialogue, encoded segment by segment; `texts`: each as one text (for the paper's windows);
        `pairs`: three rows a preference: prompt, chosen and rejected answer, each encoded as it is within a dialogue;
        `prose`: a row a text, a dialogue's turns without their roles (for pretraining).
    Raises: UserError if no row is usable, or if there is nowhere to write the tokens.
    """
    digests = source.digests(split)
    content = source.fingerprint(split, digests)
    key = content_hash([repr((VERSION, content, tokenizer.fingerprint, tokenizer.template.name, form))])
    directory = cache_directory() / "tokens" / key[:32]

    def write(aside: Path) -> None:
        report = Report()
        read = source.rows(split, report, pairs=form == "pairs", as_text=form == "texts")
        _encode(_cut(read, source, split, report, tokenizer.template, form), tokenizer, aside)
        with _writing():
            (aside / "report.json").write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")

    arrays, report = _read(directory) or _make(directory, write)
    return TokenStore(
        **arrays,
        end_of_text=tokenizer.end_of_text,
        end_of_answer=tokenizer.end_of_answer,
        source=source,
        split=split,
        report=report,
        fingerprint=content,
        digests=digests,
    )


Stored = tuple[dict[str, Array], Report]


def _read(directory: Path) -> Stored | None:
    """What was written there; None if it is not there, or damaged: then it is made anew."""
    try:
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        return arrays, Report(**json_object(directory / "report.json"))
    except (OSError, EOFError, ValueError):
        return None


class _CannotWriteError(Exception):
    """The tokens cannot be written where they were to be: a full disk, no permission. Not: the data cannot be read."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CannotWriteError(error) from error


def _make(directory: Path, write: Callable[[Path], None]) -> Stored:
    """What `write` writes, kept in `directory`, or where that is impossible in a temporary directory that ends with the process."""
    try:
        return _keep(directory, write)
    except _CannotWriteError as error:
        reason = error
    try:
        with _writing():
            aside = Path(tempfile.mkdtemp(prefix="tunesmith-tokens-"))
        atexit.register(shutil.rmtree, aside, ignore_errors=True)  # after a kill it is the system's to clean up
        write(aside)
    except _CannotWriteError as error:
        raise UserError(
            f"the tokens cannot be written, neither to the cache ({reason}) nor to a temporary directory ({error}); "
            "set TUNESMITH_CACHE to a directory on a disk with free space"
        ) from None
    stored = _read(aside)
    assert stored is not None
    return stored


def _keep(directory: Path, write: Callable[[Path], None]) -> Stored:
    """All files appear at once: written aside, then renamed."""
    with _writing():
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".writing-"))
    try:
        write(aside)
        if (stored := _read(directory)) is None:  # else another process was faster: its maps must stay
            with _writing():
                shutil.rmtree(directory, ignore_errors=True)  # a damaged one
                with contextlib.suppress(OSError):  # another process has put its own there in this moment
                    aside.rename(directory)
                if (stored := _read(directory)) is None:
                    raise OSError(f"{directory} cannot be replaced")
        return stored
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Column:
    """An array on disk that grows by its first axis; the file is what `numpy.save` writes of the whole."""

    def __init__(self, path: Path, dtype: type, width: tuple[int, ...] = ()) -> None:
        self.dtype, self.width, self.rows = np.dtype(dtype), width, 0
        with _writing():
            self.file = path.open("wb")
            self._write_header()

    def append(self, values: Array) -> None:
        with _writing():
            self.file.write(np.ascontiguousarray(values, self.dtype).data)
        self.rows += len(values)

    def close(self) -> None:
        with _writing():
            self.file.seek(0)
            self._write_header()  # numpy leaves room in it for any number of rows
            self.file.close()

    def abandon(self) -> None:
        """Close the file as it is; nothing where it was closed."""
        with contextlib.suppress(OSError):
            self.file.close()

    def _write_header(self) -> None:
        shape = (self.rows, *self.width)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)


@dataclass(frozen=True)
class _Cut:
    """A row as segments: what is stored of it, and where it stood."""

    stored: list[list[Segment]]
    plain: bool
    place: tuple[int, int]


def _cut(
    rows: Iterator[Located], source: Source, split: str, report: Report, template: Template, form: Form
) -> Iterator[_Cut]:
    """The rows as segments. One that the template refuses, or of which it lets nothing be learned, is counted with the reason.

    Raises: UserError if none is left.
    """
    answers = unlearned = used = 0
    for located in rows:
        try:
            stored = stored_rows(located.value, template, form)
            if form == "dialogues" and isinstance(located.value, Dialogue | Preference):
                messages = _dialogue(located.value).messages
                asked = sum(m.role == "assistant" and m.weight != 0 and bool(m.content) for m in messages)
                learned = template.ends_learned(stored[0])
                if not any(s.loss for s in stored[0]):
                    raise BadRow(template.refusal(messages) or "no token of it carries loss")
                answers, unlearned = answers + asked, unlearned + max(0, asked - learned)
        except BadRow as reason:
            report.used -= 1
            report.add_bad(str(reason), source.place(split, located.file, located.line))
            continue
        used += 1
        yield _Cut(stored, form == "prose" or isinstance(located.value, Text), (located.file, located.line))
    if not used:
        raise UserError(f"{source.name} ({split}) has no usable row: {'; '.join(report.lines())}")
    if unlearned:
        report.notes.append(
            f"{unlearned:,} of {answers:,} answers are read but not learned: the chat template changes earlier turns once there are "
            "later ones. A row that ends with such an answer would let it be learned"
        )


def _encode(rows: Iterator[_Cut], tokenizer: Tokenizer, directory: Path) -> None:
    """The columns of a store, a block of rows at a time; while one is encoded the next is read."""
    small = tokenizer.vocab_size <= 1 << 16
    kinds: dict[str, tuple[Any, ...]] = {
        "tokens": (np.uint16 if small else np.int32,),
        "flags": (np.uint8,),
        "offsets": (np.int64,),
        "taught": (np.int32,),
        "plain": (np.bool_,),
        "places": (np.int32, (2,)),
    }
    columns: dict[str, _Column] = {}
    with contextlib.ExitStack() as files:
        for name in COLUMNS:
            columns[name] = _Column(directory / f"{name}.npy", *kinds[name])
            files.callback(columns[name].abandon)
        columns["offsets"].append(np.zeros(1))
        end, words = 0, Words(tokenizer)
        for block in _ahead(_blocks(rows, tokenizer), lambda block: _encoded(block, words)):
            end += int(block["lengths"].sum())
            block["offsets"] = end - block["lengths"].sum() + np.cumsum(block.pop("lengths"))
            for name, values in block.items():
                columns[name].append(values)
        for column in columns.values():
            column.close()


@dataclass
class _Block:
    """Some rows to encode: their segments, which of them are plain text, and their file and line."""

    segments: list[list[Segment]]
    plain: list[bool]
    places: list[tuple[int, int]]


def _blocks(rows: Iterator[_Cut], tokenizer: Tokenizer) -> Iterator[_Block]:
    """The rows in blocks of about CHARACTERS_AT_A_TIME."""
    block, size = _Block([], [], []), 0
    for row in rows:
        first, *rest = row.stored
        begun = tokenizer.begun(first, plain=row.plain)
        for segments in (begun, *(tokenizer.continued(first, answer) for answer in rest)):
            block.segments.append(segments)
            block.plain.append(row.plain)
            block.places.append(row.place)
            size += sum([len(segment.text) for segment in segments])
        if size >= CHARACTERS_AT_A_TIME:
            yield block
            block, size = _Block([], [], []), 0
    if block.segments:
        yield block


def _encoded(block: _Block, words: Words) -> dict[str, Array]:
    """The columns of a block; `lengths` in place of offsets."""
    ids, flags, lengths = encode_rows(block.segments, words.tokenizer, words)
    before = np.append(0, np.cumsum(flags != 0, dtype=np.int64))
    return {
        "tokens": ids,
        "flags": flags,
        "lengths": lengths,
        "taught": np.diff(before[np.cumsum(lengths)], prepend=0),
        "plain": np.array(block.plain),
        "places": np.array(block.places),
    }


def _ahead(blocks: Iterator[_Block], compute: Callable[[_Block], dict[str, Array]]) -> Iterator[dict[str, Array]]:
    """`compute` of every block, in order, each in a thread while the next is read."""
    with ThreadPoolExecutor(1) as worker:
        waiting: Future[dict[str, Array]] | None = None
        for block in blocks:
            done, waiting = waiting, worker.submit(compute, block)
            if done is not None:
                yield done.result()
        if waiting is not None:
            yield waiting.result()


def stored_rows(row: Row, template: Template, form: Form = "dialogues") -> list[list[Segment]]:
    """What is stored of a row, as segments; of a preference as a dialogue, the chosen one."""
    if form == "pairs":
        assert isinstance(row, Preference)
        prompt, chosen = template.answered(row.chosen.messages)
        return [prompt, chosen, template.answered(row.rejected.messages)[1]]
    if form == "prose":
        return [[Segment(prose(row), loss=True, closes=True)]]
    if isinstance(row, Text):
        return [[Segment(row.text, loss=True, closes=True)]]
    dialogue = _dialogue(row)
    return [template.whole(dialogue.messages) if form == "texts" else template.segments(dialogue.messages, False)]


def _dialogue(row: Dialogue | Preference) -> Dialogue:
    return row.chosen if isinstance(row, Preference) else row
