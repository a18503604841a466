"""`tunesmith data --audit`: its table, its record, and what it refuses."""

import gzip
import json

import pytest
import yaml

from planted_rows import audited, clean, found, turns, write
from tunesmith.__main__ import main
from tunesmith.errors import UsageError, UserError
from tunesmith.files.names import known_shape


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


def test_a_cut_is_held_against_the_positions_of_the_model_whose_tokenizer_it_is(
    tmp_path, tiny_directory, tokenizer, capfd
):
    path = write(tmp_path / "rows.jsonl", [*(clean("text", i) for i in range(20)), {"text": "word " * 300}])
    positions = known_shape(str(tiny_directory)).longest
    argv = ["data", str(path), "--audit", "--data.block_size", "64"]
    for model, told in (
        (tiny_directory, f"the longest has 302 tokens and the model has {positions:,} positions: shorten or split"),
        ("gpt2", "--data.block_size 301 would fit them all\n"),
    ):
        assert main([*argv, "--tokenizer", str(model)]) == 0
        assert told in capfd.readouterr().out, told
    assert "would fit them all, if the model has as many" in audited(tokenizer, path, block_size=64).problems()[-1]


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
    fails([*audit_good, "--against", tmp_path / "cut.jsonl.gz"], 1, "cut.jsonl.gz", "damaged gzip", "again")
    fails([*audit_good, "--against", tmp_path / "empty.jsonl"], 1, "empty.jsonl", "no row", "add some")
    fails([tmp_path / "empty.jsonl", "--audit"], 1, "empty.jsonl", "no row", "add some")
    fails([tmp_path / "cut.jsonl.gz", "--audit"], 1, "cut.jsonl.gz", "damaged gzip", "again")
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
    assert "--against 5: expected a list of strings" in capfd.readouterr().err
