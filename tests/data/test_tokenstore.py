"""The token cache: read back as memory maps, keyed by content, and never a reason to stop or to train on half of it."""

import io
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import tunesmith
from hanging import HANGS
from reference import marked
from tunesmith.data import tokenstore
from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import Text
from tunesmith.data.readers import Report
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import stored_rows, tokenise
from tunesmith.errors import UserError
from tunesmith.options.training import DataOptions

SAMPLE_ROWS = Path(tunesmith.__file__).parent / "sample" / "train.jsonl"
ROWS = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a " * i}]} for i in range(1, 30)]  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"text": ""}\n')
    return path


def read(file, tokenizer, **options):
    return tokenise(open_dataset(DataOptions(name=str(file), **options)), "train", tokenizer)


def same(a, b):
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in tokenstore.COLUMNS)


def counting_encoder(monkeypatch):
    """How often a batch of rows was really encoded."""
    calls = []
    encode = tokenstore.encode_rows
    monkeypatch.setattr(tokenstore, "encode_rows", lambda *args: calls.append(1) or encode(*args))
    return calls


def test_second_call_reads_the_memory_map_and_encodes_nothing(file, tokenizer, cache, monkeypatch):
    calls = counting_encoder(monkeypatch)
    first = read(file, tokenizer)
    encoded = len(calls)
    second = read(file, tokenizer)
    assert encoded > 0
    assert len(calls) == encoded
    assert isinstance(second.tokens, np.memmap)
    assert isinstance(second.flags, np.memmap)
    assert second.tokens.dtype == np.uint16
    assert same(first, second)
    assert (second.report.rows, second.report.used) == (30, 29)
    assert second.report.lines() == first.report.lines() == ["1 skipped: empty text (rows.jsonl:30)"]
    assert second.place(0) == "rows.jsonl:1"


def test_an_equal_file_elsewhere_shares_the_cache(file, tokenizer, cache, tmp_path, monkeypatch):
    read(file, tokenizer)
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "rows.jsonl"
    copy.write_bytes(file.read_bytes())
    calls = counting_encoder(monkeypatch)
    read(copy, tokenizer)
    assert calls == []


def test_a_copy_under_another_name_reports_its_own_name(file, tokenizer, cache, tmp_path):
    read(file, tokenizer)
    copy = tmp_path / "other.jsonl"
    copy.write_bytes(file.read_bytes())
    assert read(copy, tokenizer).report.lines() == ["1 skipped: empty text (other.jsonl:30)"]


def test_one_changed_byte_is_seen(file, tokenizer, cache):
    """Same size, same modification time: only the content tells."""
    before, stamp = read(file, tokenizer), file.stat()
    file.write_bytes(file.read_bytes().replace(b'"q7"', b'"q8"'))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = read(file, tokenizer)
    assert file.stat().st_size == stamp.st_size
    assert not same(before, after)
    assert tokenizer.decode(after.row(6, "all")[0]).startswith("\n\nHuman: q8")


@pytest.mark.parametrize("change", ["tokenizer", "max_rows", "whole"])
def test_what_decides_the_tokens_is_in_the_key(file, tokenizer, cache, change):
    from tunesmith.files.names import SAMPLE

    before = read(file, tokenizer)
    source = open_dataset(DataOptions(name=str(file), max_rows=5 if change == "max_rows" else None))
    other = Tokenizer.load(SAMPLE) if change == "tokenizer" else tokenizer
    after = tokenise(source, "train", other, form="texts" if change == "whole" else "dialogues")
    if change == "whole":
        assert not np.array_equal(before.flags, after.flags)
    else:
        assert len(before.tokens) != len(after.tokens)
    assert other.decode(after.row(3, "all")[0]) == tokenizer.decode(before.row(3, "all")[0])


def test_a_cache_that_cannot_be_written_still_works(file, tokenizer, cache):
    """A file where the directory should be; permissions would not stop a test that runs as root."""
    cache.write_text("in the way")
    first, second = read(file, tokenizer), read(file, tokenizer)
    assert same(first, second)
    assert len(first) == 29
    assert cache.read_text() == "in the way"


class FullDisk:
    """A file, for `tokenstore._Column`, on a disk that is full after some bytes wherever `full` says so."""

    def __init__(self, column, full):
        self.file, self.full = column.file, full

    def write(self, data):
        if self.full(self.file.name):
            self.file.write(bytes(data)[: len(bytes(data)) // 2])
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def fill_disk(monkeypatch, full):
    init = tokenstore._Column.__init__

    def on_full_disk(self, *args):
        init(self, *args)
        self.file = FullDisk(self, full)

    monkeypatch.setattr(tokenstore._Column, "__init__", on_full_disk)


def test_a_full_disk_leaves_no_half_cache_and_the_tokens_go_elsewhere(file, tokenizer, cache, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch, lambda path: str(cache) in str(path) and "flags" in path)
        whole = read(file, tokenizer)
    assert len(whole) == 29
    assert isinstance(whole.tokens, np.memmap)
    assert str(cache) not in str(whole.tokens.filename)
    assert list((cache / "tokens").iterdir()) == []
    assert same(whole, read(file, tokenizer))
    assert (whole.report.rows, whole.report.used) == (30, 29), "of the second pass alone"


def test_where_nothing_can_be_written_the_way_out_is_named(file, tokenizer, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fill_disk(monkeypatch, lambda path: True)
    with pytest.raises(UserError, match=r"cannot be written, neither to the cache.*No space left.*TUNESMITH_CACHE"):
        read(file, tokenizer)
    assert list((cache / "tokens").iterdir()) == []


def test_a_file_that_cannot_be_read_is_no_matter_of_the_cache(file, tokenizer, cache, monkeypatch):
    def failing(*_args):
        raise PermissionError(13, "Permission denied", "rows.jsonl")
        yield

    monkeypatch.setattr("tunesmith.data.datasets.read_file", failing)
    monkeypatch.setattr(tempfile, "mkdtemp", counted := CountedCalls(tempfile.mkdtemp))
    with pytest.raises(PermissionError, match=r"rows\.jsonl"):
        read(file, tokenizer)
    assert counted.calls <= 1, "it was tried again elsewhere"


class CountedCalls:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.function(*args, **options)


def test_a_cache_whose_writer_was_killed_is_not_used(file, tokenizer, cache):
    """The process dies, without any clean-up, when it has written some of the columns."""
    killed = """
import os, sys
from tunesmith.data import tokenstore
from tunesmith.data.datasets import open_dataset
from tunesmith.options.training import DataOptions
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
append, written = tokenstore._Column.append, []
def dying(self, values):
    written.append(1)
    append(self, values)
    self.file.flush()
    if len(written) == 4:
        os._exit(9)
tokenstore._Column.append = dying
tokenise(open_dataset(DataOptions(name=sys.argv[1])), "train", Tokenizer.gpt2())
"""
    done = subprocess.run([sys.executable, "-c", killed, str(file)], capture_output=True, timeout=HANGS)
    assert done.returncode == 9, done.stderr
    assert list(cache.rglob("*.npy")), "it was killed in the middle of writing"
    store = read(file, tokenizer)
    assert len(store) == 29
    assert tokenizer.decode(store.row(28, "all")[0]).endswith("a a a ")
    assert same(store, read(file, tokenizer))


def test_a_cache_with_a_missing_or_damaged_file_is_made_again(file, tokenizer, cache):
    """As a power cut may leave it."""
    whole = read(file, tokenizer)
    names = sorted(p.name for p in cache.rglob("*") if p.is_file())
    assert len(names) == 7
    for name in names:
        for kept in (None, 0, 40, -1):
            (victim,) = cache.rglob(name)
            data = victim.read_bytes()
            victim.unlink()
            if kept is not None:
                victim.write_bytes(data[:kept])
            assert same(whole, read(file, tokenizer)), f"{name}, kept {kept}"
    assert isinstance(read(file, tokenizer).tokens, np.memmap)


# ---- large files ---------------------------------------------------------------------------------------------------


def plain_store(rows, tokenizer):
    """The columns as they were made before, in memory and a row at a time; kept as the reference."""
    plain = [marked(segments, tokenizer) for row in rows for segments in stored_rows(row.value, tokenizer.template)]
    flags = np.array([flag for _, flags in plain for flag in flags], np.uint8)
    ids = [i for ids, _ in plain for i in ids]
    offsets = np.cumsum([0, *(len(ids) for ids, _ in plain)])
    targets = [np.count_nonzero(flags) for _, flags in plain]
    return {
        "tokens": np.array(ids, np.uint16), "flags": flags, "offsets": offsets.astype(np.int64),
        "taught": np.array(targets, np.int32), "plain": np.array([isinstance(row.value, Text) for row in rows]),
        "places": np.array([(row.file, row.line) for row in rows], np.int32),
    }  # fmt: skip


ODD = [
    "\n\nHuman: hi\n\nAssistant:",
    "tea\u2019s caf\u00e9",
    "  two  spaces ",
    "\t",
    "\u4e16\u754c",
    "7,000 \u00b2",
    "<|endoftext|>",
]


def mixed_rows(count):
    """Dialogues and texts of the sample data's words, some with odd white space, letters beyond ASCII, empty answers."""
    rng = random.Random(3)
    words = SAMPLE_ROWS.read_text(encoding="utf-8").split()
    for i in range(count):
        parts = [" ".join(rng.choices(words, k=rng.randint(1, 60))) + rng.choice(["", "", *ODD]) for _ in range(4)]
        if i % 11 == 0:
            yield {"text": parts[0]}
        else:
            turns = [{"role": ("user", "assistant")[n % 2], "content": p} for n, p in enumerate(parts)]
            yield {
                "messages": turns[: 4 if i % 3 else 2] if i % 50 else [*turns[:3], {"role": "assistant", "content": ""}]
            }


def test_2000_rows_in_many_blocks_are_byte_for_byte_the_plain_store(tmp_path, tokenizer, cache, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed_rows(2000)), encoding="utf-8")
    monkeypatch.setattr(tokenstore, "CHARACTERS_AT_A_TIME", 30_000)
    store = read(path, tokenizer)
    rows = list(open_dataset(DataOptions(name=str(path))).rows("train", Report()))
    for name, expected in plain_store(rows, tokenizer).items():
        file = io.BytesIO()
        np.save(file, expected)
        assert Path(getattr(store, name).filename).read_bytes() == file.getvalue(), name


LARGE = """
import sys
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.options.training import DataOptions, SFTConfig, TrainOptions
from tunesmith.train.splits import in_batches, load_splits
peak = lambda: next(int(x.split()[1]) / 1024 for x in open("/proc/self/status") if x.startswith("VmHWM"))
config = SFTConfig(data=DataOptions(name=sys.argv[1], block_size=1024), train=TrainOptions(precision="fp32"))
before, tokenizer = peak(), Tokenizer.gpt2()
train = in_batches(load_splits(config.data, tokenizer), config).train
train[0]
print(len(train.rows.store), before, peak())
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_300_mb_of_rows_are_tokenised_in_bounded_memory(tmp_path):
    """300 MB take less than a third of it beyond the imports, stored tokens where they are mapped included.

    A fifth of the rows is text of the usual kind; the others are lines of signs, which cost little time.
    """
    path, rng = tmp_path / "large.jsonl", random.Random(0)
    words = SAMPLE_ROWS.read_text(encoding="utf-8").split()
    answers = [" ".join(rng.choices(words, k=1000)) for _ in range(20)] + [f"{'=' * 64}\n" * 95] * 80
    rows = 0
    with path.open("w") as file:
        while file.tell() < 300e6:
            messages = [{"role": "user", "content": f"q {rows}"}, {"role": "assistant", "content": rng.choice(answers)}]
            file.write(json.dumps({"messages": messages}) + "\n")
            rows += 1
    done = subprocess.run([sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True, check=True)
    stored, before, peak = map(float, done.stdout.split())
    assert stored == rows
    assert peak - before < 100, "MB"
