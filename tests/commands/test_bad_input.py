"""What users get wrong, through the real command line: exit code, and one line on stderr with cause and remedy."""

import gzip
import json
import shutil

import pytest

import tunesmith
from tunesmith.__main__ import main
from tunesmith.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fine"}]}
LONG = {"messages": [{"role": "user", "content": "word " * 10_000}, {"role": "assistant", "content": "fine"}]}
FEW = ["--limit", "1", "--generate.max_new_tokens", "2"]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def fails(capfd):
    """Run the command line in this process; it must end with `code` and one line that holds every part of `told`."""

    def run(argv, code, *told):
        found = main([str(word) for word in argv])
        err = capfd.readouterr().err
        assert found == code, err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("tunesmith: ")
        missing = [part for part in told if part not in err]
        assert not missing, f"{err} does not name {missing}"

    return run


@pytest.fixture
def sft(tiny_directory, tmp_path):
    """The smallest training, to which a test adds its mistake."""
    return [
        "sft", "--model.name", tiny_directory, "--data.name", "sample", "--data.block_size", "128", "--train.steps", "1",
        "--eval.iters", "1", "--train.device", "cpu", "--train.precision", "fp32", "--out", tmp_path / "run",
    ]  # fmt: skip


def test_the_smallest_training_works_without_a_mistake(sft, capfd):
    """Else the tests below would prove nothing."""
    assert main([str(word) for word in sft]) == 0
    assert capfd.readouterr().err == ""


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("sftt", ["unknown command 'sftt'", "Did you mean sft?", "compare"]),
        ("sft --optimizer.weight_decai 1", ["unknown option --optimizer.weight_decai", "Did you mean --optimizer.weight_decay?"]),
        ("sft --optimizer.lerning_rate=1", ["unknown option --optimizer.lerning_rate", "Did you mean --optimizer.lr?"]),
        ("sft --block_size 1", ["unknown option --block_size", "Did you mean --data.block_size?"]),
        ("sft --train.steps many", ["--train.steps many", "a whole number"]),
        ("sft --train.steps 5.5", ["--train.steps 5.5", "a whole number"]),
        ("sft --optimizer.lr fast", ["--optimizer.lr fast", "a number"]),
        ("sft --data.batching boxes", ["--data.batching boxes", "packed, windows or padded"]),
        ("sft --train.compile perhaps", ["--train.compile perhaps", "auto, true or false"]),
        ("sft --train.steps", ["--train.steps", "expected one argument"]),
        ("sft --config paper/e9", ["--config paper/e9", "no such preset", "paper/e1"]),
        ("sft --config nowhere.yaml", ["--config nowhere.yaml", "no such file", "paper/e1"]),
        ("data", ["data needs a data set", "tunesmith data sample"]), ("compare sample", ["compare needs the other MODEL"]),
        ("report", ["report needs run directories", "tunesmith report"]),
        ("data sample extra", ["unexpected argument 'extra'"]),
    ],
)  # fmt: skip
def test_wrong_words_are_usage_errors(fails, argv, told):
    fails(argv.split(), 2, *told)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("sft --train.steps 0", ["--train.steps is 0", "at least 1"]),
        ("sft --train.steps 1 --train.epochs 1", ["--train.steps", "--train.epochs", "not both"]),
        ("sft --model.dropout 1", ["--model.dropout is 1.0", "dropout < 1"]),
        ("data sample --data.max_rows 0", ["--data.max_rows is 0", "at least 1"]),
        ("data sample --data.block_size 0", ["--data.block_size is 0", "at least 1"]),
        ("evaluate sample sample --batch_size 0", ["batch_size 0", "at least 1"]),
        ("compare sample sample --limit 0", ["--limit is 0", "at least 1"]),
        ("compare sample sample --limit 1 --generate.top_p 2", ["top_p is 2.0", "top_p <= 1"]),
        ("compare sample sample --limit 1 --generate.max_new_tokens 0", ["max_new_tokens is 0", "at least 1"]),
    ],
)  # fmt: skip
def test_values_out_of_range_are_usage_errors(fails, argv, told):
    fails(argv.split(), 2, *told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"optimizer: {lerning_rate: 1}", ['unknown key "optimizer.lerning_rate"', "Did you mean optimizer.lr?"]),
        (b"optimiser: {lr: 1}", ['unknown key "optimiser.lr"', "Did you mean optimizer.lr?"]),
        (b"train: {steps: many}", ["train.steps many", "a whole number"]),
        (b"train: 5", ['"train" is a group', "--print_config", "5"]),
        (b"- 1\n- 2", ["expected groups of options", "--print_config"]), (b"", ["expected groups of options", "--print_config"]),
        (b"train:\n  steps: [", ["not valid YAML", "line 2"]), (b"train: {\xff}", ["not UTF-8", "--print_config"]),
    ],
)  # fmt: skip
def test_wrong_configuration_files_are_usage_errors(fails, tmp_path, content, told):
    (tmp_path / "mine.yaml").write_bytes(content)
    named = [] if b"many" in content else ["mine.yaml"]
    fails(["sft", "--config", tmp_path / "mine.yaml"], 2, *named, *told)
    fails([f"--config={tmp_path / 'mine.yaml'}" if w == "-" else w for w in ("sft", "-")], 2, *named, *told)


def test_debug_shows_the_traceback():
    with pytest.raises(UserError, match="nowhere"):
        main(["data", "nowhere.jsonl", "--debug"])


# ---- data ----------------------------------------------------------------------------------------------------------

PACKED = gzip.compress(lines(*[{"text": f"row {i} {i * i}"} for i in range(3000)]))
FLIPPED = PACKED[:5000] + bytes(b ^ 255 for b in PACKED[5000:5010]) + PACKED[5010:]
BAD_FILES = {
    "empty.jsonl": (b"", ["empty.jsonl", "it is empty", "messages"]),
    "empty.json": (b"", ["empty.json", "it is empty", "messages"]),
    "blank.jsonl": (b"\n\n\n", ["blank.jsonl", "it is empty", "messages"]),
    "empty.parquet": (b"", ["empty.parquet", "cannot be read as Parquet", "again"]),
    "columns.jsonl": (lines({"q": "a"}) * 5, ["5 skipped", "found q", "prompt + completion", "columns.jsonl:1"]),
    "latin.jsonl": (
        b'{"text": "\xe9"}\n' * 5,
        ["5 skipped", "invalid UTF-8", "save the file as UTF-8", "latin.jsonl:1"],
    ),
    "latin.csv": (b"prompt,completion\na,\xe9\n", ["latin.csv", "is not UTF-8", "byte 20", "save it as UTF-8"]),
    "latin.txt": (b"a\n\xe9\n", ["latin.txt", "is not UTF-8 text", "byte 2", "save it as UTF-8"]),
    "no mark.csv": ("prompt,completion\na,b\n".encode("utf-16-le"), ["no mark.csv", "zero bytes", "save it as UTF-8"]),
    "no mark.txt": ("a b\n".encode("utf-16-le"), ["no mark.txt", "zero bytes", "not a text file"]),
    "latin.json": (b'[{"text": "\xe9"}]', ["latin.json", "is not UTF-8", "byte 11", "save it as UTF-8"]),
    "broken.json": (b'[{"text": "a"},\n{"text": ', ["broken.json", "not valid JSON", "line 2"]),
    "cut.jsonl.gz": (
        PACKED[: len(PACKED) // 2],
        ["cut.jsonl.gz", "damaged gzip data after line 1,", "download it again"],
    ),
    "cut.json.gz": (PACKED[: len(PACKED) // 2], ["cut.json.gz", "damaged gzip data", "download it again"]),
    "flipped.jsonl.gz": (FLIPPED, ["flipped.jsonl.gz", "damaged gzip data", "download it again"]),
    "plain.jsonl.gz": (lines(GOOD), ["plain.jsonl.gz", "damaged gzip data", "Not a gzipped file"]),
    "rubbish.parquet": (b"PAR1rubbishPAR1", ["rubbish.parquet", "cannot be read as Parquet", "again"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_files_fail_by_name_and_reason(fails, tmp_path, name):
    data, told = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    fails(["data", tmp_path / name], 1, *told)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing", "./no/such.parquet", "no/such.jsonl"])
def test_missing_data_lists_the_names_there_are(fails, sft, name):
    fails(["data", name], 1, name, "neither a file nor a directory", "hh-static", "sample")
    fails([*sft, "--data.name", name], 1, name, "neither a file nor a directory")


def test_one_bad_row_is_counted_and_an_error_when_strict(fails, sft, tmp_path, capfd):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(GOOD) * 4 + b'{"text": "\xff"}\n' + lines(GOOD) * 2)
    assert main(["data", str(file)]) == 0
    assert (
        "1 skipped: invalid UTF-8 (invalid start byte): save the file as UTF-8 (rows.jsonl:5)" in capfd.readouterr().out
    )
    assert main([*map(str, sft), "--data.name", str(file)]) == 0
    assert (
        "1 skipped: invalid UTF-8 (invalid start byte): save the file as UTF-8 (rows.jsonl:5)" in capfd.readouterr().out
    )
    fails(["data", file, "--data.strict", "true"], 1, "--data.strict", "invalid UTF-8", "rows.jsonl:5")
    fails([*sft, "--out", tmp_path / "2", "--data.name", file, "--data.strict"], 1, "invalid UTF-8", "rows.jsonl:5")


def test_a_byte_order_mark_is_no_bad_row(tmp_path, capfd):
    """Windows writes one at the beginning of a file."""
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(GOOD, GOOD))
    assert main(["data", str(tmp_path / "rows.jsonl"), "--data.strict", "true"]) == 0


def test_a_dialogue_of_ten_thousand_tokens_is_cut_and_counted_and_an_error_when_strict(fails, sft, tmp_path, capfd):
    (tmp_path / "long.jsonl").write_bytes(lines(GOOD, LONG, GOOD, GOOD))
    sft = [*sft, "--data.name", tmp_path / "long.jsonl"]
    assert main([*map(str, sft)]) == 0
    assert "1 longer than block_size 128 lost their beginning" in (out := capfd.readouterr().out)
    assert "long.jsonl:2 with 10," in out
    told = ("--data.strict", "longer than block_size 128", "long.jsonl:2 with 10,")
    fails([*sft, "--out", tmp_path / "2", "--data.strict", "true"], 1, *told)


def test_a_prompt_of_ten_thousand_tokens_is_an_error(fails, tiny_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("hello\n" + "word " * 10_000 + "\n")
    argv = ["compare", tiny_directory, tiny_directory, "--prompts", tmp_path / "prompts.txt"]
    fails(argv, 1, "prompt 2 has 10,", "256 positions", "its last question alone is too long", "Shorten it")
    model, tokenizer = tunesmith.load(str(tiny_directory), device="cpu")
    with pytest.raises(UserError, match=r"prompt 1 has 10,.* 256 positions.*cut_front"):
        tunesmith.generate(model, tokenizer, [[{"role": "user", "content": "word " * 10_000}]])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", None, ["no such file", "one prompt per line"]), ("p.txt", b"\n\n", ["it contains no prompt", "one per line"]),
        ("p.txt", b"\xff\n", ["not UTF-8", "save it as UTF-8"]),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', ["p.jsonl:2", "not JSON", "`prompt`"]),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}', ["p.jsonl:3", "text `prompt`"]),
        ("p.jsonl", b'{"prompt": 5}', ["p.jsonl:1", "text `prompt`"]), ("p.jsonl", b"[1]", ["p.jsonl:1", "text `prompt`"]),
    ],
)  # fmt: skip
def test_bad_prompt_files_fail_by_place(fails, tiny_directory, tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    fails(["compare", tiny_directory, tiny_directory, *FEW, "--prompts", tmp_path / name], 1, "--prompts", *told)


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_a_line_separator_inside_a_prompt_does_not_cut_it(tmp_path, name):
    from tunesmith.data.prompts import load_prompts

    texts = ["one\u2028still one", "two\u0085still two"]
    written = [json.dumps({"prompt": t}, ensure_ascii=False) if name == "p.jsonl" else t for t in texts]
    (tmp_path / name).write_text("\n".join(written), encoding="utf-8")
    assert [p.text for p in load_prompts(str(tmp_path / name))] == texts


# ---- models --------------------------------------------------------------------------------------------------------

BAD_MODELS = {
    "config.json": [(None, ["no config.json"]), (b"{", ["not valid JSON", "again"]), (b"[]", ["config.json", "again"]),
                    (b'{"model_type": "bert"}', ["bert", "gpt2"]),
                    (b'{"model_type": "gpt2"}', ["does not hold this model", "config.json asks for"])],
    "tokenizer.json": [(None, ["no tokenizer.json"]), (b"{}", ["tokenizer.json", "again"])],
    "model.safetensors": [(None, ["no weights", "model.safetensors"]), (b"", ["cannot be read as weights", "again"]),
                          (b"\0" * 999, ["cannot be read as weights", "again"]), (0.5, ["cannot be read as weights", "again"])],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "damage"), [(name, i) for name, damages in BAD_MODELS.items() for i in range(len(damages))]
)
def test_damaged_models_fail_by_file_and_reason(fails, tiny_directory, tmp_path, name, damage):
    """A file is missing, holds something else, or (0.5) is cut in half."""
    content, told = BAD_MODELS[name][damage]
    file = shutil.copytree(tiny_directory, tmp_path / "model") / name
    data = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(data[: len(data) // 2] if content == 0.5 else content)
    argv = ["evaluate", tmp_path / "model", "sample", "--data.max_rows", "2"]
    fails(argv, 1, *told)


@pytest.mark.parametrize("name", ["someone/model", "nothing"])
def test_a_hub_name_while_offline_says_what_to_give_instead(fails, name):
    fails(
        ["evaluate", name, "sample"],
        1,
        f"model '{name}' is not a directory here and cannot be downloaded",
        "HF_HUB_OFFLINE",
        "local directory",
    )
    fails(
        ["data", "someone/rows"],
        1,
        "dataset 'someone/rows' is not a directory here and cannot be downloaded",
        "HF_HUB_OFFLINE",
        "DIR",
    )


def test_a_model_path_that_is_not_there(fails):
    for name in ("./nowhere", "/no/such/model", "a/b/c"):
        fails(["evaluate", name, "sample"], 1, f"model '{name}'", "no such directory")


def test_block_size_over_the_models_says_where_the_limit_comes_from(fails, sft):
    fails(
        [*sft, "--data.block_size", "512"], 1, "--data.block_size 512", "texts of up to 256 tokens", "Use 256 or less"
    )
