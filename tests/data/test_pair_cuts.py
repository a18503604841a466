"""Pairs that are too long: what each rule keeps of them, and that every cut is told; and what makes two pairs the same."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_pairs import END, PAIRS, batches_of, read_back, whole
from tunesmith.data.pairstore import PairStore
from tunesmith.errors import UsageError, UserError

BLOCK = 12


def cut_plainly(pair, rule):
    """(prompt, (chosen, targets), (rejected, targets)) and what was done, on lists; None where nothing is left."""
    prompt, chosen, rejected = pair
    over = max(len(prompt) + len(answer) - BLOCK for answer in (chosen, rejected))
    if over <= 0:
        return whole(pair), None
    if rule == "drop":
        return None, "too long, left out"
    if rule in ("keep_end", "auto"):
        kept = prompt[over:]
        if not kept:
            return None, "an answer leaves no room for the prompt, left out"
        return whole((kept, chosen, rejected)), "the beginning of the prompt lost"
    kept = [(prompt + answer)[:BLOCK][len(prompt) :] for answer in (chosen, rejected)]
    a, b = (
        (text, text if text != answer else [*answer, END])
        for text, answer in zip(kept, (chosen, rejected), strict=True)
    )
    return (None, "answers become identical, left out") if a == b else ((prompt, a, b), "the end of an answer lost")


FITS = ([1, 2], [3], [4, 5])
FULL = (list(range(1, 9)), [21, 22, 23, 24], [31])  # exactly block_size
LONG_PROMPT = (list(range(1, 21)), [21, 22], [31, 32, 33])
LONG_ANSWER = ([1, 2], list(range(30, 45)), [5])
FULL_ANSWER = ([1, 2], list(range(30, 42)), [5])
ALIKE = ([1, 2, 3, 4, 5, 6, 7, 8], [21, 22, 23, 24, 25], [21, 22, 23, 24, 26])
SHORTER_ALIKE = ([1, 2, 3, 4, 5, 6, 7, 8], [21, 22, 23, 24], [21, 22, 23, 24, 26])  # only the end differs
ROOM_FOR_ONE = ([1, 2, 3], list(range(30, 41)), [5])
CUTS = [FITS, FULL, LONG_PROMPT, LONG_ANSWER, FULL_ANSWER, ALIKE, SHORTER_ALIKE, ROOM_FOR_ONE]
RULES = ["auto", "keep_end", "keep_start", "drop"]


def assert_cut_as_plainly(pairs, rule):
    wanted = [cut_plainly(pair, rule) for pair in pairs]
    if not any(cut for cut, _ in wanted):
        with pytest.raises(UserError, match="is left to learn from"):
            batches_of(pairs, block_size=BLOCK, truncation=rule)
        return Counter()
    batches = batches_of(pairs, block_size=BLOCK, truncation=rule, batching="padded", batch_size=1)
    found = {batch.sources[0]: read_back(batch)[0] for batch in batches.fixed()}
    assert found == {i: cut for i, (cut, _) in enumerate(wanted) if cut}
    assert batches.rows.cuts.counts == Counter(what for _, what in wanted if what)
    for what, n in batches.rows.cuts.counts.items():
        places = [f"made.jsonl:{i + 1}" for i, (_, done) in enumerate(wanted) if done == what]
        told = f"{', '.join(places[:3])}{', ...' if n > 3 else ''}"
        assert f"{n:,} {'pair' if n == 1 else 'pairs'}: {what} at block_size 12 ({told})" in batches.rows.cuts.lines()
    assert all(max(batch.documents.positions[0]) < BLOCK for batch in batches.fixed())
    return batches.rows.cuts.counts


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_keeps_what_a_plain_cut_keeps_and_tells_counts_and_places(rule):
    counts = assert_cut_as_plainly(CUTS, rule)
    assert sum(counts.values()) == 6, "two of the pairs fit, exactly block_size tokens among them"
    assert len(counts) == {"drop": 1}.get(rule, 2)


@settings(max_examples=150, derandomize=True)
@given(rule=st.sampled_from(RULES), data=st.data())
def test_any_pairs_are_cut_as_plainly(rule, data):
    token = st.integers(1, 2)  # so few that answers often become identical
    part = st.lists(token, min_size=1, max_size=15)
    pairs = data.draw(st.lists(st.tuples(part, part, part), min_size=1, max_size=6))
    assert_cut_as_plainly(pairs, rule)


def test_splitting_and_windows_are_no_way_to_treat_pairs():
    with pytest.raises(UsageError, match=r"--data\.truncation split.*keep_end"):
        batches_of(truncation="split")
    with pytest.raises(UsageError, match=r"--data\.batching windows.*packed or padded"):
        batches_of(batching="windows")


# ---- keys ----------------------------------------------------------------------------------------------------------


def key_of(pair, other=(), end=END, **changes):
    rows = batches_of([*other, pair], **({"block_size": 64} | changes)).rows
    rows.store = PairStore(dataclasses.replace(rows.store.store, end_of_answer=end))
    return rows.key(len(other))


def test_a_key_changes_with_every_token_and_with_what_is_cut_and_with_which_ends_count():
    prompt, chosen, rejected = pair = LONG_PROMPT
    keys = [key_of(pair), key_of(pair, block_size=22), key_of(pair, block_size=21), key_of((prompt, rejected, chosen))]
    for part in range(3):
        for at in range(len(pair[part])):
            changed = [list(p) for p in pair]
            changed[part][at] += 100
            keys.append(key_of(changed))
    keys.append(key_of((prompt + chosen[:1], chosen[1:], rejected)))  # the same tokens in a row, cut elsewhere
    keys.append(key_of((prompt, chosen + rejected[:1], rejected[1:])))
    keys.append(key_of((prompt, chosen, rejected[:-1])))
    answers_cut = {"block_size": 22, "truncation": "keep_start"}
    keys.append(key_of(pair, **answers_cut))
    assert len(set(keys)) == len(keys)
    assert key_of((prompt, chosen, rejected[:2])) != key_of(pair, **answers_cut), "the same tokens, but with its end"


def test_a_key_does_not_depend_on_the_pairs_place_or_company_or_batching():
    other = {"other": PAIRS[:9], "batching": "padded", "batch_size": 5, "seed": 9, "steady": True}
    assert key_of(FULL) == key_of(FULL, **other)


def test_a_key_depends_on_the_token_that_an_end_is():
    assert key_of(FULL) != key_of(FULL, end=77)
