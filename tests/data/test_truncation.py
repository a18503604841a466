"""Rows that are too long: what each rule keeps, what it costs, and that every cut is told with its place."""

import dataclasses
import json

import pytest

from tunesmith.data.cutting import cut_rows
from tunesmith.data.datasets import open_dataset
from tunesmith.data.encoding import IGNORE_INDEX
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.texts import text_rows
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UserError
from tunesmith.options.training import DataOptions

BLOCK = 40


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    """Line 1 fits, line 2 is a long dialogue with two answers, line 3 is a long plain text, line 4 is a long question."""

    def turns(*contents):
        return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]

    rows = [
        {"messages": turns("hi", "hello")},
        {"messages": turns("one " * 20, "two " * 20, "three " * 20, "four " * 20)},
        {"text": "plain " * 100},
        {"messages": turns("why " * 60, "so")},
    ]
    file = tmp_path_factory.mktemp("rows") / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenise(open_dataset(DataOptions(name=str(file))), "train", tokenizer)


def cut(store, rule, rows=(0, 1, 2, 3)):
    pieces, notes = cut_rows(store, rows, BLOCK, rule)
    return [(p.row, p.start, p.stop) for p in pieces], {note.rule: note for note in notes}


def ends(store, row, start=0, stop=None):
    targets = store.row(row, "assistant", start, stop)[1]
    return int((targets == store.end_of_text).sum())


def test_what_fits_is_not_touched(store):
    n = int(store.lengths[0])
    for rule in ("auto", "keep_end", "keep_start", "split", "drop"):
        assert cut(store, rule, [0]) == ([(0, 0, n)], {})
    pieces, notes = cut_rows(store, [0], n, "drop")
    assert (len(pieces), notes) == (1, []), "exactly block_size tokens fit"


def test_keep_end_keeps_the_last_answer_and_its_end(store):
    n = int(store.lengths[1])
    pieces, notes = cut(store, "keep_end", [1])
    assert pieces == [(1, n - BLOCK, n)]
    assert ends(store, 1) == 2
    assert ends(store, 1, n - BLOCK, n) == 1
    note = notes["keep_end"]
    assert (note.cut, note.tokens_lost, note.ends_lost) == (1, n - BLOCK, 1)


def test_keep_start_keeps_the_beginning_and_counts_the_lost_ends(store):
    n = int(store.lengths[1])
    pieces, notes = cut(store, "keep_start", [1])
    assert pieces == [(1, 0, BLOCK)]
    note = notes["keep_start"]
    assert (note.cut, note.tokens_lost, note.ends_lost) == (1, n - BLOCK, 2)


def test_split_loses_nothing(store):
    n = int(store.lengths[2])
    pieces, notes = cut(store, "split", [2])
    assert pieces == [(2, a, min(a + BLOCK, n)) for a in range(0, n, BLOCK)]
    assert len(pieces) > 2
    assert (notes["split"].cut, notes["split"].tokens_lost, notes["split"].ends_lost) == (1, 0, 0)


def test_drop_leaves_the_row_out(store):
    pieces, notes = cut(store, "drop")
    assert [row for row, _, _ in pieces] == [0]
    assert notes["drop"].cut == 3
    assert notes["drop"].tokens_lost == int(store.lengths[1:].sum())
    assert notes["drop"].ends_lost == 2 + 1 + 1


def test_auto_keeps_the_end_of_dialogues_and_splits_plain_text(store):
    pieces, notes = cut(store, "auto")
    one_by_one = [cut(store, rule, [row])[0] for row, rule in enumerate(("drop", "keep_end", "split", "keep_end"))]
    assert pieces == [piece for found in one_by_one for piece in found]
    assert (notes["keep_end"].cut, notes["split"].cut) == (2, 1)


@pytest.mark.parametrize(
    ("rule", "what"),
    [("keep_end", "lost their beginning"), ("keep_start", "lost their end"), ("split", "were split"), ("drop", "were dropped")],
)  # fmt: skip
def test_every_cut_is_told_with_count_place_and_length(store, rule, what):
    (note,) = cut(store, rule)[1].values()
    (line,) = note.lines(BLOCK)
    assert line.startswith(f"3 longer than block_size {BLOCK} {what}")
    for row in (1, 2, 3):
        assert f"long.jsonl:{row + 1} with {int(store.lengths[row]):,}" in line
    assert (f"{note.tokens_lost:,} tokens" in line) == (rule != "split")


@pytest.mark.parametrize("rule", ["auto", "keep_end", "keep_start", "split", "drop"])
def test_batches_hold_what_the_rule_left_with_the_targets_of_the_whole_row(store, rule):
    """A piece's targets are those of its stretch of the row: also the one after its last token."""
    layout = BatchLayout("padded", BLOCK, batch_size=1, loss_on="all", truncation=rule, shuffle=False)
    batches = Batches(text_rows(store, range(4), layout))
    pieces = cut(store, rule)[0]
    assert batches.rows_per_epoch == len(pieces)
    for (row, start, stop), batch in zip(pieces, batches.fixed(), strict=True):
        tokens, targets = store.row(row, "all")
        assert batch.input_ids[0, : stop - start].tolist() == tokens[start:stop].tolist()
        assert batch.targets.tolist() == targets[start:stop].tolist()
    assert batches.rows.cut_lines()


def test_pieces_without_a_target_take_no_room(store):
    """The long question, cut at its beginning, has no answer left: nothing to learn, so it is not in a batch."""
    layout = BatchLayout("padded", BLOCK, batch_size=1, loss_on="assistant", truncation="keep_start", shuffle=False)
    assert [b.sources for b in Batches(text_rows(store, [0, 3], layout)).fixed()] == [(0,)]
    assert len(list(Batches(text_rows(store, [0, 3], dataclasses.replace(layout, loss_on="all"))).fixed())) == 2
    lost = r"is left to learn from: 1 longer than block_size \d+ lost their end .*long.jsonl:4.*; 1 have no target at block_size"
    with pytest.raises(UserError, match=lost):
        text_rows(store, [3], layout)
    dropped = r"is left to learn from: 1 longer than block_size \d+ were dropped .*: long.jsonl:4 with \d+$"
    with pytest.raises(UserError, match=dropped):
        text_rows(store, [3], dataclasses.replace(layout, truncation="drop"))
    assert (store.row(3, "assistant", 0, BLOCK)[1] == IGNORE_INDEX).all()
