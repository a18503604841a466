"""Files to raw rows: JSONL, JSON, Parquet and plain text, gzipped or not, with what cannot be read counted by reason and place."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.errors import UserError

TEXT_SUFFIXES = (".txt", ".txt.gz")
STRETCH = 16_000
"""A long text file is read in rows of about this many characters, so that some of it can be held out and all of it mixed."""

_END_LINE = re.compile(r"^<\|endoftext\|>[ \t\r]*\n?", re.MULTILINE)


@dataclass(frozen=True)
class Located:
    """A value and where it stands: file number within its split, and line (or row) counted from 1."""

    value: Any
    file: int
    line: int


@dataclass
class Report:
    """What happened to the rows of a split: read, used, and the bad ones by reason with the first few places."""

    rows: int = 0
    used: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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


def read_file(path: Path, number: int, report: Report, name: str = "") -> Iterator[Located]:
    """Rows of a JSONL, JSON, Parquet or text file (or gzip of all but Parquet) as dicts; unreadable lines count as bad.

    name: what messages call the file, if not by its own name.
    Raises: UserError if the file as a whole is broken: missing, cut-off gzip, not Parquet.
    """
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path, number)
        return
    line, name = 0, name or path.name
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            document = path.name.endswith((".json", ".json.gz")) and not _are_json_lines(file)
            if document and (rows := _json_array(path, file.read())) is not None:
                for line, row in enumerate(rows, 1):
                    yield Located(row, number, line)
                return
            if path.name.endswith(TEXT_SUFFIXES):
                yield from (Located({"text": text}, number, line) for line, text in _stretches(path, file))
                return
            file.seek(0)
            for line, data in enumerate(file, 1):
                if not data.strip():
                    continue
                try:
                    text = data.decode("utf-8-sig" if line == 1 else "utf-8")  # Windows' byte-order mark
                    yield Located(json.loads(text), number, line)
                except UnicodeDecodeError as error:
                    report.rows += 1
                    report.add_bad(f"invalid UTF-8 ({error.reason})", f"{name}:{line}")
                except json.JSONDecodeError as error:
                    report.rows += 1
                    report.add_bad(f"invalid JSON ({error.msg})", f"{name}:{line}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a broken gzip after line {line:,} ({error}); download it again") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None


def _are_json_lines(file: BinaryIO | gzip.GzipFile) -> bool:
    """Whether the first line of a file alone is JSON and something comes after it; then the file need not be read whole."""
    lines = (line for line in file if line.strip())
    try:
        json.loads(next(lines, b""))
        return next(lines, None) is not None
    except ValueError:
        return False
    finally:
        file.seek(0)


def _json_array(path: Path, data: bytes) -> list[Any] | None:
    """The rows of a JSON document; None if the file is JSON lines under the name .json."""
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        if not data.strip():
            return []
        raise UserError(f"{path} is not valid JSON ({error.msg} in line {error.lineno})") from None
    if isinstance(value, dict) and not value.keys() & {"text", "messages", "prompt", "chosen"}:  # a wrapper, no row
        value = next((v for v in value.values() if isinstance(v, list)), [value])
    return value if isinstance(value, list) else [value]


def _stretches(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """(line, text) of a text file's rows. A line `<|endoftext|>` ends a text; long ones are cut at the best place near STRETCH.

    Holds little more than a row. Raises: UserError if it is no text.
    """
    line, waiting, size = 1, list[str](), 0
    for text in _text_lines(path, file):
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


def _text_lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    """The lines of a text file, line ends included. Raises: UserError if it is no text."""
    start = 0
    for data in file:
        try:
            text = data.decode("utf-8" if start else "utf-8-sig")
        except UnicodeDecodeError as error:
            at = start + error.start
            raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {at:,}); save it as UTF-8") from None
        if "\0" in text:
            raise UserError(
                f"{path} holds zero bytes: it is not a text file; name one, or JSONL or Parquet by its ending"
            )
        yield text
        start += len(data)


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


def _read_parquet(path: Path, number: int) -> Iterator[Located]:
    import pyarrow
    from pyarrow import parquet

    line = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):  # not the 65,536 of its own
            for row in batch.to_pylist():
                line += 1
                yield Located(row, number, line)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); download or write it again"
        ) from None
