"""The token cache: read back as memory maps, keyed by content, and never a reason to stop or to train on half of it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tunesmith.data import tokenstore
from tunesmith.data.datasets import open_dataset
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.options.training import DataOptions

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
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "flags", "offsets", "plain", "places"))


def counting_encoder(monkeypatch):
    """How often a batch of texts was really encoded."""
    calls = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: calls.append(1) or encode(self, texts))
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


def test_a_full_disk_leaves_no_half_cache(file, tokenizer, cache, monkeypatch):
    save = np.save

    def full(path, array):
        save(path, array[: len(array) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenstore.np, "save", full)
        whole = read(file, tokenizer)
    assert len(whole) == 29
    assert [p for p in cache.rglob("*") if p.is_file()] == []
    assert same(whole, read(file, tokenizer))


def test_a_cache_whose_writer_was_killed_is_not_used(file, tokenizer, cache):
    """The process dies, without any clean-up, after its second file of five."""
    killed = """
import os, sys, numpy
from tunesmith.data.datasets import open_dataset
from tunesmith.options.training import DataOptions
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
save, saved = numpy.save, []
def dying(path, array):
    saved.append(path)
    save(path, array[:3])
    if len(saved) == 2:
        os._exit(9)
numpy.save = dying
tokenise(open_dataset(DataOptions(name=sys.argv[1])), "train", Tokenizer.gpt2())
"""
    done = subprocess.run([sys.executable, "-c", killed, str(file)], capture_output=True, timeout=60)
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
    assert len(names) == 6
    for name in names:
        for kept in (None, 0, 40, -1):
            (victim,) = cache.rglob(name)
            data = victim.read_bytes()
            victim.unlink()
            if kept is not None:
                victim.write_bytes(data[:kept])
            assert same(whole, read(file, tokenizer)), f"{name}, kept {kept}"
    assert isinstance(read(file, tokenizer).tokens, np.memmap)
