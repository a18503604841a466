"""Files are read a row at a time, with the rows, lines and errors of reading them whole."""

import gzip
import io
import json
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import readers
from tunesmith.data.readers import Report, read_file
from tunesmith.errors import UserError

END_LINE = re.compile(r"^<\|endoftext\|>[ \t\r]*\n?", re.MULTILINE)


def stretches_of_the_whole(data):
    """(line, text) of a text file's rows as they were made from the whole file; kept as the reference."""
    line = 1
    for text in END_LINE.split(data.decode("utf-8-sig")):
        start = 0
        while start < len(text):
            stop = readers._cut_place(text, start)
            if text[start:stop].strip():
                yield line, text[start:stop].strip("\r\n")
            line += text.count("\n", start, stop)
            start = stop
        line += 1


PARTS = [
    "a", "bc ", " ", "\n", "\n\n", "\r\n", "<|endoftext|>", "\n<|endoftext|>\n", "\n<|endoftext|> \t\r\n", "\u00e9",
    "\ufeff", "word " * 9,
]  # fmt: skip


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PARTS), max_size=40))
def test_a_text_file_gives_the_rows_of_the_whole(parts):
    data = "".join(parts).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "STRETCH", 12)
        found = list(
            readers._stretches(Path("made.txt"), readers._text_lines(Path("made.txt"), io.BytesIO(data), data[:16]))
        )
        assert found == list(stretches_of_the_whole(data))


def lines(data):
    """As a binary file iterates: at line feeds alone."""
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def peak_mb(path):
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_file(path, 0, Report()))
        return count, tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["rows.txt", "rows.txt.gz", "rows.json", "rows.json.gz", "rows.jsonl", "rows.jsonl.gz"]
)
def test_20_mb_are_read_in_under_one(tmp_path, name):
    path = tmp_path / name
    row = "\n".join(["some text that is long enough"] * 300)
    line = row + "\n\n" if ".txt" in name else json.dumps({"text": row}) + "\n"
    with gzip.open(path, "wt") if name.endswith("gz") else path.open("w") as file:
        for _ in range(20_000_000 // len(line)):
            file.write(line)
    count, peak = peak_mb(path)
    assert count > 1000
    assert peak < 1


def test_parquet_is_read_in_small_batches(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"{i} " + "some text that is long enough " * 300 for i in range(2200)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    assert [row.value["text"] for row in read_file(tmp_path / "rows.parquet", 0, Report())] == texts
    count, peak = peak_mb(tmp_path / "rows.parquet")
    assert count == 2200
    assert peak < 6


@pytest.mark.parametrize(
    "text", ['{"text": "a"}\n', '[{"text": "a"}]', '\n\n{"text": "a"}\n\n{"text": "a"}', '{"text":\n"a"}']
)
def test_json_is_one_document_or_lines_whatever_its_name(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert {row.value["text"] for row in read_file(path, 0, Report())} == {"a"}


def test_the_place_of_a_broken_byte_counts_from_the_beginning_of_the_file(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbfgood\ngood\nbad \xff\n")
    with pytest.raises(UserError, match=r"not UTF-8 text \(invalid start byte at byte 17\)"):
        list(read_file(path, 0, Report()))
