"""Defects planted at known rows of every form are found there and nowhere else; leaks and duplicates."""

import gzip
import json

import pytest

from planted_rows import FORM, PLANTED, UNREADABLE, audited, clean, found, spread, turns, write
from tunesmith.data.audit.rows import CHECKS, DIALOGUES, PAIRS, TEXTS
from tunesmith.data.datasets import holdout_rows


@pytest.mark.parametrize("form", PLANTED)
def test_a_clean_set_of_every_form_raises_no_alarm(tokenizer, tmp_path, form):
    rows = [clean(form, i) for i in range(40)]
    write(tmp_path / "train.jsonl", rows[:30]), write(tmp_path / "test.jsonl", rows[30:])
    result = audited(tokenizer, tmp_path)
    assert result.problems() == []
    for split, n in zip(result.splits, (30, 10), strict=True):
        expected = FORM.get(form, DIALOGUES)
        assert (split.rows, split.usable, split.forms) == (n, n, {expected: n})
        assert found(split) == {}
        assert {f.kind for f in split.findings} == {k for k, check in CHECKS.items() if expected in check.forms}


@pytest.mark.parametrize("form", PLANTED)
def test_every_planted_defect_is_found_at_its_row_and_no_other(tokenizer, tmp_path, form):
    rows, lines = spread([row for row, _ in PLANTED[form]], form)
    expected = {}
    for (_, kinds), line in zip(PLANTED[form], lines, strict=True):
        for kind in kinds:
            expected.setdefault(kind, []).append(line)
    (split,) = audited(tokenizer, write(tmp_path / "rows.jsonl", rows)).splits
    assert found(split) == expected
    assert split.rows == len(rows)


def test_every_kind_is_planted_in_every_form_where_it_can_occur():
    """Else the recall above would say little. Duplicates, pairs turned round and what a template does have their own tests."""
    planted = {
        (kind, FORM.get(form, DIALOGUES)) for form, rows in PLANTED.items() for _, kinds in rows for kind in kinds
    }
    wanted = {(kind, form) for kind, check in CHECKS.items() for form in check.forms}
    assert wanted - planted == {("duplicate", f) for f in (TEXTS, DIALOGUES, PAIRS)} | {
        ("contradiction", PAIRS),
        ("not_learned", DIALOGUES),
    }


@pytest.mark.parametrize("form", PLANTED)
def test_duplicates_are_found_whatever_their_case_and_space(tokenizer, tmp_path, form):
    rows = [clean(form, i) for i in range(20)]
    again = json.loads(json.dumps(rows[4]).replace("Question", "QUESTION").replace("about", "about "))
    extra = [rows[2], clean(form, 90), again, rows[2]]
    (split,) = audited(tokenizer, write(tmp_path / "rows.jsonl", rows + extra), holdout=0.01).splits
    assert found(split) == {"duplicate": [21, 23, 24]}
    (duplicates,) = [f for f in split.findings if f.rows]
    assert duplicates.places == (
        "rows.jsonl:21 = rows.jsonl:3",
        "rows.jsonl:23 = rows.jsonl:5",
        "rows.jsonl:24 = rows.jsonl:3",
    )


def test_a_pair_turned_round_is_told_and_another_answer_to_a_prompt_is_no_defect(tokenizer, tmp_path):
    rows = [clean("pair", i) for i in range(20)]
    rows += [
        rows[3] | {"chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]},
        rows[5] | {"chosen": "Something else."},
    ]
    (split,) = audited(tokenizer, write(tmp_path / "rows.jsonl", rows)).splits
    assert found(split) == {"contradiction": [21]}
    assert split.repeated_prompts == 1


@pytest.mark.parametrize("gzipped", [False, True])
def test_unreadable_rows_are_told_by_reason_and_place_and_the_rest_is_audited(tokenizer, tmp_path, gzipped):
    rows, lines = spread(list(UNREADABLE), "messages")
    path = write(tmp_path / "rows.jsonl", rows)
    if gzipped:
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    (split,) = audited(tokenizer, path).splits
    assert (split.rows, split.usable) == (len(rows), len(rows) - len(UNREADABLE))
    told = {f.what: (f.rows, f.places) for f in split.findings if f.rows}
    assert len(told) == len(UNREADABLE)
    for reason, line in zip(UNREADABLE.values(), lines, strict=True):
        (match,) = [v for what, v in told.items() if reason in what]
        assert match == (1, (f"{path.name}:{line}",))


def test_a_mixed_set_has_the_checks_of_all_its_forms(tokenizer, tmp_path):
    rows = [clean(form, 10 * i + j) for i, form in enumerate(("pair", "messages", "text")) for j in range(8)]
    rows += [PLANTED["pair"][2][0], PLANTED["text"][1][0], PLANTED["messages"][1][0]]
    (split,) = audited(tokenizer, write(tmp_path / "rows.jsonl", rows)).splits
    assert split.forms == {PAIRS: 9, DIALOGUES: 9, TEXTS: 9}
    assert found(split) == {"same_answers": [25], "role_marker": [26], "no_final_answer": [27]}
    assert {c.form: c.rows for c in split.cuts if c.rule == "tunesmith"} == {PAIRS: 8, DIALOGUES: 8, TEXTS: 9}


def test_a_set_without_one_usable_row_is_told_row_by_row(tokenizer, tmp_path):
    (split,) = audited(
        tokenizer, write(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "", "rejected": "b"}, {"q": 1}])
    ).splits
    assert (split.rows, split.usable, split.cuts, split.bias) == (2, 0, (), None)
    assert found(split) == {"empty_chosen": [1], "unreadable": [2]}


# ---- overlap -------------------------------------------------------------------------------------------------------


def test_leaks_between_train_test_and_other_sets_are_found_across_forms(tokenizer, tmp_path):
    train, test = [clean("hh pair", i) for i in range(20)], [clean("hh pair", i) for i in range(100, 110)]
    test[3] = train[7]  # whole, and its prompt
    test[6] = {k: v.replace("about", "ABOUT\n") + " Otherwise." for k, v in train[9].items()}  # the prompt only
    write(tmp_path / "pairs" / "train.jsonl", train), write(tmp_path / "pairs" / "test.jsonl", test)
    sft = [clean("messages", i) for i in range(200, 210)]
    sft[4] = {"text": train[11]["chosen"]}  # the chosen dialogue
    sft[5] = {
        "messages": turns(
            *[f"  {t}" for t in ("Question 102 about the  two spaces?", "Answer 102 says yes.", "And 102?", "New.")]
        )
    }
    result = audited(tokenizer, tmp_path / "pairs", against=[write(tmp_path / "sft.jsonl", [*sft, b"{"])])
    of_train, of_test = ({o.other: o for o in split.overlaps} for split in result.splits)
    other = f"{tmp_path / 'sft.jsonl'} (train)"
    assert set(of_train) == {other}
    assert (of_train[other].prompts, of_train[other].texts, of_train[other].rows) == (1, 1, 20)
    assert of_train[other].places == ("train.jsonl:12 = sft.jsonl:5",)
    assert (of_test["train"].prompts, of_test["train"].texts, of_test["train"].rows) == (2, 1, 10)
    assert set(of_test["train"].places) == {"test.jsonl:4 = train.jsonl:8", "test.jsonl:7 = train.jsonl:10"}
    assert (of_test[other].prompts, of_test[other].texts, of_test[other].places) == (
        1,
        0,
        ("test.jsonl:3 = sft.jsonl:6",),
    )
    assert f"{other}: 1 row not compared: cannot be read" in result.remarks()
    assert sum("scores there measure memorisation" in line for line in result.problems()) == 3


def test_rows_held_out_of_one_file_are_looked_for_among_the_rest(tokenizer, tmp_path):
    """Every row twice: what is held out was trained on, unless its twin is held out too."""
    rows = [clean("completion", i) for i in range(50)]
    (split,) = audited(tokenizer, write(tmp_path / "rows.jsonl", rows * 2), holdout=0.1, seed=3).splits
    (leak,) = split.overlaps
    _, held = holdout_rows(100, 0.1, 3)
    learned = [i for i in held if (i + 50) % 100 not in held]
    assert 4 < len(learned) < len(held) == leak.rows
    assert (leak.prompts, leak.texts) == (len(learned), len(learned))
    assert leak.places == tuple(f"rows.jsonl:{i + 1} = rows.jsonl:{(i + 50) % 100 + 1}" for i in learned)
    (split,) = audited(tokenizer, write(tmp_path / "other.jsonl", rows), holdout=0.1, seed=3).splits
    assert (split.overlaps[0].rows, split.overlaps[0].prompts, split.overlaps[0].texts) == (5, 0, 0)
