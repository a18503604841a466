"""Packing, windows and padding: every token where it belongs, every row once an epoch, every batch repeatable."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import Message
from tunesmith.data.encoding import IGNORE_INDEX
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.hh_template import HH
from tunesmith.data.packing import pack
from tunesmith.data.texts import Stream, text_rows
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UserError
from tunesmith.options.training import DataOptions

WORDS = ["tea", " the", " of", "Blue", " 7", "!", " forge", "\n", " é", " anvil", " well", " no"]


def text(rng, n):
    return "".join(rng.choice(WORDS, n))


@pytest.fixture(scope="module")
def rows():
    """60 dialogues of one to three exchanges, 5 to some 150 tokens; each has its own first word, so all differ."""
    rng = np.random.default_rng(0)
    return [
        [Message(role, f"{i} {text(rng, rng.integers(1, 25))}") for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")]
        for i in range(60)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def store(rows, tokenizer, tmp_path_factory):
    return store_of([{"messages": [vars(m) for m in row]} for row in rows], tokenizer, tmp_path_factory)


def store_of(rows, tokenizer, tmp_path_factory, form="dialogues"):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tokenise(open_dataset(DataOptions(name=str(file))), "train", tokenizer, form=form)


def batches_of(store, rows=None, **changes):
    options = {"batching": "packed", "block_size": 256, "batch_size": 2, "loss_on": "assistant", "seed": 1}
    return Batches(text_rows(store, range(len(store)) if rows is None else rows, BatchLayout(**(options | changes))))


def dense_targets(batch):
    """(B, T) targets, IGNORE_INDEX where there is none."""
    dense = torch.full((batch.input_ids.numel(),), IGNORE_INDEX)
    dense[batch.rows] = batch.targets
    return dense.view(batch.input_ids.shape)


def documents_of(batch):
    """(row, tokens, targets, positions) of every stretch, cut at the stored lengths."""
    found, flat = [], 0
    width = batch.input_ids.shape[1]
    ids, targets, positions = (t.flatten() for t in (batch.input_ids, dense_targets(batch), batch.documents.positions))
    for length in batch.documents.lengths:
        cut = slice(flat, flat + length)
        assert flat // width == (flat + length - 1) // width, "no stretch crosses the end of a batch row"
        found.append((flat // width, ids[cut].tolist(), targets[cut].tolist(), positions[cut].tolist()))
        flat += length
    assert flat == batch.input_ids.numel()
    return found


def plain_rows(rows, tokenizer, loss_on="assistant"):
    """What each dialogue should be, reconstructed slowly from its segments: tokens -> targets."""
    expected = {}
    for row in rows:
        ids, teaches = [], []
        for piece in HH.segments(row, False):
            ids += tokenizer.encode(piece.text)
            teaches += [piece.loss] * (len(ids) - len(teaches))
        following, next_teaches = [*ids[1:], tokenizer.end_of_text], [*teaches[1:], False]
        targets = [
            following[t] if loss_on == "all" or next_teaches[t]
            else tokenizer.end_of_text if teaches[t]
            else IGNORE_INDEX
            for t in range(len(ids))
        ]  # fmt: skip
        expected[tuple(ids)] = targets
    return expected


# ---- the packer ----------------------------------------------------------------------------------------------------


def first_fit_decreasing(lengths, size):
    rooms = []
    for n in sorted(lengths, reverse=True):
        for i, room in enumerate(rooms):
            if room >= n:
                rooms[i] -= n
                break
        else:
            rooms.append(size - n)
    return len(rooms)


@settings(max_examples=300)
@given(data=st.data(), size=st.integers(1, 120))
def test_pack_puts_every_item_in_one_bin_and_none_is_too_full(data, size):
    lengths = data.draw(st.lists(st.integers(1, size), max_size=60))
    bins = pack(lengths, size)
    assert sorted(i for group in bins for i in group) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in group) for group in bins)
    assert all(0 < n <= size for n in filled)
    assert len(bins) < 2 or filled[0] + filled[1] > size, "no two bins would go into one"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", ["flat", "short", "halves"])
def test_pack_needs_no_more_bins_than_first_fit_decreasing(seed, shape):
    """On lists as long as real ones; of tiny ones, one in 40,000 packs worse by a bin (and one in 4,000 better)."""
    rng = np.random.default_rng(seed)
    lengths = {
        "flat": rng.integers(1, 1025, 400),
        "short": np.minimum(rng.lognormal(4.7, 0.8, 1500), 1024).astype(int).clip(1),
        "halves": rng.integers(300, 700, 300),
    }[shape].tolist()
    assert len(pack(lengths, 1024)) <= first_fit_decreasing(lengths, 1024)


# ---- packed rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_every_dialogue_once_an_epoch_with_its_targets_and_positions(
    store, rows, tokenizer, batching, loss_on, batch_size
):
    """Read back from the batches alone; three epochs, each of which ends with a batch of what is left."""
    batches = batches_of(store, batching=batching, loss_on=loss_on, batch_size=batch_size)
    expected = plain_rows(rows, tokenizer, loss_on)
    assert len(expected) == len(rows)
    seen, epochs = Counter(), 3
    per_epoch = batches.per_epoch
    assert per_epoch == -(-batches.rows_per_epoch // batch_size)
    stretches = []  # documents by batch
    for index in range(epochs * per_epoch):
        batch = batches[index]
        real = 0
        for _, ids, targets, positions in documents_of(batch):
            assert positions == list(range(len(ids)))
            if set(ids) == {tokenizer.end_of_text}:
                assert set(targets) == {IGNORE_INDEX}, "padding carries no loss"
                continue
            assert targets == expected[tuple(ids)]
            stretches.append((index, tuple(ids)))
            real += len(ids)
        assert batch.tokens == real
        assert batch.count == len(batch.targets) == int((dense_targets(batch) != IGNORE_INDEX).sum())
        assert sorted(store.lengths[list(batch.sources)].tolist()) == sorted(
            len(ids) for number, ids in stretches if number == index
        )
    for epoch in range(epochs):
        seen = Counter(ids for number, ids in stretches if number // per_epoch == epoch)
        assert seen == Counter(dict.fromkeys(expected, 1))


def test_only_the_last_batch_of_an_epoch_is_short(store):
    size = next(n for n in range(2, 7) if batches_of(store).rows_per_epoch % n)
    for batching, fill_to in (("packed", 1), ("packed", 64), ("windows", 1)):
        batches = batches_of(store, batching=batching, loss_on="all", batch_size=size, fill_to=fill_to)
        rows = [len(batches[i].input_ids) for i in range(2 * -(-batches.rows_per_epoch // size))]
        left = batches.rows_per_epoch % size if (batching, fill_to) == ("packed", 1) else size
        assert rows == 2 * [*[size] * (batches.rows_per_epoch // size), left][: len(rows) // 2]
    few = batches_of(store, batch_size=1000, fill_to=64)
    assert len(few[0].input_ids) == len(few[5].input_ids) == few.rows_per_epoch, "no more empty rows than there are"


def test_a_batch_is_the_same_whenever_it_is_asked_for(store):
    """So that a run resumes anywhere: out of order, twice, from a new object, across epochs."""
    for batching in ("packed", "padded", "windows"):
        options = {"batching": batching, "loss_on": "all"}
        first = batches_of(store, **options)
        forward = [first[i].input_ids for i in range(20)]
        backward = [first[i].input_ids for i in reversed(range(20))][::-1]
        fresh = batches_of(store, **options)
        assert torch.equal(fresh[17].input_ids, forward[17])
        assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_epochs_and_seeds_differ_in_order_and_company(store):
    batches = batches_of(store, batch_size=1)
    per_epoch = batches.rows_per_epoch
    first, second = ([batches[e * per_epoch + i].sources for i in range(per_epoch)] for e in (0, 1))
    other = [batches_of(store, batch_size=1, seed=2)[i].sources for i in range(per_epoch)]
    assert first != second
    assert {frozenset(s) for s in first} != {frozenset(s) for s in second}, "dialogues meet other neighbours"
    assert first != other


def test_only_the_rows_asked_for_are_used(store):
    batches = batches_of(store, rows=[3, 5, 8], batching="padded", batch_size=1)
    assert sorted(batches[i].sources[0] for i in range(3)) == [3, 5, 8]


def test_fixed_batches_hold_every_row_once_and_are_always_the_same(store):
    batches = batches_of(store, batch_size=4)
    once, again = list(batches.fixed()), list(batches.fixed())
    assert sorted(s for b in once for s in b.sources) == list(range(len(store)))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(once, again, strict=True))
    assert len(list(batches.fixed(2))) == 2
    still = batches_of(store, batching="padded", batch_size=1, shuffle=False)
    assert [b.sources[0] for b in still.fixed()] == list(range(len(store)))


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_short_last_batch_gets_empty_rows_where_shapes_are_steady(store, batching):
    size = next(n for n in range(7, 1, -1) if batches_of(store, batching=batching).rows_per_epoch % n)
    plain, steady = (batches_of(store, batching=batching, batch_size=size, fill_to=n) for n in (1, 64))
    *_, short = plain.fixed()
    *_, filled = steady.fixed()
    assert len(short.input_ids) < len(filled.input_ids) == size
    assert (filled.count, filled.tokens, filled.sources) == (short.count, short.tokens, short.sources)
    assert torch.equal(filled.input_ids[: len(short.input_ids)], short.input_ids)
    assert torch.equal(filled.rows[: filled.count], short.rows)
    assert sum(filled.documents.lengths) == filled.input_ids.numel()


# ---- padded rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [100, 256, 300, 1024])
def test_padded_widths_are_multiples_of_128_at_most_block_size(store, block_size):
    batches = batches_of(store, batching="padded", block_size=block_size, batch_size=2)
    widths = set()
    for batch in islice(batches.fixed(), 30):
        longest = min(block_size, max(store.lengths[list(batch.sources)]))
        width = batch.input_ids.shape[1]
        assert width == min(block_size, 128 * -(-longest // 128))
        widths.add(width)
    assert block_size <= 128 or len(widths) > 1, "both a short and a longer batch occur"


# ---- random windows ------------------------------------------------------------------------------------------------


def test_windows_are_slices_of_the_stream_with_ends_shifted_by_one(rows, tokenizer, tmp_path_factory):
    """The paper: texts joined by <|endoftext|>, a random slice, target = the slice one further; loss on all tokens."""
    documents = [{"messages": [vars(m) for m in row]} for row in rows]
    store = store_of(documents, tokenizer, tmp_path_factory, form="texts")
    stream = []
    for row in rows:
        stream += [*tokenizer.encode(HH.text(row)), tokenizer.end_of_text]
    spelled = ",".join(map(str, stream))
    batches = batches_of(store, batching="windows", loss_on="auto", block_size=64, batch_size=3)
    starts = set()
    for index in range(40):
        batch = batches[index]
        assert batch.documents is None, "attention runs through the whole window"
        assert batch.tokens == batch.count == 3 * 64
        for inputs, targets in zip(batch.input_ids, dense_targets(batch), strict=True):
            window = [*inputs.tolist(), int(targets[-1])]
            assert targets.tolist() == window[1:]
            at = f",{spelled},".find("," + ",".join(map(str, window)) + ",")
            assert at >= 0, "a slice of the stream"
            starts.add(at)
    assert len(starts) > 100, "random places"


def test_windows_keep_rows_whose_last_answer_is_empty(tokenizer, tmp_path_factory):
    rows = [
        {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": answer}]}
        for i, (name, answer) in enumerate([("full", "yes"), ("bare", ""), ("blank", " \n"), ("full", "no")])
    ]
    texts = store_of(rows, tokenizer, tmp_path_factory, "texts")
    read = tokenizer.decode(Stream(texts, np.arange(len(texts))).part(0, len(texts.tokens) + len(texts)).tolist())
    assert all(f"Human: {name}" in read for name in ("full 0", "bare 1", "blank 2", "full 3"))
    assert (texts.report.used, texts.report.bad) == (4, {})
    assert store_of(rows, tokenizer, tmp_path_factory).report.bad == {"empty answer": 2}


def test_windows_reach_both_ends_of_the_stream(tokenizer, tmp_path_factory):
    store = store_of([{"text": "a b c d e f"}], tokenizer, tmp_path_factory, form="texts")
    batches = batches_of(store, batching="windows", loss_on="all", block_size=4, batch_size=1)
    seen = {tuple(batches[i].input_ids[0].tolist()) for i in range(50)}
    stream = [*tokenizer.encode("a b c d e f"), tokenizer.end_of_text]
    assert seen == {tuple(stream[a : a + 4]) for a in range(3)}


def test_windows_refuse_what_they_cannot_do(store):
    with pytest.raises(UserError, match=r"loss on all tokens; use packed"):
        batches_of(store, batching="windows", loss_on="assistant")
    with pytest.raises(UserError, match=r"too few for windows of 100,000; lower --data\.block_size"):
        batches_of(store, batching="windows", loss_on="all", block_size=100_000)
