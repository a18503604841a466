"""`tunesmith data`: the form first, brackets where there is no colour, and one data set at a time."""

import json
from types import SimpleNamespace

import pytest
from rich.text import Text

from tunesmith.__main__ import main
from tunesmith.commands.data import bracketed
from tunesmith.train.splits import Data

TURNS = [("user", "Hi"), ("assistant", "WRONG"), ("user", "Sure?"), ("assistant", "Hello")]


@pytest.fixture
def rows(tmp_path):
    """Two dialogues, of each the first answer with weight 0."""
    messages = [{"role": r, "content": c, "weight": int(c != "WRONG")} for r, c in TURNS]
    (tmp_path / "a.jsonl").write_text((json.dumps({"id": 1, "messages": messages}) + "\n") * 2)
    return tmp_path / "a.jsonl"


def test_the_form_comes_first_and_loss_stands_in_brackets(rows, capsys):
    assert main(["data", str(rows), "--tokenizer", "sample", "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("form: messages (2 rows): messages -> turns\nroles: user -> user, assistant -> assistant\n")
    assert "note: not used: id\n" in out
    assert "Assistant: WRONG\n\nHuman: Sure?\n\nAssistant:[ Hello<|endoftext|>]\n" in out
    assert "[...] carries loss" in out


def test_all_tokens_in_brackets_where_all_carry_loss(rows, capsys):
    main(["data", str(rows), "--tokenizer", "sample", "--show", "1", "--data.loss_on", "all"])
    out = capsys.readouterr().out
    assert "uman: Hi\n\nAssistant: WRONG\n\nHuman: Sure?\n\nAssistant: Hello<|endoftext|>]" in out


def test_brackets_join_what_belongs_together():
    row = Text().append("a", style="dim").append(" b", style="black on green").append(" c", style="black on green")
    assert bracketed(row.append("<end>", style="white on red").append("d", style="dim")) == "a[ b c<end>]d"


def test_the_forms_of_unlike_splits_are_told_apart(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "Human: a\\n\\nAssistant: b"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    main(["data", str(tmp_path), "--tokenizer", "sample"])
    told = [
        "train: form: text (3 rows): text -> text", "train: 1 text is a transcript, split into turns",
        "train: roles: Human -> user, Assistant -> assistant", "test: form: prompt + completion (1 row): prompt -> user turn",
    ]  # fmt: skip
    assert capsys.readouterr().out.startswith("\n".join(told))


def test_an_audit_says_the_form_too_and_names_its_tokenizer(tmp_path, capsys):
    pairs = [{"prompt": f"Why {i}?", "chosen": "Because of this.", "rejected": "No."} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert main(["data", str(tmp_path / "a.jsonl"), "--audit", "--tokenizer", "sample"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("form: prompt + chosen + rejected (9 rows): prompt -> user turn")
    assert "counted in tokens of this tokenizer" in out
    assert "--tokenizer MODEL" in out


def test_rows_that_are_lists_can_be_audited(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text((json.dumps([{"role": r, "content": c} for r, c in TURNS]) + "\n") * 2)
    assert main(["data", str(tmp_path / "a.jsonl"), "--audit", "--tokenizer", "sample"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("form: list of turns (2 rows)")
    assert "1 row: duplicate of an earlier row" in out


def test_an_audit_finds_no_doubled_prompt_to_join(tmp_path, capsys):
    """Such rows were advised to be joined, which made it worse; now the prompt counts once."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "a.jsonl").write_text(
        json.dumps(
            {"prompt": "Why?", "chosen": turns, "rejected": [*turns[:1], {"role": "assistant", "content": "No."}]}
        )
    )
    main(["data", str(tmp_path / "a.jsonl"), "--audit", "--tokenizer", "sample"])
    out = capsys.readouterr().out
    assert "same role twice" not in out
    assert "1 row: the answer begins with the prompt, which is used only once" in out


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["data", "sample", "--data.name", "hh"], 2, "DATASET sample and --data hh name two different things; give one of them"),
        (["evaluate", "sample", "sample", "--data.name", "hh"], 2, "DATASET sample and --data hh name two different things"),
        (["data", "smaple"], 1, "Did you mean sample?"), (["data", "hh:helpful"], 1, "Did you mean hh:helpful-base?"),
        (["data", "{here}/b.jsonl"], 1, "Did you mean {here}/a.jsonl?"), (["data", "hh-sttaic"], 1, "Did you mean hh-static?"),
        (["data", "{here}/a.jsonl", "--data.columns", "promt=x"], 2, "the keys are messages, text, system, prompt"),
        (["data", "{here}/a.jsonl", "--data.config", "x"], 2, "a.jsonl is one file"),
        (["data", "sample", "--data.config", "x"], 2, "sample has fixed columns and no configurations"),
    ],
)  # fmt: skip
def test_wrong_names_are_told_with_the_right_one(rows, capsys, argv, code, told):
    here = str(rows.parent)
    assert main([word.replace("{here}", here) for word in argv]) == code
    err = capsys.readouterr().err
    assert told.replace("{here}", here) in err
    assert err.count("\n") == 1


def test_a_training_says_in_whose_tokens_answers_are_long(capsys):
    """`data --audit` counts with --tokenizer, so its figure for the same pairs may differ."""

    class Pairs(list):
        used = staticmethod(lambda iters: [0, 1])
        longer_chosen = staticmethod(lambda numbers: 0.5)
        different_prompts = len

    train, validation = (SimpleNamespace(rows=Pairs(pairs)) for pairs in ([1] * 5, [1, 2]))
    Data(None, train, validation, []).pairs_event(3)
    told = "in 50.0% of the 2 validation pairs the chosen answer is the longer one, in tokens of this model"
    assert told in capsys.readouterr().out
