"""Preference pairs as tokens and batches: each prompt once, each answer whole, every pair once an epoch, every cut told."""

import dataclasses
import gzip
import json
from collections import Counter

import numpy as np
import pytest
import torch

from made_pairs import PAIRS, SHAPES, batches_of, random_pairs, read_back, whole
from tunesmith.data.datasets import open_dataset
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.hh_template import HH, parse_transcript
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UserError
from tunesmith.options.training import PairDataOptions
from tunesmith.train.splits import load_splits

ODD = [  # (prompt, chosen, rejected) as HH writes them: with white space, line breaks or no space where others have one
    ("\n\nHuman: hi\n\nAssistant:", "no space", " a space"),
    ("\n\nHuman:hi\n\nAssistant:", "  two spaces", " trailing \n"),
    ("\n\nHuman: a\n\nAssistant: \n b \n\n\nHuman:  c\n\nAssistant:", "\n\nlines first", " ünïcode 漢字 🙂 "),
    ("\n\nHuman: a\n\nAssistant:b\n\nHuman: c \n\nAssistant:", " Human: Assistant:", " <|endoftext|>"),
    ("\n\nHuman: a\n\nAssistant: b\n\nAssistant:", " 1,000.50", "\tx\u2028y\x85z"),
]


# ---- text to tokens ------------------------------------------------------------------------------------------------


def write(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def swapped(rows):
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def odd_rows():
    return [{"chosen": p + c, "rejected": p + r} for p, c, r in ODD] + [
        {"prompt": " What? ", "chosen": " Tea. ", "rejected": "tea"},
        {"prompt": "What?", "chosen": "Tea", "rejected": "Tea "},
    ]


def stored(path, tokenizer, form):
    return tokenise(open_dataset(PairDataOptions(name=str(path))), "train", tokenizer, form=form)


def assert_tokens_are_those_of_the_dialogues(rows, tokenizer, tmp_path) -> int:
    """Each answer against its dialogue in the form `dialogues`, tokens and targets; `chosen` is the column read there."""
    pairs = PairStore(stored(write(tmp_path / "pairs.jsonl", rows), tokenizer, "pairs"))
    for which, own in enumerate((rows, swapped(rows)), 1):
        dialogues = stored(write(tmp_path / f"{which}.jsonl", own), tokenizer, "dialogues")
        row_at = {line: i for i, (_, line) in enumerate(dialogues.places.tolist())}
        for i in range(len(pairs)):
            prompt, answer = pairs.tokens(i)[0], pairs.tokens(i)[which]
            tokens, targets = dialogues.row(row_at[int(pairs.place(i).rpartition(":")[2])], "assistant")
            assert np.concatenate([prompt, answer]).tolist() == tokens.tolist()
            assert [*answer.tolist(), tokenizer.end_of_text] == targets[len(prompt) - 1 :].tolist()
            assert pairs.lengths[i, [0, which]].tolist() == [len(prompt), len(answer)]
    return len(pairs)


def test_tokens_of_odd_rows_are_those_of_the_same_dialogues(tokenizer, tmp_path):
    assert assert_tokens_are_those_of_the_dialogues(odd_rows(), tokenizer, tmp_path) == len(odd_rows())


def test_tokens_of_the_sample_are_those_of_the_same_dialogues(tokenizer, tmp_path):
    (file,) = open_dataset(PairDataOptions(name="sample")).files["train"]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert assert_tokens_are_those_of_the_dialogues(rows, tokenizer, tmp_path) == len(rows) == 480


def test_tokens_of_every_hh_row_are_those_of_the_same_dialogues(shared_data, tokenizer, tmp_path):
    rows = [row for split in ("train", "test") for row in hh_rows(shared_data, split)]
    assert assert_tokens_are_those_of_the_dialogues(rows, tokenizer, tmp_path) > 0.99 * len(rows) > 1400


def test_odd_rows_are_encoded_piece_by_piece_and_decode_to_their_texts(tokenizer, tmp_path):
    """The prompt as it would be read before an answer, the answers and their ends as targets: decoded, the very texts."""
    store = stored(write(tmp_path / "odd.jsonl", odd_rows()[: len(ODD)]), tokenizer, "pairs")
    batches = Batches(PairRows(PairStore(store), range(len(ODD)), BatchLayout("padded", 128, batch_size=1)))
    decoded = set()
    for batch in batches.fixed():
        assert tokenizer.end_of_text not in batch.input_ids, "only ever a target"
        ((prompt, *answers),) = read_back(batch)
        text, *_ = ODD[batch.sources[0]]
        pieces = [piece.text for piece in HH.segments(parse_transcript(text + "x").messages, False)[:-1]]
        assert prompt == [i for piece in pieces for i in tokenizer.encode(piece)]
        assert [targets[-1] for _, targets in answers] == [tokenizer.end_of_text] * 2
        decoded.add((tokenizer.decode(prompt), *(tokenizer.decode(targets[:-1]) for _, targets in answers)))
    assert decoded == set(ODD)


# ---- rows that are no pairs ----------------------------------------------------------------------------------------

HH_TEXT = "\n\nHuman: a\n\nAssistant: b"
GOOD = {"prompt": "What?", "chosen": "Tea.", "rejected": "No."}
BAD = [
    ({"chosen": HH_TEXT, "rejected": "\n\nHuman: x\n\nAssistant: c"}, "the prompts of chosen and rejected differ"),
    ({"chosen": HH_TEXT, "rejected": "\n\nHuman: a \n\nAssistant: c"}, "the prompts of chosen and rejected differ"),
    ({**GOOD, "chosen": " \n"}, "empty chosen answer"),
    ({**GOOD, "rejected": ""}, "empty rejected answer"),
    ({**GOOD, "rejected": "Tea."}, "chosen and rejected are the same"),
    ({"chosen": HH_TEXT + "\n\nHuman: c", "rejected": HH_TEXT}, "chosen does not end with an answer"),
    ({"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"}, "no prompt before the answers"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "no pair (columns chosen and rejected)"),
    ({"chosen": HH_TEXT, "rejected": None}, "no pair (columns chosen and rejected)"),
]  # fmt: skip


def test_every_row_that_is_no_pair_is_counted_by_reason_with_its_place_and_strict_refuses(tokenizer, tmp_path):
    rows = [GOOD, *(row for row, _ in BAD), {**GOOD, "prompt": "Why?"}]
    options = PairDataOptions(name=str(write(tmp_path / "rows.jsonl", rows)), holdout=0.5)
    store = stored(options.name, tokenizer, "pairs")
    assert [PairStore(store).place(i) for i in range(2)] == ["rows.jsonl:1", f"rows.jsonl:{len(rows)}"]
    assert (store.report.rows, store.report.used) == (len(rows), 2)
    reasons = [reason for _, reason in BAD]
    assert store.report.bad == Counter(reasons)
    for reason in set(reasons):
        places = [f"rows.jsonl:{i}" for i, (_, why) in enumerate(BAD, 2) if why == reason]
        assert store.report.places[reason] == places
        (line,) = (line for line in load_splits(options, tokenizer, pairs=True).notes if reason in line)
        assert line == f"train: {len(places)} skipped: {reason} ({', '.join(places)})"
    with pytest.raises(UserError, match=r"--data\.strict: .*prompts of chosen and rejected differ.*rows\.jsonl:2"):
        load_splits(dataclasses.replace(options, strict=True), tokenizer, pairs=True)


def hh_rows(shared_data, split):
    with gzip.open(shared_data / "hh-rlhf" / "harmless-base" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_hh_rows_skipped_are_those_of_a_plain_count(shared_data, tokenizer):
    """Recounted on the raw text: the answer is what follows the last marker, the prompt all before."""
    counted, used = Counter(), 0
    for split in ("train", "test"):
        expected = Counter()
        rows = hh_rows(shared_data, split)
        for row in rows:
            (a, _, chosen), (b, _, rejected) = (row[key].rpartition("\n\nAssistant:") for key in ("chosen", "rejected"))
            assert "\n\nHuman:" not in chosen + rejected
            if not chosen.strip():
                expected["empty chosen answer"] += 1
            elif not rejected.strip():
                expected["empty rejected answer"] += 1
            elif a != b:
                expected["the prompts of chosen and rejected differ"] += 1
            elif chosen == rejected:
                expected["chosen and rejected are the same"] += 1
        options = PairDataOptions(name="hh:harmless-base", root=str(shared_data / "hh-rlhf"))
        store = tokenise(open_dataset(options), split, tokenizer, form="pairs")
        assert store.report.bad == expected
        assert len(PairStore(store)) == store.report.used == len(rows) - expected.total()
        counted, used = counted + expected, used + store.report.used
    assert used == 1495
    assert counted["the prompts of chosen and rejected differ"] == 1
    assert counted["empty chosen answer"] + counted["empty rejected answer"] == 4


# ---- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("steady", [False, True])
def test_every_pair_comes_whole_once_an_epoch_with_its_targets(batching, batch_size, steady):
    """Three epochs, each of which ends with a batch of what is left."""
    batches = batches_of(batching=batching, batch_size=batch_size, steady=steady)
    seen = []
    for index in range(3 * batches.per_epoch):
        batch = batches[index]
        assert batch.pairs == batch.sources
        assert batch.count == len(batch.pairs)
        assert read_back(batch) == [whole(PAIRS[i]) for i in batch.pairs]
        assert batch.tokens == sum(sum(SHAPES[i]) for i in batch.pairs)
        seen += batch.pairs
    for epoch in range(3):
        assert sorted(seen[epoch * len(PAIRS) : (epoch + 1) * len(PAIRS)]) == list(range(len(PAIRS)))


def test_a_packed_row_holds_as_many_pairs_as_fit_and_a_longer_pair_a_row_of_its_own():
    """A pair may have up to twice block_size tokens: only prompt + answer is bounded."""
    pairs = [*PAIRS, *random_pairs([(10, 50, 54), (60, 4, 3), (2, 62, 62)], seed=1)]
    batches = batches_of(pairs, batch_size=1)
    groups = [batch.pairs for batch in batches.fixed()]
    tokens = {group: sum(sum(map(len, pairs[i])) for i in group) for group in groups}
    assert all(n <= 64 or len(group) == 1 for group, n in tokens.items())
    assert {group for group, n in tokens.items() if n > 64} >= {(60,), (61,), (62,)}
    assert batches.rows_per_epoch == len(groups) < len(pairs) / 1.3
    a, b = sorted(tokens.values())[:2]
    assert a + b > 64, "no two rows would go into one"


def test_a_padded_row_is_one_pair():
    batches = batches_of(batching="padded", batch_size=4)
    assert batches.rows_per_epoch == len(PAIRS)
    assert len(PAIRS) % 4 == 0
    assert {batches[i].count for i in range(40)} == {4}


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_batch_is_the_same_whenever_it_is_asked_for(batching):
    first, fresh = batches_of(batching=batching), batches_of(batching=batching)
    forward = [first[i] for i in range(90)]
    for i in (89, 3, 50, 0):
        for again in (first[i], fresh[i]):
            assert torch.equal(again.input_ids, forward[i].input_ids)
            assert again.pairs == forward[i].pairs


def test_epochs_and_seeds_differ_in_order_and_company():
    batches = batches_of(batch_size=1)
    rows = batches.rows_per_epoch
    first, second = ([batches[e * rows + i].pairs for i in range(rows)] for e in (0, 1))
    other = [batches_of(batch_size=1, seed=2)[i].pairs for i in range(rows)]
    assert first != second
    assert {frozenset(p) for p in first} != {frozenset(p) for p in second}
    assert first != other


def test_only_the_rows_asked_for_are_used_and_numbered_from_nought():
    batches = batches_of(rows=[3, 5, 8], batching="padded", batch_size=1)
    found = {batch.pairs[0]: batch.sources[0] for batch in batches.fixed()}
    assert found == {0: 3, 1: 5, 2: 8}
    assert len(batches.rows) == 3


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_fixed_batches_hold_each_pair_once_and_used_names_the_pairs_of_the_first_batches(batching):
    batches = batches_of(batching=batching, batch_size=4)
    once, again = list(batches.fixed()), list(batches.fixed())
    assert sorted(i for b in once for i in b.pairs) == list(range(len(PAIRS)))
    assert [b.pairs for b in once] == [b.pairs for b in again]
    assert [b.pairs for b in batches.fixed(2)] == [b.pairs for b in once[:2]]
    for n in (1, 3, len(once), len(once) + 1, 1000):
        drawn = {i for k in range(min(n, 100)) for i in batches[k].pairs}
        shown = {i for b in batches.fixed(n) for i in b.pairs}
        used = batches.rows.used(n)
        assert drawn | shown <= set(used)
        assert used == sorted(used)
        assert len(used) == (len(drawn) if n < len(once) else len(PAIRS)), "no more than needed"


def test_batches_of_some_pairs_hold_just_these_in_about_as_many_tokens():
    wanted = [7, 3, 50, 22, 41, 40, 39]
    batches = batches_of()
    found = list(batches.rows.of(wanted, 100))
    assert sorted(i for b in found for i in b.pairs) == sorted(wanted)
    assert all(read_back(b) == [whole(PAIRS[i]) for i in b.pairs] for b in found)
    assert max(b.tokens for b in found) <= 100
    assert len(found) < len(wanted)


@pytest.mark.parametrize(("batching", "most"), [("packed", 2), ("padded", 4)])
def test_steady_batches_have_few_shapes(batching, most):
    loose, steady = (batches_of(batching=batching, batch_size=3, steady=on) for on in (False, True))
    numbers = range(2 * steady.rows_per_epoch // 3)
    widths = {steady[i].input_ids.shape for i in numbers}
    assert len(widths) <= most < len({loose[i].input_ids.shape for i in numbers})
    assert {len(steady[i].targets) % 64 for i in numbers} == {0}
    assert {len(steady[i].rows) - len(steady[i].targets) for i in numbers} == {0}
    assert {n for i in numbers for n in steady[i].documents.lengths if n > 64} == set(), "filler fits the positions too"


def test_the_share_of_longer_chosen_answers_counts_equal_ones_half():
    batches = batches_of(random_pairs([(2, 3, 1), (2, 1, 3), (2, 2, 2), (2, 5, 4)]), block_size=64)
    assert [batches.rows.longer_chosen(n) for n in ([0], [1], [2], [0, 1, 2, 3])] == [1.0, 0.0, 0.5, 0.625]


def test_pairs_of_one_prompt_are_counted_as_one_prompt_also_where_it_was_cut():
    long = [*range(1, 81)]
    other = [99, *long[1:]]  # differs only in what a block of 64 cuts off
    batches = batches_of(
        [(long, [1], [2]), (long, [3], [4]), (other, [1], [2]), (long[:79], [80, 1], [2])], block_size=64
    )
    assert [batches.rows.different_prompts(n) for n in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3])] == [1, 1, 2, 3]
