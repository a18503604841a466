"""Defects planted at known rows of every form are found there and nowhere else; leaks, duplicates, and what the command says."""

import gzip
import json

import pytest
import yaml

from tunesmith.__main__ import main
from tunesmith.audit import audit
from tunesmith.datasets import holdout_rows, open_dataset
from tunesmith.errors import UsageError, UserError
from tunesmith.options import DataOptions
from tunesmith.rowchecks import CHECKS, DIALOGUES, PAIRS, TEXTS

ORDER = 7  # clean rows between two planted ones


def turns(*texts):
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def transcript(*texts):
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(texts))


# Clean rows, with all that looks like a defect and is none: markers within a line, other cases, inner spaces, HTML.
TOPICS = [
    "rivers", "glass", "the  two spaces", "Human: beings", "an assistant: who", "line\nbreaks", "a <s>struck</s> word", "日本語", "x | y",
    "what Assistant: means in a sentence",
]  # fmt: skip


def clean(form, i):
    q, a, b = (
        f"Question {i} about {TOPICS[i % len(TOPICS)]}?",
        f"Answer {i} says yes.",
        f"Answer {i} says no, and more.",
    )
    q = q.replace("Human:", "the human:") if i % len(TOPICS) == 3 else q
    return {
        "text": {"text": f"Text {i}: {q} {a}"},
        "transcript": {"text": transcript(q, a, f"And {i}?", b)},
        "messages": {"messages": [{"role": "system", "content": "Be short."}, *turns(q, a, f"And {i}?", b)]},
        "completion": {"prompt": q, "completion": a},
        "hh completion": {"prompt": transcript(q) + "\n\nAssistant:", "completion": f" {a}"},
        "pair": {"prompt": q, "chosen": a, "rejected": b},
        "hh prompt pair": {"prompt": transcript(q) + "\n\nAssistant:", "chosen": f" {a}", "rejected": f" {b}"},
        "hh pair": {"chosen": transcript(q, a, f"And {i}?", b), "rejected": transcript(q, a, f"And {i}?", a)},
        "list pair": {"prompt": turns(q), "chosen": turns("", a)[1:], "rejected": turns("", b)[1:]},
        "whole list pair": {"chosen": turns(q, a), "rejected": turns(q, b)},
    }[form]


HH, A = transcript("Why is it so?"), "\n\nAssistant:"
OPEN = {"no_final_answer"}
# (row, the kinds that it must be told for)
PLANTED = {
    "text": [
        ({"text": " \n "}, {"empty_text"}), ({"text": "Human: hi\n\nAssistant: hello"}, {"role_marker"}),
        ({"text": "Some text.\n\nHuman: hi there"}, {"role_marker"}), ({"text": "The end.<|endoftext|>"}, {"template_text"}),
        ({"text": "<s>Some words</s>"}, {"template_text"}), ({"text": "[INST] Say it [/INST] it"}, {"template_text"}),
    ],
    "transcript": [
        ({"text": HH + A}, {"empty_answer"}), ({"text": HH}, OPEN), ({"text": transcript("a?", "b.", "c?")}, OPEN),
        ({"text": transcript("Too soon ", "yes.")}, {"prompt_space"}), ({"text": HH + A + "No space."}, {"turn_start"}),
        ({"text": HH + A + "  Two spaces."}, {"turn_start"}), ({"text": HH + A + " Then a break.\n"}, {"answer_end"}),
        ({"text": transcript("One", "\nHuman: two")}, {"role_marker", "turn_start"}),
        ({"text": HH + A + A + " Again."}, {"empty_turn", "repeated_role"}),
        ({"text": HH + transcript("Once more") + A + " Yes."}, {"repeated_role"}),
    ],
    "messages": [
        ({"messages": turns("hi", " ")}, {"empty_answer"}),
        ({"messages": turns("hello")}, OPEN),
        ({"messages": turns("", "fine")}, {"empty_turn"}),
        ({"messages": turns("to be", "or", "not")}, OPEN), ({"messages": turns("ends in space ", "yes")}, {"prompt_space"}),
        ({"messages": turns("a good day", " a space first")}, {"turn_start"}),
        ({"messages": turns("a bad day", "a space last ")}, {"answer_end"}),
        ({"messages": [*turns("one"), *turns("two", "three")]}, {"repeated_role"}),
        ({"messages": turns("four", "five\n\nHuman: six")}, {"role_marker"}),
        ({"messages": turns("Human: seven", "eight")}, {"role_marker"}),
        ({"messages": turns("nine", "ten<|im_end|>")}, {"template_text"}),
        ({"messages": turns("Four\n\nSystem: obey", "no")}, {"role_marker"}),
    ],
    "completion": [
        ({"prompt": "An empty one", "completion": ""}, {"empty_answer"}), ({"prompt": "Ends so ", "completion": "yes"}, {"prompt_space"}),
        ({"prompt": "Begins so", "completion": " yes"}, {"turn_start"}), ({"prompt": "Stops so", "completion": "yes\n"}, {"answer_end"}),
        ({"prompt": "Tell me. Assistant:", "completion": "what"}, {"role_marker"}),
        ({"prompt": "", "completion": "No question."}, {"empty_turn"}),
        ({"prompt": "Tell me. Assistant: ", "completion": "who"}, {"role_marker", "prompt_space"}),
    ],
    "hh completion": [
        ({"prompt": HH + A + " ", "completion": "After the space."}, {"prompt_space"}),
        ({"prompt": HH + A, "completion": "None."}, {"turn_start"}),
        ({"prompt": HH + A + " ", "completion": " Two."}, {"prompt_space", "turn_start"}),
        ({"prompt": HH, "completion": " no marker"}, OPEN),
        ({"prompt": HH + A, "completion": " "}, {"empty_answer"}),
    ],
    "pair": [
        ({"prompt": "Nothing?", "chosen": "", "rejected": "much"}, {"empty_chosen"}),
        ({"prompt": "Anything?", "chosen": "much", "rejected": " "}, {"empty_rejected"}),
        ({"prompt": "Same?", "chosen": "same", "rejected": "same"}, {"same_answers"}),
        ({"prompt": "Space? ", "chosen": "yes", "rejected": "no"}, {"prompt_space"}),
        ({"prompt": "Spaces?", "chosen": "yes", "rejected": " no"}, {"turn_start"}),
        ({"prompt": "Breaks?", "chosen": "yes", "rejected": "no\n"}, {"answer_end"}),
        ({"prompt": "Marks?", "chosen": "yes", "rejected": "no\nHuman: why?"}, {"role_marker"}),
        ({"prompt": "Ends?", "chosen": "yes<|endoftext|>", "rejected": "no"}, {"template_text"}),
    ],
    "hh prompt pair": [
        ({"prompt": HH + A + " ", "chosen": "yes", "rejected": "no"}, {"prompt_space"}),
        ({"prompt": HH + A, "chosen": "maybe", "rejected": "not"}, {"turn_start"}),
        ({"prompt": HH + A, "chosen": "", "rejected": " no"}, {"empty_chosen"}),
    ],
    "hh pair": [
        ({"chosen": transcript("one?", "1"), "rejected": transcript("two?", "2")}, {"prompts_differ"}),
        ({"chosen": transcript("three?"), "rejected": transcript("three?", "3")}, OPEN),
        ({"chosen": transcript("four?", "4"), "rejected": transcript("four?", "4", "why?")}, OPEN | {"prompts_differ"}),
        ({"chosen": transcript("five?", "5"), "rejected": transcript("five?", "5")}, {"same_answers"}),
        ({"chosen": transcript("six?", ""), "rejected": transcript("six?", "6")}, {"empty_chosen"}),
        ({"chosen": HH + A + A + " 7", "rejected": HH + A + A + " seven"}, {"empty_turn", "repeated_role"}),
    ],
    "list pair": [
        ({"prompt": turns("Why? "), "chosen": turns("", "so")[1:], "rejected": turns("", "not so")[1:]}, {"prompt_space"}),
        ({"prompt": turns("How?"), "chosen": turns("", "so")[1:], "rejected": turns("thus")}, OPEN | {"prompts_differ", "repeated_role"}),
    ],
    "whole list pair": [
        ({"chosen": turns("Who?", "me"), "rejected": turns("who?", "you")}, {"prompts_differ"}),
        ({"chosen": turns("", "So it is.")[1:], "rejected": turns("", "It is not.")[1:]}, {"no_prompt"}),
    ],
}  # fmt: skip
UNREADABLE = {
    b'{"text": ': "invalid JSON", b'{"text": "\xff"}': "invalid UTF-8", b'{"q": "a"}': "no known columns (found q", b"[1]": "not an object",
    b'{"messages": [{"role": "judge", "content": "x"}]}': "unknown role", b'{"chosen": "x", "rejected": "y"}': "no role marker",
    b'{"text": "\\ud800"}': "half a character", b'{"messages": []}': "not a list of turns", b'{"text": 5}': "`text` is not a string",
}  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def audited(tokenizer, path, *, against=(), max_rows=None, **options):
    source = open_dataset(DataOptions(name=str(path), max_rows=max_rows))
    others = [open_dataset(DataOptions(name=str(other))) for other in against]
    return audit(source, tokenizer, **({"block_size": 1024} | options), against=others)


def found(split):
    """kind -> numbers of the lines at which it was found."""
    for f in split.findings:
        assert f.rows == len(f.places) or f.kind == "unreadable"
    lines = {f.kind: [int(p.partition(" = ")[0].rpartition(":")[2]) for p in f.places] for f in split.findings}
    return {kind: numbers for kind, numbers in lines.items() if numbers}


def spread(rows, form, first=0):
    """Planted rows after every few clean ones, and the line of each."""
    mixed, at = [], []
    for i, row in enumerate(rows):
        mixed += [clean(form, first + ORDER * i + j) for j in range(ORDER)]
        mixed.append(row)
        at.append(len(mixed))
    return mixed, at


FORM = {
    "text": TEXTS,
    "pair": PAIRS,
    "hh prompt pair": PAIRS,
    "hh pair": PAIRS,
    "list pair": PAIRS,
    "whole list pair": PAIRS,
}


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
    """Else the recall above would say little. Duplicates and pairs turned round have their own tests."""
    planted = {
        (kind, FORM.get(form, DIALOGUES)) for form, rows in PLANTED.items() for _, kinds in rows for kind in kinds
    }
    wanted = {(kind, form) for kind, check in CHECKS.items() for form in check.forms}
    assert wanted - planted == {("duplicate", f) for f in (TEXTS, DIALOGUES, PAIRS)} | {("contradiction", PAIRS)}


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
    assert f"{other}: 1 row cannot be read, so not compared" in result.remarks()
    assert sum("scores there measure memory" in line for line in result.problems()) == 3


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


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(capfd):
    """Run the command line in this process; it must end with `code` and one line that holds every part of `told`."""

    def run(argv, code, *told):
        assert main(["data", *map(str, argv)]) == code
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1, err
        assert [part for part in told if part not in err] == [], err

    return run


def test_the_command_prints_the_table_and_writes_the_record(tmp_path, capfd):
    rows = [clean("pair", i) for i in range(20)] + [{"prompt": "Same?", "chosen": "same", "rejected": "same"}]
    write(tmp_path / "set" / "train.jsonl", rows), write(tmp_path / "set" / "test.jsonl", rows[:2])
    other = write(tmp_path / "other.jsonl", rows[5:6]), write(tmp_path / "more.jsonl", [clean("text", 1)])
    argv = ["data", str(tmp_path / "set"), "--audit", "--out", str(tmp_path / "audit.json")]
    argv += [word for path in other for word in ("--against", str(path))]
    assert main([*argv, "--show", "1"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    cells = ["chosen equals rejected │ 1 (4.8%) │ 0", "usable │ 20 (95.2%) │ 2", "prompts in train │ │ 2"]
    for told in [*cells, "train.jsonl:21", "delete the row", "`longer is better` is right", "carries loss"]:
        assert told in out, out
    record = json.loads((tmp_path / "audit.json").read_text())
    assert (record["block_size"], record["tokenizer"], record["splits"][0]["rows"]) == (1024, "gpt2", 21)
    (finding,) = [f for f in record["splits"][0]["findings"] if f["rows"]]
    assert (finding["kind"], finding["places"]) == ("same_answers", ["train.jsonl:21"])
    assert [o["texts"] for o in record["splits"][0]["overlaps"]] == [1, 0]
    assert record["problems"] == [line.removeprefix("note: ") for line in record["problems"]]
    assert len(record["problems"]) == 3


def test_text_has_no_checks_that_only_pairs_or_dialogues_know(tmp_path, capfd):
    path = write(tmp_path / "rows.jsonl", [clean("text", i) for i in range(20)])
    assert main(["data", str(path), "--audit", "--data.strict", "true", "--out", str(tmp_path / "o.json")]) == 0
    out = capfd.readouterr().out
    assert not [word for word in ("chosen", "rejected", "answer", "prompt of") if word in out]
    (split,) = json.loads((tmp_path / "o.json").read_text())["splits"]
    assert {f["kind"] for f in split["findings"]} == {"empty_text", "duplicate", "role_marker", "template_text"}
    assert split["bias"] is None


def test_strict_makes_each_kind_of_problem_an_error_and_still_writes_the_record(fails, tmp_path):
    rows = [clean("messages", i) for i in range(20)]
    bad = write(tmp_path / "bad.jsonl", [*rows, {"messages": turns("hi", "")}])
    good = write(tmp_path / "good.jsonl", rows)
    strict = ["--audit", "true", "--data.strict", "true"]
    assert main(["data", str(good), *strict]) == 0
    fails([bad, *strict, "--out", tmp_path / "o.json"], 1, "--data.strict", "empty answer", "bad.jsonl:21")
    assert json.loads((tmp_path / "o.json").read_text())["splits"][0]["usable"] == 20
    fails([good, *strict, "--data.block_size", "16"], 1, "--data.strict", "longer than block_size 16", "good.jsonl:1")
    fails([good, *strict, "--against", bad], 1, "--data.strict", "20 prompts and 20 whole texts", "bad.jsonl:1")


def test_what_cannot_be_audited_fails_by_cause_and_remedy(fails, tmp_path):
    good = write(tmp_path / "good.jsonl", [clean("pair", i) for i in range(4)])
    audit_good = [good, "--audit", "true"]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good.read_bytes() * 50)[:90])
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    fails([*audit_good, "--against", "nowhere"], 1, "--against nowhere", "neither a file nor a directory", "hh-pairs")
    fails([*audit_good, "--against", "hh:wrong"], 1, "--against hh:wrong", "hh:harmless-base")
    fails([*audit_good, "--against", tmp_path / "cut.jsonl.gz"], 1, "cut.jsonl.gz", "broken gzip", "again")
    fails([*audit_good, "--against", tmp_path / "empty.jsonl"], 1, "empty.jsonl", "no row", "give it some")
    fails([tmp_path / "empty.jsonl", "--audit"], 1, "empty.jsonl", "no row", "give it some")
    fails([tmp_path / "cut.jsonl.gz", "--audit"], 1, "cut.jsonl.gz", "broken gzip", "again")
    fails([good, "--against", good], 2, "--against", "add --audit")
    fails([good, "--out", tmp_path / "o.json"], 2, "--out", "add --audit")
    fails([*audit_good, "--data.truncation", "split"], 2, "--data.truncation split", "keep_end")
    fails([*audit_good, "--data.block_size", "0"], 2, "--data.block_size is 0", "at least 1")
    fails([*audit_good, "--data.holdout", "1"], 2, "--data.holdout is 1.0", "between 0 and 1")
    fails([*audit_good, "--out", tmp_path / "no" / "o.json"], 1, "no/o.json", "No such file")
    fails([*audit_good, "--against"], 2, "--against", "expected one argument")


def test_windows_cut_no_row(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [clean("messages", i) for i in range(20)])
    (split,) = audited(tokenizer, path, block_size=16, truncation=None).splits
    assert [c.rule for c in split.cuts] == ["end cut off"]
    assert (
        main(
            [
                "data",
                str(path),
                "--audit",
                "--data.batching",
                "windows",
                "--data.block_size",
                "16",
                "--data.strict",
                "true",
            ]
        )
        == 0
    )


def test_max_rows_limits_the_audited_set_and_not_those_beside_it(tmp_path, tokenizer):
    rows = [clean("pair", i) for i in range(20)]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[0]])
    (split,) = audited(tokenizer, path, max_rows=10, against=[write(tmp_path / "o.jsonl", rows[::-1])]).splits
    assert (split.rows, found(split)) == (10, {})
    assert split.overlaps[-1].texts == 10


def test_settings_out_of_range_are_errors_in_python_too(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [clean("pair", 0)])
    with pytest.raises(UsageError, match="block_size is 0"):
        audited(tokenizer, path, block_size=0)
    with pytest.raises(UserError, match="no row"):
        audited(tokenizer, write(tmp_path / "none.jsonl", []))
    (split,) = audited(tokenizer, path).splits
    assert split.overlaps == (), "one row: none can be held out"


def test_names_to_compare_with_add_up_from_files_and_the_command_line(tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text("audit: true\nagainst: [a, b]\n")
    argv = [
        "data",
        "sample",
        "--config",
        str(tmp_path / "mine.yaml"),
        "--against=c",
        "--against",
        "d",
        "--print_config",
    ]
    with pytest.raises(SystemExit):
        main(argv)
    assert yaml.safe_load(capfd.readouterr().out)["against"] == ["a", "b", "c", "d"]
    (tmp_path / "mine.yaml").write_text("against: 5\n")
    assert main(argv[:4]) == 2
    assert "--against 5: expected a list of texts" in capfd.readouterr().err
