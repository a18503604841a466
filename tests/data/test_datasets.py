"""Every format and every named data set to the same dialogues; bad rows are counted by reason and place."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.datasets import holdout_rows, open_dataset, parse_row
from tunesmith.data.dialogue import BadRow, Dialogue, Message, Preference, Text
from tunesmith.data.hh_template import HH
from tunesmith.data.readers import Report
from tunesmith.errors import UserError
from tunesmith.options.training import DataOptions

USER, GOOD, BAD = "Where is 北京? 👍", "In China.\n\nFar away.", "No idea."
ASKED = {"role": "user", "content": USER}
ANSWERED, MISLED = {"role": "assistant", "content": GOOD}, {"role": "assistant", "content": BAD}
HH_PROMPT = f"\n\nHuman: {USER}\n\nAssistant:"
DIALOGUE = Dialogue((Message("user", USER), Message("assistant", GOOD)))
WORSE = Dialogue((Message("user", USER), Message("assistant", BAD)))
PAIR = Preference(DIALOGUE, WORSE)

FORMATS = {
    "text, HH form": ({"text": f"{HH_PROMPT} {GOOD}"}, DIALOGUE),
    "text, plain": ({"text": "Once upon a time"}, Text("Once upon a time")),
    "messages": ({"messages": [ASKED, ANSWERED]}, DIALOGUE),
    "prompt + completion": ({"prompt": USER, "completion": GOOD}, DIALOGUE),
    "prompt + completion, HH form": ({"prompt": HH_PROMPT, "completion": f" {GOOD}"}, DIALOGUE),
    "prompt + completion, lists": ({"prompt": [ASKED], "completion": [ANSWERED]}, DIALOGUE),
    "prompt + chosen + rejected": ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, PAIR),
    "prompt + chosen + rejected, HH form": ({"prompt": HH_PROMPT, "chosen": f" {GOOD}", "rejected": f" {BAD}"}, PAIR),
    "prompt + chosen + rejected, lists": ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [MISLED]}, PAIR),
    "chosen + rejected, HH form": ({"chosen": f"{HH_PROMPT} {GOOD}", "rejected": f"{HH_PROMPT} {BAD}"}, PAIR),
    "chosen + rejected, lists": ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, MISLED]}, PAIR),
}


def write_rows(path, rows):
    """Rows in the format that the file's name says."""
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = (lines if ".jsonl" in name else json.dumps(rows)).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def read(name, split="train", **options):
    """All rows of a split, and what was reported."""
    report = Report()
    source = open_dataset(DataOptions(name=str(name), **options))
    return [located.value for located in source.rows(split, report)], report


# ---- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "json.gz", "parquet"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_in_every_file_gives_the_same_dialogue(tmp_path, form, suffix):
    row, expected = FORMATS[form]
    rows, report = read(write_rows(tmp_path / f"rows.{suffix}", [row, row]))
    assert rows == [expected, expected]
    assert (report.rows, report.used, report.bad) == (2, 2, {})


@pytest.mark.parametrize("content", ["one object", "lines", "wrapped"])
def test_json_may_also_be_one_object_lines_or_a_wrapped_list(tmp_path, content):
    row = {"messages": [ASKED, ANSWERED]}
    text = {"one object": json.dumps(row), "lines": f"{json.dumps(row)}\n" * 2, "wrapped": json.dumps({"data": [row]})}
    (tmp_path / "rows.json").write_text(text[content])
    rows, _ = read(tmp_path / "rows.json")
    assert rows == [DIALOGUE] * (2 if content == "lines" else 1)


def test_columns_that_are_null_or_unknown_do_not_matter(tmp_path):
    """One Parquet schema often serves several formats, so that the other formats' columns are null."""
    rows = [
        {"id": 1, "text": None, "messages": [ASKED, ANSWERED], "prompt": None, "completion": None},
        {"id": 2, "text": "Once", "messages": None, "prompt": None, "completion": None},
        {"id": 3, "text": None, "messages": None, "prompt": USER, "completion": GOOD},
    ]
    assert read(write_rows(tmp_path / "rows.parquet", rows))[0] == [DIALOGUE, Text("Once"), DIALOGUE]


def test_system_turn_and_several_turns_stay_in_order():
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    found = parse_row({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert [(m.role, m.content) for m in found.messages] == turns
    assert HH.text(found.messages).startswith("\n\nSystem: Be brief.\n\nHuman: a\n\nAssistant: b")


def test_directories_give_train_and_test(tmp_path):
    for folder, test in (("a", "test"), ("b", "validation")):
        (tmp_path / folder / "data").mkdir(parents=True)
        write_rows(tmp_path / folder / "data" / "train-00000-of-00002.parquet", [{"text": "first"}])
        write_rows(tmp_path / folder / "data" / "train-00001-of-00002.parquet", [{"text": "second"}])
        write_rows(tmp_path / folder / f"{test}.jsonl.gz", [{"text": "held out"}])
        (tmp_path / folder / "README.md").write_text("train on this")
        assert read(tmp_path / folder)[0] == [Text("first"), Text("second")]
        assert read(tmp_path / folder, "test")[0] == [Text("held out")]


def test_directory_without_rows_is_an_error_that_says_what_was_expected(tmp_path):
    (tmp_path / "README.md").write_text("train on this")
    write_rows(tmp_path / "test.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"no train\.\* file; expected train\{\.jsonl"):
        open_dataset(DataOptions(name=str(tmp_path)))


def test_an_empty_name_is_not_the_current_directory():
    with pytest.raises(UserError, match=r"--data\.name is empty"):
        open_dataset(DataOptions(name=""))


def test_max_rows_takes_the_first(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(9)])
    assert read(file, max_rows=3)[0] == [Text("row 0"), Text("row 1"), Text("row 2")]


def test_sample_has_its_480_and_40_rows_all_of_them_good():
    for split, count in (("train", 480), ("test", 40)):
        rows, report = read("sample", split)
        assert (len(rows), report.bad) == (count, {})
        assert all(isinstance(row, Preference) for row in rows)


# ---- bad rows ------------------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_by_reason_with_file_and_line(tmp_path):
    lines = [
        json.dumps({"text": "good"}).encode(),
        b'{"text": "cut',
        b'{"text": "\xff\xfe"}',
        b"",
        json.dumps({"text": "  \n"}).encode(),
        json.dumps({"messages": [ASKED]}).encode(),
        json.dumps({"messages": [ASKED, {"role": "assistant", "content": " "}]}).encode(),
        json.dumps({"messages": [ASKED, {"role": "tool", "content": "x"}]}).encode(),
        json.dumps({"q": "x", "a": "y"}).encode(),
        json.dumps(["not", "an", "object"]).encode(),
        json.dumps({"text": 5}).encode(),
        json.dumps({"prompt": USER, "chosen": "", "rejected": BAD}).encode(),
        json.dumps({"chosen": "no marker", "rejected": "none"}).encode(),
        b'{"text": "half a pair \\ud83d"}',
        *[b'{"text": ""}'] * 4,
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    rows, report = read(tmp_path / "rows.jsonl")
    assert rows == [Text("good")]
    assert (report.rows, report.used) == (17, 1), "an empty line is no row"
    told = "\n".join(report.lines())
    for reason, count, line in [
        ("invalid JSON", 1, 2), ("invalid UTF-8", 1, 3), ("empty text", 5, 5), ("no assistant turn", 1, 6),
        ("unknown role 'tool'", 1, 8), ("no known columns (found a, q", 1, 9), ("not an object", 1, 10),
        ("`text` is not a string", 1, 11), ("no role marker", 1, 13), ("half a character", 1, 14),
    ]:  # fmt: skip
        found = [why for why in report.bad if reason in why]
        assert [report.bad[why] for why in found] == [count], reason
        assert report.places[found[0]][0] == f"rows.jsonl:{line}"
        assert f"{count} skipped: {found[0]} (rows.jsonl:{line}" in told
    assert report.bad["empty answer"] == 2
    assert report.places["empty answer"] == ["rows.jsonl:7", "rows.jsonl:12"]
    assert report.places["empty text"] == ["rows.jsonl:5", "rows.jsonl:15", "rows.jsonl:16"], "the first three are kept"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 5, "completion": "x"}, {"prompt": "x", "completion": 5}, {"prompt": USER, "completion": [{"role": "user"}]},
        {"chosen": [ASKED, ANSWERED], "rejected": 5}, {}, None, "text", {"messages": "hi"}, {"messages": {}},
        {"prompt": USER, "completion": ""}, {"prompt": "", "completion": ""}, {"text": ["a"]},
    ],
)  # fmt: skip
def test_odd_rows_are_bad_rows_and_no_crash(row):
    with pytest.raises(BadRow):
        parse_row(row)


def test_all_rows_bad_is_an_error_with_reasons(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "x"}] * 5)
    with pytest.raises(UserError, match=r"no usable row .*rows\.jsonl: 5 skipped: no known columns .*rows\.jsonl:1"):
        read(file)


# ---- holdout -------------------------------------------------------------------------------------------------------


@given(rows=st.integers(2, 300), share=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_holdout_is_seeded_disjoint_and_complete(rows, share, seed):
    train, held = holdout_rows(rows, share, seed)
    assert sorted([*train, *held]) == list(range(rows))
    assert len(train) >= 1
    assert len(held) == min(max(1, round(rows * share)), rows - 1)
    again = holdout_rows(rows, share, seed)
    assert (train.tolist(), held.tolist()) == (again[0].tolist(), again[1].tolist())


def test_holdout_depends_on_the_seed_and_is_no_stretch():
    held = [holdout_rows(1000, 0.05, seed)[1].tolist() for seed in (1, 2)]
    assert held[0] != held[1]
    assert held[0] != list(range(held[0][0], held[0][0] + 50))


def test_one_row_cannot_be_split():
    with pytest.raises(UserError, match=r"train\.\* and test\.\*"):
        holdout_rows(1, 0.5, 0)


# ---- places --------------------------------------------------------------------------------------------------------


def test_a_row_is_placed_by_file_and_line_also_across_files(tmp_path, monkeypatch):
    for number in (0, 1):
        write_rows(tmp_path / f"train-{number}.jsonl", [{"text": "a"}, {"text": "b"}])
    source = open_dataset(DataOptions(name=str(tmp_path)))
    places = [source.place("train", r.file, r.line) for r in source.rows("train", Report())]
    assert places == ["train-0.jsonl:1", "train-0.jsonl:2", "train-1.jsonl:1", "train-1.jsonl:2"]
    monkeypatch.chdir(tmp_path)
    source = open_dataset(DataOptions(name="train-0.jsonl"))
    assert source.place("train", 0, 2) == "train-0.jsonl:2"
