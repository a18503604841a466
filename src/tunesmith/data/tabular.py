"""Tables to raw rows: CSV and TSV with a header, Parquet, and the Arrow files of `datasets`."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import UserError

ROWS_AT_A_TIME = 256  # of Parquet in memory as Python objects; its own 65,536 would be a large set whole
DELIMITERS = ",;\t|"
LONGEST_CELL = 1 << 28  # characters; the csv module's own limit, 131,072, is less than a long text
NOTHING = (
    "messages",
    "conversations",
    "system",
    "system_prompt",
    "history",
    "input",
    "context",
    "split",
    "weight",
    "label",
)
"""Columns whose empty cells say nothing; elsewhere an empty cell is an empty text."""


def csv_rows(path: Path, lines: Iterable[str], tabs: bool) -> Iterator[tuple[int, Any]]:
    """(line, row) of a table as text; a row that cannot be read is the reason, a str. tabs: TSV.

    The header decides between comma, semicolon, tab and bar. Raises: UserError if there is no header.
    """
    lines = iter(lines)
    header = next((line for line in lines if line.strip("\ufeff \t\r\n")), "").lstrip("\ufeff")
    if "\0" in header:
        raise UserError(f"{path} holds zero bytes, as UTF-16 without its mark does; save it as UTF-8")
    delimiter = "\t" if tabs else max(DELIMITERS, key=lambda d: (header.count(d), d == ","))
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    names = next(csv.reader([header], delimiter=delimiter), [])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: the header has the column {twice!r} twice; rename one")
    empty = {name for name in names if name.strip().lower() in NOTHING}
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 2  # counted from 1, after the header
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not a row of CSV ({error})"
            continue
        if not cells:
            continue
        if len(cells) != len(names):
            yield line, f"a row with {len(cells)} cells under a header with {len(names)}"
            continue
        yield line, {n: None if not cell and n in empty else cell for n, cell in zip(names, cells, strict=True)}


def parquet_rows(path: Path, file: IO[bytes]) -> Iterator[Any]:
    """The rows of a Parquet file. Raises: UserError if it is none."""
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=ROWS_AT_A_TIME):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet ({_first_line(error)}); download or write it again"
        ) from None


def arrow_rows(path: Path, file: IO[bytes]) -> Iterator[Any]:
    """The rows of an Arrow file, a stream (as `save_to_disk` writes it) or not. Raises: UserError if it is none."""
    import pyarrow

    try:
        try:
            batches: Iterable[Any] = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            whole = pyarrow.ipc.open_file(file)
            batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as Arrow ({_first_line(error)}); download or save it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
