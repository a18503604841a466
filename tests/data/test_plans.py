"""Which rows are cut how, and which batch holds which: as the plain version, a row at a time, has it."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import pack_plainly

from made_pairs import batches_of as pair_batches_of
from made_pairs import random_pairs
from tunesmith.data.cutting import Truncation, cut_rows
from tunesmith.data.datasets import Source
from tunesmith.data.encoding import END, NEXT
from tunesmith.data.epochs import BatchLayout
from tunesmith.data.readers import Report
from tunesmith.data.texts import TextRows, WindowRows
from tunesmith.data.tokenstore import TokenStore
from tunesmith.errors import UserError

RULES = ["auto", "keep_end", "keep_start", "split", "drop"]


def made_store(lengths, seed=0):
    """Rows of random tokens of these lengths, some plain texts, with random flags (in a third of the rows none)."""
    rng = np.random.default_rng(seed)
    offsets = np.append(0, np.cumsum(np.asarray(lengths, np.int64)))
    flags = rng.choice(np.array([0, 0, 0, NEXT, END, NEXT | END], np.uint8), offsets[-1])
    for a, b in list(pairwise(offsets.tolist()))[::3]:
        flags[a:b] = 0
    taught = [np.count_nonzero(flags[a:b] & NEXT) + np.count_nonzero(flags[a:b] & END) for a, b in pairwise(offsets)]
    places = np.array([(0, i + 1) for i in range(len(lengths))], np.int32)
    source = Source("made", "rows", {"train": (Path("made.jsonl"),)})
    return TokenStore(
        tokens=rng.integers(1, 500, offsets[-1]).astype(np.uint16), flags=flags, offsets=offsets,
        taught=np.array(taught, np.int32), plain=rng.random(len(lengths)) < 0.3, places=places, end_of_text=0, end_of_answer=0,
        source=source, split="train", report=Report(), fingerprint="",
    )  # fmt: skip


def cut_plainly(store, rows, block_size, rule):
    """(row, start, stop) of every piece, and what was told; a row at a time."""
    pieces, told, lengths = [], {}, store.lengths
    for row in rows:
        length = int(lengths[row])
        if length <= block_size:
            pieces.append((row, 0, length))
            continue
        how = ("split" if store.plain[row] else "keep_end") if rule == "auto" else rule
        note = told.setdefault(how, Truncation(how))
        note.cut += 1
        if len(note.places) < 3:
            note.places.append(f"{store.place(row)} with {length:,}")
        if how == "split":
            pieces += [(row, a, min(a + block_size, length)) for a in range(0, length, block_size)]
            continue
        start, stop = {"drop": (0, 0), "keep_start": (0, block_size), "keep_end": (length - block_size, length)}[how]
        note.tokens_lost += length - (stop - start)
        flags = store.flags[int(store.offsets[row]) :][:length]
        note.ends_lost += int(np.count_nonzero(flags & END) - np.count_nonzero(flags[start:stop] & END))
        if stop > start:
            pieces.append((row, start, stop))
    return pieces, list(told.values())


def plan_plainly(pieces, batching, block_size, seed, epoch, shuffle=True):
    """The rows of an epoch, each a list of pieces."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(pieces)) if shuffle else np.arange(len(pieces))
    pieces = [pieces[i] for i in order]
    if batching == "padded":
        return [[piece] for piece in pieces]
    lengths = [stop - start for _, start, stop in pieces]
    rows = [[pieces[i] for i in group] for group in pack_plainly(lengths, block_size)]
    return [rows[i] for i in rng.permutation(len(rows))] if shuffle else rows


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


@settings(max_examples=300)
@given(LENGTHS, st.sampled_from(RULES), st.integers(1, 20), st.integers(0, 9))
def test_rows_are_cut_as_plainly(lengths, rule, block_size, seed):
    store = made_store(lengths, seed)
    rows = np.random.default_rng(seed).permutation(len(lengths))
    pieces, told = cut_rows(store, rows, block_size, rule)
    plain, plain_told = cut_plainly(store, rows.tolist(), block_size, rule)
    assert [dataclasses.astuple(piece) for piece in pieces] == plain
    assert told == plain_told


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
@settings(max_examples=40)
@given(LENGTHS, st.sampled_from(RULES), st.integers(2, 20), st.integers(0, 9))
def test_batches_hold_the_same_rows_in_the_same_order_as_plainly(
    batching, loss_on, shuffle, lengths, rule, block_size, seed
):
    store = made_store(lengths, seed)
    plain = [
        piece for piece in cut_plainly(store, range(len(lengths)), block_size, rule)[0]
        if loss_on == "all" or (store.row(piece[0], "assistant", *piece[1:])[1] >= 0).any()
    ]  # fmt: skip
    layout = BatchLayout(batching, block_size, 1, loss_on, rule, seed, shuffle)
    if not plain:
        with pytest.raises(UserError, match="is left to learn from"):
            TextRows(store, range(len(lengths)), layout)
        return
    rows = TextRows(store, range(len(lengths)), layout)
    first = plan_plainly(plain, batching, block_size, seed, 0, shuffle)
    assert rows.rows_per_epoch == len(first)
    for place, row in enumerate(first):
        batch = rows.batch(0, range(place, place + 1))
        assert batch.sources == tuple(piece[0] for piece in row)
        tokens = np.concatenate([store.row(*piece[:1], loss_on, *piece[1:])[0] for piece in row])
        assert batch.input_ids[0, : len(tokens)].tolist() == tokens.tolist()
    for epoch in (1, 2):
        wanted = plan_plainly(plain, batching, block_size, seed, epoch, shuffle)
        found = [[dataclasses.astuple(rows.pieces[i]) for i in group] for group in rows.plan(epoch)]
        assert found == wanted


@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=30), st.sampled_from(["packed", "padded"]))
def test_pairs_are_grouped_as_plainly(shapes, batching):
    rows = pair_batches_of(random_pairs(shapes), batching=batching, block_size=24, batch_size=1).rows
    for epoch in range(3):
        rng = np.random.default_rng((1, epoch))
        order = rng.permutation(len(rows.pairs)).tolist()
        wanted = [[i] for i in order]
        if batching == "packed":
            groups = pack_plainly([min(len(rows.pairs[i]), 24) for i in order], 24)
            wanted = [[order[i] for i in group] for group in groups]
            wanted = [wanted[i] for i in rng.permutation(len(wanted))]
        assert [group.tolist() for group in rows.plan(epoch)] == wanted


@settings(max_examples=60)
@given(LENGTHS, st.integers(0, 9))
def test_windows_are_parts_of_the_one_long_line(lengths, seed):
    store = made_store(lengths, seed)
    rows = np.random.default_rng(seed).permutation(len(lengths))
    line = [token for row in rows for token in [*store.row(int(row), "all")[0].tolist(), 0]]
    if len(line) < 4:
        return
    windows = WindowRows(store, rows, BatchLayout("windows", block_size=3, batch_size=1))
    assert len(windows.stream) == len(line)
    for start in range(len(line)):
        for stop in range(start + 1, len(line) + 1, 7):
            assert windows.stream.part(start, stop).tolist() == line[start:stop]
