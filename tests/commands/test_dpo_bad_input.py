"""What users of `tunesmith dpo` get wrong, through the real command line: exit code, and one line with cause and remedy."""

import json

import pytest
import test_bad_input

from tunesmith.__main__ import main

fails = test_bad_input.fails  # the fixture
GOOD = {"prompt": "What?", "chosen": "Tea.", "rejected": "No."}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fine"}]}
APART = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}


@pytest.fixture
def dpo(tiny_directory, tmp_path):
    """The smallest training, to which a test adds its mistake."""
    return [
        "dpo", "--model.name", tiny_directory, "--data.name", "sample", "--data.block_size", "128", "--data.max_rows", "8",
        "--train.steps", "1", "--eval.iters", "1", "--train.device", "cpu", "--train.precision", "fp32", "--out", tmp_path / "run",
    ]  # fmt: skip


@pytest.fixture
def with_rows(dpo, tmp_path):
    """The same on rows of a file of its own."""

    def command(*rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [*dpo, "--data.name", tmp_path / name]

    return command


def test_the_smallest_training_works_without_a_mistake(dpo, with_rows, tmp_path, capfd):
    """Else the tests below would prove nothing."""
    for argv in (dpo, [*with_rows(GOOD, {**GOOD, "prompt": "Why?"}), "--out", tmp_path / "2"]):
        assert main([str(word) for word in argv]) == 0
        assert capfd.readouterr().err == ""


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--dpo.beta 0", ["--dpo.beta is 0", "more than 0"]),
        ("--dpo.beta -1", ["--dpo.beta is -1", "more than 0"]),
        ("--dpo.beta nan", ["--dpo.beta nan", "a number"]),
        ("--dpo.beta inf", ["--dpo.beta inf", "a number"]),
        ("--dpo.betta 1", ["unknown option --dpo.betta", "Did you mean --dpo.beta?"]),
        ("--dpo.loss sigmoidal", ["--dpo.loss sigmoidal", "sigmoid, ipo, hinge or robust"]),
        ("--dpo.reference none", ["--dpo.reference none", "auto, model, adapter or cached"]),
        ("--dpo.label_smoothing 0.5", ["--dpo.label_smoothing is 0.5", "less than 0.5"]),
        ("--dpo.label_smoothing -0.1", ["--dpo.label_smoothing is -0.1", "0 or more"]),
        ("--dpo.label_smoothing 0.1 --dpo.loss hinge", ["no effect with --dpo.loss hinge", "use sigmoid or robust"]),
        ("--dpo.label_smoothing 0.1 --dpo.loss ipo", ["no effect with --dpo.loss ipo", "use sigmoid or robust"]),
        ("--dpo.reference adapter", ["--dpo.reference adapter", "--lora.rank", "cached or model"]),
        ("--dpo.reference cached --dpo.reference_device cpu", ["--dpo.reference_device is for a second model", "cached"]),
        ("--dpo.reference adapter --lora.rank 2 --dpo.reference_device cpu", ["--dpo.reference_device", "adapter"]),
        ("--data.batching windows", ["--data.batching windows", "use packed or padded"]),
        ("--data.truncation split", ["--data.truncation split", "keep_end, keep_start or drop"]),
        ("--dpo.beta 0 --train.steps 0 --lora.rank -1", ["--dpo.beta is 0", "--train.steps is 0", "--lora.rank is -1"]),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_usage_errors(fails, dpo, options, told):
    fails([*dpo, *options.split(" ")], 2, *told)


def test_a_device_that_is_not_there_is_named_with_its_own_option(fails, dpo):
    fails([*dpo, "--train.device", "cuda:7"], 1, "--train.device cuda:7", "use auto or cpu")
    fails([*dpo, "--dpo.reference_device", "cuda:7"], 1, "--dpo.reference_device cuda:7")


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (APART, "the prompts of chosen and rejected differ"),
        ({**GOOD, "chosen": ""}, "empty chosen answer"),
        ({**GOOD, "rejected": " "}, "empty rejected answer"),
        ({**GOOD, "rejected": "Tea."}, "chosen and rejected are the same"),
        (MESSAGES, "no pair (columns chosen and rejected)"),
        ({"text": "once upon a time"}, "no pair (columns chosen and rejected)"),
    ],
)
def test_a_file_without_a_usable_pair_fails_by_reason_and_place(fails, with_rows, row, reason):
    told = (
        "rows.jsonl (train) has no usable row",
        f"4 skipped: {reason}",
        "rows.jsonl:1, rows.jsonl:2, rows.jsonl:3, ...",
    )
    fails(with_rows(*[row] * 4), 1, *told)


def test_one_bad_pair_is_told_and_an_error_when_strict(fails, with_rows, tmp_path, capfd):
    argv = with_rows(GOOD, APART, {**GOOD, "prompt": "Why?"}, {**GOOD, "chosen": ""})
    assert main([str(word) for word in argv]) == 0
    out = capfd.readouterr().out
    assert "train: 1 skipped: the prompts of chosen and rejected differ (rows.jsonl:2)" in out
    assert "train: 1 skipped: empty chosen answer (rows.jsonl:4)" in out
    strict = [*argv, "--out", tmp_path / "2", "--data.strict", "true"]
    fails(strict, 1, "--data.strict", "prompts of chosen and rejected differ (rows.jsonl:2)", "empty chosen answer")


def test_one_usable_pair_cannot_be_split(fails, with_rows):
    fails(with_rows(GOOD), 1, "one usable row cannot be split", "test.*")


def test_a_pair_that_is_cut_is_told_and_an_error_when_strict(fails, with_rows, tmp_path, capfd):
    rows = [{**GOOD, "prompt": f"{'word ' * n}?"} for n in (3, 4, 900, 5)]
    argv = [*with_rows(*rows), "--data.holdout", "0.25", "--data.seed", "1"]
    assert main([str(word) for word in argv]) == 0
    assert "1 pair: the beginning of the prompt lost at block_size 128 (rows.jsonl:3)" in capfd.readouterr().out
    told = ("--data.strict", "the beginning of the prompt lost", "rows.jsonl:3")
    fails([*argv, "--out", tmp_path / "2", "--data.strict", "true"], 1, *told)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("keep_end", "an answer leaves no room for the prompt, left out"),
        ("keep_start", "answers become identical, left out"),
        ("drop", "too long, left out"),
    ],
)
def test_a_block_size_that_leaves_no_pair_says_why(fails, with_rows, rule, reason):
    rows = [{"prompt": f"What is {i}?", "chosen": "a b c d", "rejected": "e f g h"} for i in range(4)]
    argv = [*with_rows(*rows), "--data.block_size", "3", "--data.truncation", rule]
    fails(argv, 1, "no pair of", "rows.jsonl (train) is left to learn from", reason, "block_size 3", "rows.jsonl:")


def test_block_size_over_the_models_says_where_the_limit_comes_from(fails, dpo):
    fails(
        [*dpo, "--data.block_size", "512"], 1, "--data.block_size 512", "texts of up to 256 tokens", "Use 256 or less"
    )


def test_sft_data_that_is_not_there_is_named(fails, dpo):
    fails([*dpo, "--dpo.sft_data", "nowhere.jsonl"], 1, "nowhere.jsonl", "neither a file nor a directory")


def test_bad_and_cut_rows_of_the_sft_data_are_told_as_any_others(dpo, tmp_path, capfd):
    long = {"prompt": "word " * 900, "completion": "x"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in (MESSAGES, {"q": 1}, long, MESSAGES))
        )
    assert main([*map(str, dpo), "--dpo.sft_data", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "1 skipped: no known columns" in out
    assert "test.jsonl:2" in out
    assert "1 longer than block_size 128 lost their beginning" in out


def test_a_run_is_neither_overwritten_nor_continued_as_another(fails, dpo, capfd):
    assert main([str(word) for word in dpo]) == 0
    capfd.readouterr()
    fails(dpo, 1, "already holds a run (finished at step 1)", "--resume", "--out")
    fails([*dpo, "--resume", "--dpo.beta", "0.5"], 1, "dpo.beta was 0.1, now 0.5", "--out")
    fails([*dpo, "--resume", "--lora.rank", "2"], 1, "lora.rank was 0, now 2", "--out")


def test_a_diverged_run_fails_with_its_reason(fails, dpo):
    argv = [*dpo, "--optimizer.lr", "5", "--train.steps", "30", "--train.diverge_after", "2", "--eval.every", "99"]
    fails(argv, 1, "train.jsonl:", "lower --optimizer.lr (now 5)")
