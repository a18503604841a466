"""Files as people have them: encodings, arrays and objects in odd places, tables, and which files and rows make a set."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.datasets import open_dataset
from tunesmith.data.readers import Report, read_file
from tunesmith.errors import UserError
from tunesmith.options.training import DataOptions

ROWS = [{"prompt": f"Wo liegt Ort {i}?", "completion": f"In Ä{i}."} for i in range(4)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
COLUMNS = {name: [row[name] for row in ROWS] for name in ("prompt", "completion")}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CSV = "prompt,completion\n" + "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in ROWS)


def table(**options):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(rows):
    sink, whole = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue().to_pybytes()


FILES = {
    "lines.jsonl": "\n".join(LINES).encode(),
    "lines.ndjson": "\n".join(LINES).encode(),
    "LINES.JSONL": "\n".join(LINES).encode(),
    "lines without a suffix": "\n".join(LINES).encode(),
    "lines.json": "\n".join(LINES).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "pretty array.jsonl": json.dumps(ROWS, indent=1).encode(),
    "array of lines.jsonl": ("[\n" + ",\n".join(LINES) + "\n]").encode(),
    "arrays.jsonl": f"[{LINES[0]}, {LINES[1]}]\n[{LINES[2]}, {LINES[3]}]".encode(),
    "pretty.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "pretty.jsonl": "\n\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "columns.json": json.dumps(COLUMNS).encode(),
    "columns.jsonl": json.dumps(COLUMNS).encode(),
    "pandas.json": json.dumps({k: {str(i): v for i, v in enumerate(c)} for k, c in COLUMNS.items()}).encode(),
    "pandas split.json": json.dumps({"columns": [*COLUMNS], "index": [0, 1, 2, 3], "data": [[*r.values()] for r in ROWS]}).encode(),
    "wrapped.json": json.dumps({"version": "1.0", "data": ROWS}).encode(),
    "viewer.json": json.dumps({"features": [{"name": "prompt"}], "rows": [{"row_idx": 1, "row": row} for row in ROWS]}).encode(),
    "utf16.jsonl": "\n".join(LINES).encode("utf-16"),
    "utf16 without mark.json": "\n".join(LINES).encode("utf-16-le"),
    "utf32.json": json.dumps(ROWS).encode("utf-32"),
    "marks.jsonl": "\n".join("\ufeff" + line for line in LINES).encode(),
    "joined.jsonl": "\ufeff".join(["\n".join(LINES[:2]), "\n".join(LINES[2:])]).encode(),
    "cut out of an array.jsonl": ",\n".join(LINES).encode(),
    "windows.jsonl": "\r\n".join(LINES).encode("utf-8-sig"),
    "mac.jsonl": "\r".join(LINES).encode(),
    "packed.jsonl": gzip.compress("\n".join(LINES).encode()),
    "packed.jsonl.gz": gzip.compress("\n".join(LINES).encode()),
    "rows.csv": CSV.encode(),
    "excel.csv": CSV.replace(",", ";").encode("utf-8-sig"),
    "utf16.csv": CSV.encode("utf-16"),
    "rows.tsv": CSV.replace(",", "\t").encode(),
    "rows.csv.gz": gzip.compress(CSV.encode()),
    "rows.parquet": table(),
    "rows.parquet.gz": gzip.compress(table()),
    "parquet.jsonl": table(),
    "rows.arrow": arrow(ROWS),
}  # fmt: skip


def rows_in(path):
    report = Report()
    return [r.value for r in read_file(path, 0, report)], report


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_file(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    found, report = rows_in(tmp_path / name)
    assert (found, report.bad) == (ROWS, {})


def test_a_csv_cell_may_hold_line_breaks_turns_and_long_texts(tmp_path):
    long = "word " * 100_000
    quoted = json.dumps(TURNS).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages,text\n"{quoted}",\n,"two\nlines"\n,"{long}"\n', newline="")
    report = Report()
    found = list(open_dataset(DataOptions(name=str(tmp_path / "a.csv"))).rows("train", report))
    assert [r.line for r in found] == [2, 3, 5]
    assert [m.content for m in found[0].value.messages] == ["Hi", "Hello"]
    assert (found[1].value.text, found[2].value.text) == ("two\nlines", long)


def test_rows_of_a_csv_that_do_not_fit_the_header_are_bad_rows(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\na,b\na,b,c\n"a"x,b\n\nc,d\n')
    found, report = rows_in(tmp_path / "a.csv")
    assert found == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert list(report.places.values()) == [["a.csv:3"], ["a.csv:4"]]
    assert "3 cells under a header with 2" in report.lines()[0]
    (tmp_path / "b.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(UserError, match="the column 'prompt' twice"):
        rows_in(tmp_path / "b.csv")


DEEP, HUGE = "[" * 100_000 + "]" * 100_000, "9" * 6000


@pytest.mark.parametrize("bad", [DEEP, HUGE], ids=["deep", "huge"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_one_row_that_nobody_can_read_is_one_bad_row(tmp_path, name, bad):
    rows = [LINES[0], f'{{"text": {bad}}}', LINES[1].replace("Ort", '\\"Ort, [')]
    (tmp_path / name).write_text("\n".join(rows) if name == "a.jsonl" else f"[{','.join(rows)}]")
    found, report = rows_in(tmp_path / name)
    assert (len(found), sum(report.bad.values()), report.rows) == (2, 1, 1)
    assert re.search("nested too deeply|too many digits", report.lines()[0])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", '{"train": 5, "a": [{"x": 1}], "b": [{"x": 1}]}', r"several lists \(a, b\): save the list"),
        ("a.json", '{"text": "a"}\n{"text": ', "not valid JSON|invalid JSON"), ("a.zip", "PK\x03\x04rest", "a zip or Excel file"),
        ("a.jsonl", "PK\x03\x04rest", "a zip or Excel file"), ("a.csv", b"prompt,completion\n\xe9,b\n", "not UTF-8 .*save it as UTF-8"),
        ("a.csv", "messages\n\"[{'role': 'user', 'content': 'Hi'}]\"\n", "Python notation.*json.dumps"),
        ("a.jsonl", '{"turns": [{"role": "user", "content": "a"}]}', "no known columns \\(found turns"),
        ("a.arrow", "nothing", "cannot be read as Arrow"), ("a.json", f'{{"text": {DEEP}}}', "nested too deeply"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_gives_the_true_reason(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    report = Report()
    try:
        list(open_dataset(DataOptions(name=str(tmp_path / name))).rows("train", report))
        reasons = "; ".join(report.lines())
    except UserError as error:
        reasons = str(error)
    assert re.search(told, reasons)


def test_a_broken_first_line_leaves_the_others_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "cut\n' + "\n".join(LINES))
    found, report = rows_in(tmp_path / "a.jsonl")
    assert (found, report.places) == (ROWS, {next(iter(report.bad)): ["a.jsonl:1"]})


# ---- which files -----------------------------------------------------------------------------------------------------


def lay(root, **files):
    """Files of one text each, or of the content given: `train__part0_jsonl` is train/part0.jsonl."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else (json.dumps({"text": content}) + "\n").encode())
    return root


def texts(root, **options):
    source = open_dataset(DataOptions(name=str(root), **options))
    found = {s: [r.value.text for r in source.rows(s, Report())] for s in source.files}
    return found, source.notes


LAYOUTS = {
    "folders": (["train/part0.jsonl", "train/part1.jsonl", "test/part0.jsonl"], 2, 1),
    "words": (["en_train.jsonl", "en_test.jsonl"], 1, 1), "capitals": (["TRAIN.JSONL"], 1, 0), "alone": (["data.jsonl"], 1, 0),
    "alone beside a test": (["rows.jsonl", "test.jsonl"], 1, 1), "shards": (["part-00000.jsonl", "part-00001.jsonl"], 2, 0),
    "hub": (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/validation-00000-of-00001.jsonl"], 2, 1),
    "versions": (["train-v1.1.jsonl", "dev-v1.1.jsonl"], 1, 1), "sets": (["trainset.jsonl", "testset.jsonl"], 1, 1),
    "test before validation": (["train.jsonl", "validation.jsonl", "test.jsonl"], 1, 1),
    "numbers": (["train.0.jsonl", "train.1.jsonl"], 2, 0),
    "hidden": (["train.jsonl", ".cache/train.jsonl", "._train.jsonl"], 1, 0), "notes": (["train.jsonl", "readme.txt", "notes.txt"], 1, 0),
    "results": (["train.jsonl", "eval_results.json", "all_results.json", "trainer_state.json", "train_metrics.json"], 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_directories(tmp_path, name):
    files, train, test = LAYOUTS[name]
    found, _ = texts(lay(tmp_path, **{f: f for f in files}))
    assert [len(found["train"]), len(found.get("test", []))] == [train, test]
    assert found.get("test", ["test"])[0].rpartition("/")[0] in ("test", "data", "")


def test_one_small_object_of_numbers_is_no_test_set(tmp_path):
    lay(tmp_path, **{"train.jsonl": "a", "test.json": b'{"epoch": 1.0, "eval_loss": 2.0}'})
    found, notes = texts(tmp_path)
    assert (list(found), notes) == (["train"], ("not data: test.json",))


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["data/train_gen-00000-of-00001.jsonl", "data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"], "gen, sft"),
        (["gen/train.jsonl", "sft/train.jsonl", "sft/test.jsonl"], "gen, sft"), (["gen/x.jsonl", "sft/y.jsonl"], "gen, sft"),
        (["gen_train.jsonl", "sft_train.jsonl", "sft_test.jsonl"], "gen, sft"), (["train.jsonl", "sft/train.jsonl"], "default, sft"),
    ],
)  # fmt: skip
def test_several_configurations_are_named_and_one_is_asked_for(tmp_path, files, names):
    lay(tmp_path, **{f: f for f in files})
    with pytest.raises(UserError, match=rf"several configurations \({names}\): name one with --data\.config, or all"):
        texts(tmp_path)
    found, _ = texts(tmp_path, config="sft")
    assert all("sft" in text for part in found.values() for text in part)
    assert len(texts(tmp_path, config="all")[0]["train"]) == 2
    with pytest.raises(UserError, match=rf"--data\.config nothing: .* has {names}"):
        texts(tmp_path, config="nothing")


def test_the_same_name_in_two_formats_is_asked_about(tmp_path):
    lay(tmp_path, **{"train.jsonl": "a", "train.jsonl.gz": gzip.compress(b'{"text": "a"}')})
    with pytest.raises(UserError, match=r"train\.jsonl and train\.jsonl\.gz: are these the same rows twice"):
        texts(tmp_path)


def test_what_is_left_of_a_directory_is_named(tmp_path):
    found, notes = texts(lay(tmp_path, **{"train.jsonl": "a", "extra.jsonl": "b", "test.jsonl": "c", "dev.jsonl": "d"}))
    assert (found, notes) == ({"train": ["a"], "test": ["c"]}, ("not used: dev.jsonl, extra.jsonl",))


def test_folders_of_text_files(tmp_path):
    for name in ("b.txt", "sub/a.txt", "LICENSE.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, config="all")[0] == {"train": ["b.txt", "sub/a.txt"]}


@pytest.mark.parametrize("split", [True, False], ids=["DatasetDict", "Dataset"])
def test_what_datasets_saved_to_disk(tmp_path, split):
    for part in ("train", "test") if split else ("",):
        rows = [{"text": f"{part}{i}"} for i in range(3)]
        lay(tmp_path / part, **{"data-00000-of-00001.arrow": arrow(rows), "state.json": b"{}", "dataset_info.json": b"{}",
                                "cache-1.arrow": arrow(rows)})  # fmt: skip
    if split:
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found, _ = texts(tmp_path)
    assert {s: len(r) for s, r in found.items()} == ({"train": 3, "test": 3} if split else {"train": 3})


# ---- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "folder"])
def test_a_column_of_splits_is_honoured(tmp_path, name):
    rows = [
        {"text": f"{i} {s}", "split": s} for i, s in enumerate(["train", "test", "train", "valid", "extra", "Train"])
    ]
    if name == "a.csv":
        content = "text,split\n" + "".join(f"{r['text']},{r['split']}\n" for r in rows)
    else:
        content = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    path = tmp_path / (name if name != "folder" else "rows.jsonl")
    path.write_text(content)
    found, notes = texts(tmp_path if name == "folder" else path)
    assert found == {"train": ["0 train", "2 train", "5 Train"], "test": ["1 test"]}
    assert notes == (
        "rows that their column `split` puts in neither train nor test are not used: 1 of 'valid', 1 of 'extra'",
    )
    fingerprints = open_dataset(DataOptions(name=str(path)))
    assert fingerprints.fingerprint("train") != fingerprints.fingerprint("test")


def test_a_column_split_beside_a_test_file_is_named(tmp_path):
    lay(tmp_path, **{"train.jsonl": b'{"text": "a", "split": "test"}', "test.jsonl": "b"})
    report = Report()
    assert len(list(open_dataset(DataOptions(name=str(tmp_path))).rows("train", report))) == 1
    assert report.notes == ["not used: split"]


@pytest.mark.parametrize("keys", [("train", "test"), ("training", "validation"), ("train_sft", "test_sft")])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_object_of_splits_is_honoured(tmp_path, keys, name):
    content = {keys[0]: [{"text": "a"}, {"text": "b"}], keys[1]: [{"text": "c"}]}
    (tmp_path / name).write_text(json.dumps(content, indent=1 if name == "a.json" else None))
    assert texts(tmp_path / name)[0] == {"train": ["a", "b"], "test": ["c"]}
    (tmp_path / "b.json").write_text(json.dumps({keys[0]: {"text": ["a", "b"]}}))
    assert texts(tmp_path / "b.json")[0] == {"train": ["a", "b"]}
