"""Several data sets as one: by shares of the examples, seeded, the same at every start."""

import json
from collections import Counter

import pytest
import yaml

from tunesmith.__main__ import _training_options, main
from tunesmith.commands import training
from tunesmith.data.datasets import open_dataset
from tunesmith.data.mixture import mixed, parse_sets, shares
from tunesmith.data.readers import Report
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UsageError, UserError
from tunesmith.options.parse import parse
from tunesmith.options.training import DataOptions, ModelOptions, SFTConfig
from tunesmith.train.methods.table import METHODS


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """a.jsonl with 30 rows, b.jsonl with 50, and the directory c with 20 and a test split."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    for name, rows in (("a.jsonl", 30), ("b.jsonl", 50), ("c/train.jsonl", 20), ("c/test.jsonl", 5)):
        texts = [json.dumps({"text": f"{name[0]} {i}"}) for i in range(rows)]
        (tmp_path / name).write_text("\n".join(texts) + "\n")
    return tmp_path


def texts(name, **options):
    source = open_dataset(DataOptions(name=name, **options))
    report = Report()
    return [r.value.text for r in source.rows("train", report)], report


def counts(rows):
    return dict(Counter(text[0] for text in rows))


def test_sets_are_mixed_by_examples_until_the_first_runs_out(sets):
    rows, report = texts("a.jsonl*0.75,b.jsonl*0.25")
    assert counts(rows) == {"a": 30, "b": 10}
    assert len(set(rows)) == 40, "no row twice"
    assert counts(rows[:20]).keys() == {"a", "b"}, "not one after the other"
    assert report.notes == ["mixture, train: 30 of 30 rows of a.jsonl, 10 of 50 rows of b.jsonl"]
    assert (report.rows, report.used) == (40, 40)
    assert counts(texts("a.jsonl*3, b.jsonl*1")[0]) == {"a": 30, "b": 10}, "weights are relative"
    assert counts(texts("a.jsonl,b.jsonl,c")[0]) == {"a": 30, "b": 50, "c": 20}, "without weights: all rows"


def test_the_order_is_a_function_of_the_seed_and_the_sets(sets):
    first = texts("a.jsonl*0.5,b.jsonl*0.5", seed=1)[0]
    assert texts("a.jsonl*0.5,b.jsonl*0.5", seed=1)[0] == first
    assert texts("a.jsonl*0.5,b.jsonl*0.5", seed=2)[0] != first
    assert texts("a.jsonl*0.5,b.jsonl*0.5", seed=1, max_rows=7)[0] == first[:7]
    keys = {
        open_dataset(DataOptions(name=n, seed=s)).fingerprint("train")
        for n, s in [("a.jsonl,b.jsonl", 1), ("a.jsonl,b.jsonl", 2), ("a.jsonl*1,b.jsonl*2", 1), ("b.jsonl,a.jsonl", 1)]
    }
    assert len(keys) == 4
    before = open_dataset(DataOptions(name="a.jsonl,b.jsonl")).fingerprint("train")
    (sets / "b.jsonl").write_text('{"text": "b"}\n')
    assert open_dataset(DataOptions(name="a.jsonl,b.jsonl")).fingerprint("train") != before


def test_bad_rows_keep_their_place_and_do_not_count_as_examples(sets):
    (sets / "b.jsonl").write_text('{"text": "b 0"}\n{"text": ""}\n{"text": "b 1"}\n')
    rows, report = texts("a.jsonl*0.5,b.jsonl*0.5")
    assert counts(rows) == {"a": 2, "b": 2}
    assert report.lines() == ["1 skipped: empty text (b.jsonl:2)"]
    source = open_dataset(DataOptions(name="a.jsonl,b.jsonl"))
    for located in source.rows("train", Report()):
        file, line = source.place("train", located.file, located.line).split(":")
        assert json.loads((sets / file).read_text().splitlines()[int(line) - 1])["text"] == located.value.text


def test_a_mixture_has_a_test_split_where_all_sets_have_one(sets):
    assert list(open_dataset(DataOptions(name="c,sample")).files) == ["train", "test"]
    mixture = open_dataset(DataOptions(name="a.jsonl,c"))
    assert (list(mixture.files), mixture.notes) == (
        ["train"],
        ("the test rows of c are not used: the other sets have no test rows",),
    )


def test_mixed_sets_go_through_the_store(sets, tokenizer):
    source = open_dataset(DataOptions(name="a.jsonl,sample"))
    store = tokenise(source, "train", tokenizer)
    assert len(store) == 30 + 480
    assert {store.place(i).rpartition(":")[0] for i in range(len(store))} == {"a.jsonl", "train.jsonl"}
    pairs = tokenise(open_dataset(DataOptions(name="sample*1,sample*1", max_rows=6)), "train", tokenizer, form="pairs")
    assert len(pairs) == 18
    with pytest.raises(UserError, match=r"a\.jsonl \(train\) has no usable row"):
        tokenise(source, "train", tokenizer, form="pairs")


@pytest.mark.parametrize(
    ("name", "told"),
    [("a*0,b", "weight above 0"), ("a*x,b", "weight above 0"), ("a*0.5,b", "give every set a weight"), ("*0.5,b*1", "weight above 0")],
)  # fmt: skip
def test_wrong_weights_are_told(name, told):
    with pytest.raises(UsageError, match=told):
        parse_sets(name)


def test_a_mapping_is_for_the_files_and_not_for_the_named_sets(sets):
    (sets / "own.jsonl").write_text('{"ask": "a?", "reply": "b"}\n' * 3)
    source = open_dataset(DataOptions(name="own.jsonl*0.5,sample*0.5", columns="prompt=ask,completion=reply"))
    report = Report()
    assert len(list(source.rows("train", report))) == 6
    assert report.notes == ["mixture, train: 3 of 3 rows of own.jsonl, 3 of 480 rows of sample"]
    argv = [
        "data",
        "own.jsonl",
        "--audit",
        "--against",
        "sample",
        "--tokenizer",
        "sample",
        "--data.columns",
        "prompt=ask,completion=reply",
    ]
    assert main(argv) == 0


def test_a_run_is_called_after_all_its_sets(sets, monkeypatch):
    monkeypatch.chdir(sets)
    data = DataOptions(name="hh:helpful-base*0.3,a.jsonl*0.7")
    with training._begin(SFTConfig(model=ModelOptions(name="sample"), data=data), METHODS["sft"]) as (_, path):
        assert str(path) == "runs/sft-sample-hh-helpful-base-a"


def test_a_resumed_run_is_looked_for_under_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = tmp_path / "runs" / "sft-sample-sample" / "config.yaml"
    stored.parent.mkdir(parents=True)
    stored.write_text("train: {batch_size: 7}\n")
    argv = ["--model", "sample", "--data", "sample", "--resume"]
    assert _training_options(SFTConfig, argv, "sft").train.batch_size == 7


def test_max_rows_leaves_the_report_of_a_mixture_whole(sets):
    source = open_dataset(DataOptions(name="a.jsonl,b.jsonl", max_rows=1))
    report = Report()
    assert len(list(source.rows("train", report))) == report.used == 1
    assert any(note.startswith("mixture, train: ") for note in report.notes)
    assert report.rows == 1 + sum(report.bad.values())


def test_other_weights_are_other_content(sets):
    some, others = (open_dataset(DataOptions(name=f"a.jsonl*{x},b.jsonl*{1 - x}")) for x in (0.25, 0.75))
    digests = some.digests("train")
    assert digests == others.digests("train")
    assert some.content(digests) != others.content(digests)


def test_long_lists_are_no_file_names():
    assert len(parse_sets(",".join(["hh:helpful-base*0.5"] * 300))) == 300


def test_a_file_may_have_a_comma_or_a_star_in_its_name(sets):
    (sets / "x,y*2.jsonl").write_text('{"text": "odd"}\n')
    assert texts("x,y*2.jsonl")[0] == ["odd"]


def test_shares_and_order_by_numbers():
    assert shares([10, 20], [1.0, 1.0]) == [10, 10]
    assert shares([10, 1000], [0.9, 0.1]) == [10, 1]
    order = list(mixed([5, 9], [5, 3], 0))
    assert [row for part, row in order if part == 0] == [0, 1, 2, 3, 4]
    second = [row for part, row in order if part == 1]
    assert (len(second), second) == (3, sorted(set(second)))


def test_sets_and_columns_in_yaml_are_lists_and_mappings(tmp_path):
    written = {"data": {"name": ["a.jsonl*0.7", "hh:helpful-base*0.3"], "columns": {"prompt": "ask", "label": None}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    for argv in (["--config", str(tmp_path / "c.yaml")], [f"--config={tmp_path / 'c.yaml'}"]):
        config, _ = parse(SFTConfig, argv, prog="x")
        assert (config.data.name, config.data.columns) == ("a.jsonl*0.7,hh:helpful-base*0.3", "prompt=ask,label=")


def test_an_audit_looks_at_one_set(sets, capsys):
    assert main(["data", "a.jsonl,b.jsonl", "--audit"]) == 2
    assert "audit each of a.jsonl,b.jsonl alone" in capsys.readouterr().err
