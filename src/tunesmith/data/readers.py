"""Files to raw rows: JSON lines, JSON, CSV, Parquet, Arrow and plain text, gzipped or not; what cannot be read is counted."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from tunesmith.data.documents import document_rows, joined_values, parse_document, rows_of, values
from tunesmith.data.tabular import arrow_rows, csv_rows, parquet_rows
from tunesmith.errors import UserError
from tunesmith.jsontext import parse_json, parse_json_from

TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather")
SUFFIXES = (".jsonl", ".ndjson", ".json", *TABLES)
TEXT_SUFFIXES = (".txt",)
STRETCH = 16_000
"""A long text file is read in rows of about this many characters, so that some of it can be held out and all of it mixed."""
FIRST = 1 << 20  # characters of a file in which its first value must end, where that has several lines

_END_LINE = re.compile(r"^<\|endoftext\|>[ \t\r]*\n?", re.MULTILINE)
_MARK = "\ufeff"
_FOREIGN = {b"PK\x03\x04": "a zip or Excel file: unpack it, or save the sheet as CSV", b"%PDF": "a PDF", b"BZh": "bzip2: unpack it",
            b"\x28\xb5\x2f\xfd": "zstd: unpack it", b"\xfd7zXZ": "xz: unpack it", b"SQLite format": "a database"}  # fmt: skip


@dataclass(frozen=True)
class Located:
    """A value and where it stands: file number within its split, and line (or row) counted from 1."""

    value: Any
    file: int
    line: int


@dataclass
class Report:
    """What happened to the rows of a split: read, used, and the bad ones by reason with the first few places.

    form: which form was recognised, and what each column and role became; a line each.
    """

    rows: int = 0
    used: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    form: list[str] = field(default_factory=list)

    def add_bad(self, reason: str, place: str) -> None:
        """Count one bad row; the first three places of each reason are kept."""
        self.bad[reason] = self.bad.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < 3:
            places.append(place)

    def lines(self) -> list[str]:
        """One line a reason: count, reason, first places."""
        return [
            f"{n:,} skipped: {why} ({', '.join(self.places[why])}{', ...' if n > 3 else ''})"
            for why, n in self.bad.items()
        ]


def suffix_of(path: Path) -> str:
    """The ending that says what a file holds, in lower case and without `.gz`: `.jsonl`."""
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def read_file(path: Path, number: int, report: Report, name: str = "", key: str = "") -> Iterator[Located]:
    """Rows of a file; unreadable ones count as bad.

    By the ending: JSON lines (also where it is unknown), .json, .csv, .tsv, .parquet, .arrow or .txt, each perhaps with .gz.
    name: what messages call the file, if not by its own name. key: of a JSON object with several splits, which to read.
    Raises: UserError if the file as a whole is broken: missing, cut-off gzip, not Parquet.
    """
    read = _Reading(path, report, name or path.name, key)
    try:
        with _opened(path) as file:
            for line, row in read.rows(file):
                yield Located(row, number, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged gzip data after line {read.line:,} ({error}); download it again") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """The object that a file is, if it is one JSON object and no more; None for JSON lines, and for what cannot be read."""
    try:
        with _opened(path) as file:
            data = file.read(FIRST)
            encoding = json.detect_encoding(data[:4])
            start = data.decode(encoding, errors="ignore").lstrip(_MARK + " \t\r\n")
            if not start.startswith("{"):
                return None
            try:
                value, end = parse_json_from(start, 0)
            except json.JSONDecodeError:
                if len(data) < FIRST or suffix_of(path) != ".json":
                    return None
                value, end = parse_json((data + file.read()).decode(encoding)), len(start)
            return value if not start[end:].strip() and not file.read(64).strip() else None
    except (OSError, EOFError, zlib.error, ValueError):
        return None


def read_text(path: Path) -> str:
    """A text file's content. Raises: UserError if it is not text, or not there."""
    try:
        with _opened(path) as file:
            return _decoded(path, file.read(), _by_mark)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged gzip data ({error}); download it again") from None


def _opened(path: Path) -> IO[bytes]:
    file = path.open("rb")
    if path.name.lower().endswith(".gz") or file.read(2) == b"\x1f\x8b":
        file.close()
        return cast("IO[bytes]", gzip.open(path, "rb"))
    file.seek(0)
    return file


@dataclass
class _Reading:
    """One file on its way to rows. line: where the reader is."""

    path: Path
    report: Report
    name: str
    key: str = ""
    line: int = 0

    def rows(self, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
        """(line or number, row) of all of them."""
        suffix, start = suffix_of(self.path), file.read(16)
        file.seek(0)
        if suffix == ".parquet" or (start.startswith(b"PAR1") and suffix not in TEXT_SUFFIXES):
            yield from enumerate(parquet_rows(self.path, file), 1)
        elif suffix in (".arrow", ".feather"):
            yield from enumerate(arrow_rows(self.path, file), 1)
        elif suffix in TEXT_SUFFIXES:
            yield from (
                (line, {"text": row}) for line, row in _stretches(self.path, _text_lines(self.path, file, start))
            )
        elif foreign := next((what for mark, what in _FOREIGN.items() if start.startswith(mark)), None):
            raise UserError(f"{self.path} is {foreign}; expected JSON lines, JSON, CSV, Parquet or text")
        elif suffix in (".csv", ".tsv"):
            yield from self._table(file, suffix == ".tsv")
        else:
            yield from self._json(file, suffix)

    def _table(self, file: IO[bytes], tabs: bool) -> Iterator[tuple[int, Any]]:
        encoding = _by_mark(file.read(4))
        file.seek(0)
        try:
            with io.TextIOWrapper(file, encoding, newline="") as text:
                for line, row in csv_rows(self.path, text, tabs):
                    if isinstance(row, str):
                        self._bad(line, row)
                    else:
                        yield line, row
        except UnicodeDecodeError as error:
            raise UserError(_not_text(self.path, error)) from None

    # ---- JSON --------------------------------------------------------------------------------------------------

    def _json(self, file: IO[bytes], suffix: str) -> Iterator[tuple[int, Any]]:
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        if not encoding.startswith("utf-8"):  # a text in UTF-16 has no lines of bytes
            file = io.BytesIO(_decoded(self.path, file.read(), json.detect_encoding).encode("utf-8", "surrogatepass"))
        if suffix == ".json" and not _are_json_lines(file):
            text = _decoded(self.path, file.read(), _by_mark)
            if not text.strip():
                return
            try:
                value, bad = parse_document(self.path, text)
                for line, reason in bad:
                    self._bad(line, reason)
                yield from enumerate(document_rows(self.path, value, self.key), 1)
                return
            except json.JSONDecodeError:  # more than one value
                file.seek(0)
        yield from self._lines(file)

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
        """Rows of JSON lines; of a document, or of several, if the first line is not a value by itself."""
        lines = enumerate(file, 1)
        first = next(((line, data) for line, data in lines if data.strip(b"\xef\xbb\xbf \t\r\n")), None)
        if first is None:
            return
        if self._is_document(first[1], file):
            yield from self._documents(file)
            return
        second = next(((line, data) for line, data in lines if data.strip()), None)
        if second is None:  # a single line may be a whole document
            found = list(self._line(*first))
            whole = found[0][1] if len(found) == 1 else None
            yield from (
                ((first[0], row) for row in document_rows(self.path, whole, self.key))
                if isinstance(whole, dict)
                else found
            )
            return
        for line, data in chain([first, second], lines):
            self.line = line
            try:
                value = parse_json(data.decode())
            except ValueError:  # a mark, an empty or a broken line
                value = None
            if type(value) is dict:
                yield line, value
            else:
                yield from self._line(line, data)

    def _line(self, line: int, data: bytes) -> Iterator[tuple[int, Any]]:
        try:
            text = data.decode()
            if text[:1] == _MARK:
                text = text.lstrip(_MARK)
            value = parse_json(text)
        except UnicodeDecodeError as error:
            self._bad(line, f"invalid UTF-8 ({error.reason}): save the file as UTF-8")
        except json.JSONDecodeError as error:
            several = joined_values(text)  # none in an empty line
            if several is None:
                self._bad(line, f"invalid JSON ({error.msg})")
            else:
                yield from ((line, row) for row in several)
        else:
            if isinstance(value, list):
                yield from ((line, row) for row in rows_of(value))
            else:
                yield line, value

    def _is_document(self, line: bytes, file: IO[bytes]) -> bool:
        """Whether the first line only begins a value that other lines go on with. Leaves `file` after that line."""
        text = line.decode(errors="replace").strip(_MARK + " \t\r\n")
        if text[:1] not in ("[", "{"):
            return False
        try:
            parse_json_from(text, 0)
            return False
        except json.JSONDecodeError as error:
            if error.pos < len(text) - 1 and "Unterminated" not in error.msg:
                return False
        here = file.tell()
        start = line + file.read(FIRST)
        file.seek(here)
        try:
            parse_json_from(start.decode(errors="ignore").lstrip(_MARK + " \t\r\n"), 0)
        except json.JSONDecodeError:
            return text[0] == "[" and len(start) >= FIRST
        return True

    def _documents(self, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
        file.seek(0)
        text = _decoded(self.path, file.read(), _by_mark)
        try:
            value, bad = parse_document(self.path, text)
        except json.JSONDecodeError:  # several
            yield from ((line, row) for line, value in values(text, self.path) for row in rows_of(value))
            return
        for line, reason in bad:
            self._bad(line, reason)
        yield from enumerate(document_rows(self.path, value, self.key), 1)

    def _bad(self, line: int, reason: str) -> None:
        self.report.rows += 1
        self.report.add_bad(reason, f"{self.name}:{line}")


def _by_mark(start: bytes) -> str:
    """The encoding by the byte-order mark; UTF-8 without one."""
    marks = {
        codecs.BOM_UTF32_LE: "utf-32",
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    return next((name for mark, name in marks.items() if start.startswith(mark)), "utf-8-sig")


def _decoded(path: Path, data: bytes, encoding_of: Any) -> str:
    try:
        text: str = data.decode(encoding_of(data[:4]))
    except UnicodeDecodeError as error:
        raise UserError(_not_text(path, error)) from None
    return text


def _not_text(path: Path, error: UnicodeDecodeError) -> str:
    name = "UTF-8" if error.encoding.lower().startswith("utf-8") else error.encoding.upper()
    kind = " text" if suffix_of(path) in TEXT_SUFFIXES else ""
    return f"{path} is not {name}{kind} ({error.reason} at byte {error.start:,}); save it as UTF-8"


def _are_json_lines(file: IO[bytes]) -> bool:
    """Whether the first line of a file alone is JSON and something comes after it; then the file need not be read whole."""
    lines = (line for line in file if line.strip())
    try:
        parse_json(next(lines, b"").decode("utf-8-sig"))
        return next(lines, None) is not None
    except ValueError:
        return False
    finally:
        file.seek(0)


def _stretches(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(line, text) of a text file's rows. A line `<|endoftext|>` ends a text; long ones are cut at the best place near STRETCH.

    Holds little more than a row. Raises: UserError if it is not text.
    """
    line, waiting, size = 1, list[str](), 0
    for text in lines:
        if "\0" in text:
            raise UserError(
                f"{path} holds zero bytes, so it is not a text file; name one, or name JSONL or Parquet with its file extension"
            )
        end = _END_LINE.match(text)
        if end:
            last = "".join(waiting)
            if last.strip():
                yield line, last.strip("\r\n")
            line += last.count("\n") + 1
            waiting, size = [], 0
        waiting.append(text[end.end() :] if end else text)
        size += len(waiting[-1])
        if size > STRETCH:
            long, start = "".join(waiting), 0
            while len(long) - start > STRETCH:
                stop = _cut_place(long, start)
                if long[start:stop].strip():
                    yield line, long[start:stop].strip("\r\n")
                line += long.count("\n", start, stop)
                start = stop
            waiting, size = [long[start:]], len(long) - start
    last = "".join(waiting)
    if last.strip():
        yield line, last.strip("\r\n")


def _text_lines(path: Path, file: IO[bytes], start: bytes) -> Iterator[str]:
    """The lines of a text file that begins with the bytes `start`, line ends included. Raises: UserError if it is not text."""
    at, encoding = 0, _by_mark(start[:4])
    if encoding != "utf-8-sig":  # a text in UTF-16 has no lines of bytes
        yield from _decoded(path, file.read(), _by_mark).splitlines(keepends=True)
        return
    for data in file:
        try:
            yield data.decode("utf-8" if at else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text ({error.reason} at byte {at + error.start:,}); save it as UTF-8"
            ) from None
        at += len(data)


def _cut_place(text: str, start: int) -> int:
    """Where a row that begins at `start` ends: after an empty line, else a line, else a word of its last quarter."""
    stop = start + STRETCH
    if stop >= len(text):
        return len(text)
    for border in ("\n\n", "\n", " "):
        at = text.rfind(border, stop - STRETCH // 4, stop)
        if at >= 0:
            return at + (len(border) if border != " " else 0)  # a space belongs to the word after it
    return stop
