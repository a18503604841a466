"""Prompts come through the reader of data: in any of its forms, and never with a marker twice."""

import json

import pytest

from tunesmith.data.dialogue import Message
from tunesmith.data.prompts import Prompt, conversation, encode_answered, encode_prompt, load_prompts
from tunesmith.errors import UserError

Q, A = "What is love?", "A feeling."
ASKED, ANSWERED = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
HH = f"\n\nHuman: {Q}\n\nAssistant:"
LONGER = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", Q))
ONE, SEVERAL = [Prompt(Q)], [Prompt(f"Human: Hi\n\nAssistant: Hello\n\nHuman: {Q}", "", LONGER)]

FILES = {
    "lines.txt": (f"{Q}\n\n  {Q}  \n", ONE * 2),
    "no suffix": (Q, ONE),
    "marked lines.txt": (f"Human: {Q}\nHuman: {Q}\n", ONE * 2),
    "hh.txt": (HH, ONE),
    "hh several.txt": (HH * 2, ONE * 2),
    "hh longer.txt": (f"Human: Hi\n\nAssistant: Hello{HH}", SEVERAL),
    "windows.txt": ((HH * 2).replace("\n", "\r\n"), ONE * 2),
    "prompt.jsonl": (json.dumps({"prompt": Q, "group": "g"}), [Prompt(Q, "g")]),
    "strings.jsonl": (json.dumps(Q), ONE),
    "hh.jsonl": (json.dumps({"prompt": HH}), ONE),
    "hh without its end.jsonl": (json.dumps({"prompt": f"\n\nHuman: {Q}"}), ONE),
    "hh with a space.jsonl": (json.dumps({"prompt": f"{HH} "}), ONE),
    "hh longer.jsonl": (json.dumps({"prompt": f"\n\nHuman: Hi\n\nAssistant: Hello{HH}"}), SEVERAL),
    "messages.jsonl": (json.dumps({"messages": [ASKED]}), ONE),
    "dialogue.jsonl": (json.dumps({"messages": [ASKED, ANSWERED]}), ONE),
    "turns.jsonl": (json.dumps([{"role": m.role, "content": m.content} for m in LONGER]), SEVERAL),
    "prompt of turns.jsonl": (json.dumps({"prompt": [ASKED]}), ONE),
    "question.jsonl": (json.dumps({"question": Q}), ONE),
    "rows.jsonl": (json.dumps({"instruction": Q, "output": A}), ONE),
    "pairs.jsonl": (json.dumps({"prompt": Q, "chosen": A, "rejected": "No"}), ONE),
    "transcripts.jsonl": (json.dumps({"chosen": f"{HH} {A}", "rejected": f"{HH} No"}), ONE),
    "array.json": (json.dumps([{"prompt": Q}, {"prompt": Q}], indent=1), ONE * 2),
    "strings.json": (json.dumps([Q, Q]), ONE * 2),
    "columns.json": (json.dumps({"prompt": [Q, Q]}), ONE * 2),
    "rows.csv": (f"prompt,group\n{Q},g\n", [Prompt(Q, "g")]),
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_of_every_file(tmp_path, name):
    content, expected = FILES[name]
    (tmp_path / name).write_text(content, newline="")
    assert load_prompts(str(tmp_path / name)) == expected


def test_a_system_turn_goes_before_the_question(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"system": "Be brief.", "prompt": Q}))
    (prompt,) = load_prompts(str(tmp_path / "a.jsonl"))
    assert prompt.conversation == (Message("system", "Be brief."), Message("user", Q))
    assert prompt.text == f"System: Be brief.\n\nHuman: {Q}"


def test_what_is_scored_is_what_was_asked(tokenizer):
    """A conversation is kept as its transcript; scorers take it apart again."""
    (prompt,) = SEVERAL
    assert tuple(conversation(prompt.text)) == LONGER
    asked = encode_prompt(tokenizer, prompt.conversation)
    assert encode_answered(tokenizer, conversation(prompt.text), A) == (asked, tokenizer.encode(f" {A}"))
    assert conversation(Q) == conversation([ASKED])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"prompt": "a"}\n{"text": "b"}', r"p\.jsonl:2: a text without roles; .*text `prompt`"),
        ('{"prompt": "a"}\n{"messages": [{"role": "tool", "content": "x"}]}', r"p\.jsonl:2: unknown role 'tool'"),
        ('{"prompt": "a"}\n{"q": ' + "9" * 6000 + "}", r"p\.jsonl:2: not JSON \(a number with too many digits\)"),
        ('{"prompt": "a"}\n' + "[" * 100_000, r"p\.jsonl:2: not JSON \(nested too deeply\)"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"p\.jsonl:1: it contains no prompt"),
    ],
    ids=range(5),
)  # fmt: skip
def test_what_is_no_prompt_fails_by_its_place(tmp_path, content, told):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=told):
        load_prompts(str(tmp_path / "p.jsonl"))
