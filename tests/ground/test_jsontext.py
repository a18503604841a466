"""JSON from outside is parsed in one place, and fails in one way."""

import json
from pathlib import Path

import pytest

from tunesmith.files.answers import read_answers
from tunesmith.files.run import Run
from tunesmith.jsontext import parse_json, parse_json_from

PACKAGE = Path(__file__).parents[2] / "src" / "tunesmith"
BAD = {"deep": "[" * 100_000 + "]" * 100_000, "digits": f'{{"a": {"9" * 6000}}}', "cut": '{"a": ', "empty": ""}


@pytest.mark.parametrize("bad", BAD)
def test_whatever_is_wrong_with_json_is_one_kind_of_error(bad):
    for text in (BAD[bad], BAD[bad].encode()):
        with pytest.raises(json.JSONDecodeError):
            parse_json(text)
    with pytest.raises(json.JSONDecodeError):
        parse_json_from(BAD[bad], 0)


def test_json_is_what_it_says():
    assert (
        parse_json('{"a": [1, 2.5, null, "é"]}')
        == parse_json('{"a": [1, 2.5, null, "é"]}'.encode())
        == {"a": [1, 2.5, None, "é"]}
    )
    assert parse_json_from("[1] [2]", 4) == ([2], 7)


def test_nobody_parses_json_in_a_way_of_their_own():
    """`data/backend.py` and `data/tokenizer.py` read what the Rust library wrote."""
    own = [
        p
        for p in PACKAGE.rglob("*.py")
        if p.name not in ("jsontext.py", "backend.py", "tokenizer.py") and "json.load" in p.read_text()
    ]
    assert own == []


@pytest.mark.parametrize("bad", ["deep", "digits"])
def test_answers_and_metrics_that_nobody_can_read_are_named(tmp_path, bad):
    (tmp_path / "answers.jsonl").write_text(BAD[bad])
    with pytest.raises(Exception, match=r"answers\.jsonl:1: not a valid answer"):
        read_answers(tmp_path / "answers.jsonl")
    (tmp_path / "metrics.jsonl").write_text(BAD[bad] + "\n{}\n")
    (tmp_path / "status.json").write_text(BAD[bad])
    for ask in (lambda run: run.metrics("train"), lambda run: run.status):
        with pytest.raises(Exception, match=r"metrics\.jsonl|status\.json") as caught:
            ask(Run(tmp_path))
        assert type(caught.value).__name__ == "UserError"
