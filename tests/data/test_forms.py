"""Every form of a row that people have becomes what it means; nothing in it is dropped without a word."""

import json
from itertools import chain
from pathlib import Path

import pytest

from tunesmith.data.columns import parse_columns
from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import BadRow, Dialogue, Message, Preference, Text, parse_messages
from tunesmith.data.forms import Reader, parse_pair, parse_row
from tunesmith.data.hh_template import HH
from tunesmith.data.readers import Report
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UsageError, UserError
from tunesmith.options.training import DataOptions

Q, A, B = "What is the capital of Peru?", "Lima.", "I do not know."
SYSTEM = Message("system", "Be brief.")
DIALOGUE = Dialogue((Message("user", Q), Message("assistant", A)))
BRIEF = Dialogue((SYSTEM, *DIALOGUE.messages))
WORSE = Dialogue((Message("user", Q), Message("assistant", B)))
PAIR = Preference(DIALOGUE, WORSE)
BRIEF_PAIR = Preference(BRIEF, Dialogue((SYSTEM, *WORSE.messages)))
LONGER = Dialogue((Message("user", "Hi"), Message("assistant", "Hello"), *DIALOGUE.messages))


def user(text, **more):
    return {"role": "user", "content": text, **more}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


TURNS = [user(Q), said(A)]
HH_TEXT, HH_WORSE = f"\n\nHuman: {Q}\n\nAssistant: {A}", f"\n\nHuman: {Q}\n\nAssistant: {B}"
HH_PROMPT = f"\n\nHuman: {Q}\n\nAssistant:"
BRIEF_TURNS = [{"role": "system", "content": "Be brief."}, *TURNS]

FORMS = {
    "messages": ({"messages": TURNS}, DIALOGUE),
    "messages as JSON text": ({"messages": json.dumps(TURNS)}, DIALOGUE),
    "messages as a transcript": ({"messages": HH_TEXT}, DIALOGUE),
    "messages as columns of turns": ({"messages": {"role": ["user", "assistant"], "content": [Q, A]}}, DIALOGUE),
    "a bare list of turns": (TURNS, DIALOGUE),
    "roles in other letters": ({"messages": [{"role": "User ", "content": Q}, {"role": "ASSISTANT", "content": A}]}, DIALOGUE),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]}, BRIEF),
    "parts": ({"messages": [user([{"type": "text", "text": Q[:9]}, {"type": "text", "text": Q[9:]}]), said(A)]}, DIALOGUE),
    "ShareGPT": ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "system": "Be brief."}, BRIEF),
    "Alpaca": ({"instruction": Q, "input": "", "output": A}, DIALOGUE),
    "Alpaca with input": (
        {"instruction": "Translate.", "input": "hola", "output": "hello"},
        Dialogue((Message("user", "Translate.\n\nhola"), Message("assistant", "hello"))),
    ),
    "Alpaca with history": ({"instruction": Q, "input": None, "output": A, "history": [["Hi", "Hello"]]}, LONGER),
    "history of turns": ({"prompt": Q, "completion": A, "history": [user("Hi"), said("Hello")]}, LONGER),
    "no history": ({"prompt": Q, "completion": A, "history": []}, DIALOGUE),
    "question + response": ({"system_prompt": "Be brief.", "question": Q, "response": A}, BRIEF),
    "question + answer": ({"question": Q, "answer": A}, DIALOGUE),
    "instruction + response + context": (
        {"instruction": "Who?", "context": "Ann left.", "response": "Ann."},
        Dialogue((Message("user", "Who?\n\nAnn left."), Message("assistant", "Ann."))),
    ),
    "Columns In Capitals": ({"Prompt": Q, "Completion": A}, DIALOGUE),
    "system twice": ({"system": "Be brief.", "messages": BRIEF_TURNS}, BRIEF),
    "empty system": ({"system": " ", "prompt": Q, "completion": A}, DIALOGUE),
    "Orca": ({"system": "Be brief.", "question": Q, "chosen": A, "rejected": B}, BRIEF_PAIR),
    "OpenAI's preferences": (
        {"input": {"messages": [user(Q)]}, "preferred_output": [said(A)], "non_preferred_output": [said(B)]}, PAIR,
    ),
    "one turn as an object": ({"prompt": user(Q), "chosen": said(A), "rejected": said(B)}, PAIR),
    "turns as JSON text": ({"prompt": Q, "chosen": json.dumps([said(A)]), "rejected": json.dumps(said(B))}, PAIR),
    "HH": ({"chosen": HH_TEXT, "rejected": HH_WORSE}, PAIR),
    "HH without the blank lines": ({"chosen": HH_TEXT.lstrip(), "rejected": HH_WORSE.lstrip()}, PAIR),
    "HH with Windows' lines": ({"chosen": HH_TEXT.replace("\n", "\r\n"), "rejected": HH_WORSE.replace("\n", "\r\n")}, PAIR),
    "HH after one kind of line, with the other": ({"text": HH_TEXT.replace("\n\nA", "\r\n\r\nA")}, DIALOGUE),
    "HH with single breaks": ({"text": f"Human: {Q}\nAssistant: {A}"}, DIALOGUE),
    "HH with a system turn": ({"text": f"\n\nSystem: Be brief.{HH_TEXT}"}, BRIEF),
    "HH and a system column": ({"system": "Be brief.", "prompt": HH_PROMPT, "completion": f" {A}"}, BRIEF),
    "text, HH": ({"text": HH_TEXT.lstrip()}, DIALOGUE),
    "text with one marker": ({"text": "Human: beings are many.\n\nSo."}, Text("Human: beings are many.\n\nSo.")),
    "text": ({"text": "Once."}, Text("Once.")),
    "KTO, good": ({"prompt": Q, "completion": A, "label": True}, DIALOGUE),
    "KTO from CSV": ({"prompt": Q, "completion": A, "label": "True"}, DIALOGUE),
    # one text in two columns
    "prompt in lists of turns": ({"prompt": Q, "chosen": TURNS, "rejected": [user(Q), said(B)]}, PAIR),
    "prompt and system in turns": ({"prompt": [user(Q)], "chosen": BRIEF_TURNS, "rejected": [*BRIEF_TURNS[:2], said(B)]}, BRIEF_PAIR),
    "system of the prompt, turns": ({"prompt": BRIEF_TURNS[:2], "completion": TURNS}, BRIEF),
    "last question of a dialogue": ({"prompt": Q, "completion": [user("Hi"), said("Hello"), *TURNS]}, LONGER),
    "HH prompt in HH": ({"prompt": HH_PROMPT, "chosen": HH_TEXT, "rejected": HH_WORSE}, PAIR),
    "plain prompt in HH": ({"prompt": Q, "chosen": HH_TEXT, "rejected": HH_WORSE}, PAIR),
    "HH prompt in turns": ({"prompt": HH_PROMPT, "chosen": TURNS, "rejected": [user(Q), said(B)]}, PAIR),
    "marker twice": ({"prompt": HH_PROMPT, "completion": f"\n\nAssistant: {A}"}, DIALOGUE),
    "plain prompt in plain text": ({"prompt": Q, "chosen": f"{Q} {A}", "rejected": f"{Q}\n{B}"}, PAIR),
    "plain prompt in one of two": ({"prompt": Q, "chosen": f"{Q} {A}", "rejected": B}, PAIR),
    "plain prompt in completion": ({"prompt": Q, "completion": f"{Q}\n\n{A}"}, DIALOGUE),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_what_it_means(form):
    row, expected = FORMS[form]
    assert parse_row(row) == expected


def rows_of(path, split="train", pairs=False, **options):
    report = Report()
    source = open_dataset(DataOptions(name=str(path), **options))
    return [r.value for r in source.rows(split, report, pairs=pairs)], report


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- one text in two columns ---------------------------------------------------------------------------------------


def test_an_answer_that_greets_back_is_not_a_prompt_that_stands_twice(tmp_path):
    rows = [{"prompt": "Hello!", "completion": "Hello! How are you?"}] + [
        {"prompt": f"Say {i}", "completion": "x"} for i in range(5)
    ]
    found, report = rows_of(written(tmp_path / "a.jsonl", rows))
    assert found[0].messages[1].content == "Hello! How are you?"
    assert not report.notes


def test_short_prompts_count_once_where_most_answers_begin_with_them(tmp_path):
    rows = [{"prompt": f"Q{i}", "chosen": f"Q{i} good", "rejected": f"Q{i} bad"} for i in range(5)]
    rows.append({"prompt": "Q", "chosen": "Quite so", "rejected": "Quick"})
    found, report = rows_of(written(tmp_path / "a.jsonl", rows))
    assert [row.chosen.messages[1].content for row in found] == ["good"] * 5 + ["Quite so"]
    assert report.notes == ["5 rows: the answer begins with the prompt, which is used only once"]


def test_a_prompt_that_the_turns_do_not_hold_stays(tmp_path):
    found = parse_row({"prompt": "Other", "completion": TURNS})
    assert [m.content for m in found.messages] == ["Other", Q, A]


# ---- columns that change the meaning -------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [False, 0, "false", "False", "0"])
@pytest.mark.parametrize("form", [{"prompt": Q, "completion": A}, {"messages": TURNS}], ids=["prompt", "messages"])
def test_rows_marked_as_bad_are_left_out_counted_and_named(tmp_path, label, form):
    found, report = rows_of(written(tmp_path / "a.jsonl", [{**form, "label": label}, {**form, "label": True}, form]))
    assert found == [DIALOGUE] * 2
    assert report.lines() == ["1 skipped: label is false: an answer marked as bad is not learned (a.jsonl:1)"]


def test_a_label_that_is_a_class_is_named_and_a_mapping_can_take_it_away(tmp_path):
    file = written(tmp_path / "a.jsonl", [{"prompt": Q, "completion": A, "label": "geography"}] * 2)
    found, report = rows_of(file)
    assert (len(found), report.notes) == (2, ["not used: label in 2 rows, where it is neither true nor false"])
    file = written(tmp_path / "b.jsonl", [{"prompt": Q, "completion": A, "label": 0}])
    assert rows_of(file, columns="label=")[1].notes == ["not used: label"]
    assert rows_of(written(tmp_path / "c.jsonl", [{"text": "a", "label": 0}]))[1].notes == ["not used: label"]


def test_a_turn_of_weight_0_carries_no_loss_and_the_tokens_stay(tmp_path, tokenizer):
    turns = [user(Q), said("WRONG", weight=0), user("Sure?"), said(A, weight=1)]
    file = written(tmp_path / "a.jsonl", [{"messages": turns}])
    plain = written(
        tmp_path / "b.jsonl", [{"messages": [{k: v for k, v in t.items() if k != "weight"} for t in turns]}]
    )
    store, whole = (tokenise(open_dataset(DataOptions(name=str(f))), "train", tokenizer) for f in (file, plain))
    assert store.tokens.tolist() == whole.tokens.tolist()
    targets = [t for t in store.row(0, "assistant")[1] if t >= 0]
    assert tokenizer.decode(targets[:-1]) == f" {A}"
    assert targets[-1] == tokenizer.end_of_text
    assert any("1 turn has weight 0" in note for note in store.report.notes)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user(Q), said(A, weight=0)]}, "every answer has weight 0"),
        ({"messages": [user(Q), said(A, weight=0.5)]}, "weight 0.5: only 0"),
        ({"messages": [user(Q), said(A, weight="x")]}, "'x' is not a number"),
        ({"prompt": Q, "completion": A, "weight": 0}, "weight 0: not to be learned"),
        ({"text": "a", "weight": 2}, "weight 2: only 0"),
        ({"prompt": Q, "chosen": [said(A, weight=0)], "rejected": B}, "the chosen answer has weight 0"),
        ({"prompt": Q, "chosen": A, "rejected": B, "weight": 0.3}, "weight 0.3: only 0"),
        ({"messages": [user(Q), said(None, tool_calls=[{"id": 1}])]}, "a turn with tool calls: .*remove them"),
        ({"messages": [user(Q), {"role": "tool", "content": "18 C"}, said(A)]}, "unknown role 'tool': .*remove them"),
        ({"messages": [{"from": "human", "value": Q}, {"from": "observation", "value": "x"}]}, "unknown role 'observation'.*remove them"),
        ({"messages": [user([{"type": "image"}]), said(A)]}, "a part of type 'image': only text"),
        ({"text": Q, "role": "prompter", "message_id": 1}, "one turn per row .*join"),
        ({"prompt": Q, "completion": A, "history": "Hi"}, "`history` is neither"),
        ({"prompt": Q, "completion": A, "system": 5}, "`system` is not text"),
        ({"messages": [{"role": [[]], "content": "x"}]}, "unknown role"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_a_bad_row_with_its_reason(row, reason):
    with pytest.raises(BadRow, match=reason):
        (parse_pair if "chosen" in row else parse_row)(row)


def test_the_tool_calls_of_a_turn_without_any_do_not_matter():
    """As `datasets` stores turns: every key in every turn, null where it has no value."""
    turns = [
        {"role": m.role, "content": m.content, "tool_calls": None, "weight": None, "name": None}
        for m in DIALOGUE.messages
    ]
    assert parse_row({"messages": turns}) == DIALOGUE


# ---- what is said of a set -----------------------------------------------------------------------------------------


def test_the_form_and_what_became_of_columns_and_roles_is_said_and_the_unused_named_once(tmp_path):
    rows = [
        {"id": i, "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A, "markdown": 1}]}
        for i in range(3)
    ]
    rows += [{"instruction": Q, "input": "", "output": A, "source": "me"}]
    _, report = rows_of(written(tmp_path / "a.jsonl", rows))
    assert report.form == [
        "form: conversations (3 rows): conversations -> turns",
        "form: instruction + input + output (1 row): instruction -> user turn, input -> added to the user turn, output -> assistant turn",
        "roles: human -> user, gpt -> assistant",
    ]
    assert report.notes == ["not used: id, source", "not used in turns: markdown"]


def test_columns_are_mapped_by_hand(tmp_path):
    file = written(tmp_path / "a.jsonl", [{"ask": Q, "reply": A, "prompt": "no", "note": "x"}])
    found, report = rows_of(file, columns="prompt=ask, completion=reply")
    assert (found, report.notes) == ([DIALOGUE], ["not used: note, prompt"])
    pair = written(tmp_path / "b.jsonl", [{"q": Q, "good": A, "bad": B}])
    assert rows_of(pair, pairs=True, columns="prompt=q,chosen=good,rejected=bad")[0] == [PAIR]
    for wrong in ("prompt", "promt=ask", "input=ask"):
        with pytest.raises(UsageError, match="KEY=COLUMN; the keys are messages, text"):
            parse_columns(wrong)
    with pytest.raises(UsageError, match=r"--data\.columns is for your own files"):
        rows_of("sample", columns="prompt=ask")
    with pytest.raises(UserError, match="no known columns"):
        rows_of(file, columns="prompt=nothing,completion=reply")


def test_a_column_that_no_row_has_is_named_with_a_near_one(tmp_path):
    file = written(tmp_path / "a.jsonl", [{"ask": Q, "reply": A, "sytem": "Be brief."}])
    told = r"found ask, reply, sytem; --data\.columns completion=repli names none of them\. Did you mean reply\?"
    with pytest.raises(UserError, match=told):
        rows_of(file, columns="prompt=ask,completion=repli")
    found, report = rows_of(file, columns="prompt=ask,completion=reply,system=system")
    assert found == [DIALOGUE]
    assert "--data.columns system=system: no row has such a column. Did you mean sytem?" in report.notes
    assert not any("--data.columns" in n for n in rows_of(file, columns="prompt=ask,completion=reply,label=")[1].notes)


def test_a_changed_mapping_is_another_key_in_the_cache(tmp_path):
    file = written(tmp_path / "a.jsonl", [{"ask": Q, "prompt": "no", "completion": A}])
    keys = {open_dataset(DataOptions(name=str(file), columns=c)).fingerprint("train") for c in (None, "prompt=ask")}
    assert len(keys) == 2


def test_the_sample_keeps_its_key_in_the_cache():
    """Read as ever: what was tokenised before is found."""
    found = [open_dataset(DataOptions(name="sample")).fingerprint(s) for s in ("train", "test")]
    assert [f[:16] for f in found] == ["8861f2ea30626be0", "6822ae6b42700eb5"]


def test_reading_is_the_same_through_any_reader():
    reader = Reader()
    for row, expected in FORMS.values():
        assert reader.read(row) == expected
    assert reader.rows.total() == len(FORMS)


def test_rendered_dialogues_come_back_as_they_were():
    """A system turn is written before the first marker, and read there."""
    for row, _ in FORMS.values():
        dialogue = parse_row(row)
        if isinstance(dialogue, Dialogue):
            assert parse_row({"text": HH.text(dialogue.messages)}) == dialogue


@pytest.mark.parametrize("depth", [500, 900])
def test_rows_that_parse_but_nest_deeply_are_bad_rows(depth):
    nested = list(chain([None]))
    for _ in range(depth):
        nested = [nested]
    with pytest.raises(BadRow):
        parse_row({"messages": [{"role": nested, "content": "x"}]})
    with pytest.raises(BadRow):
        parse_messages(nested)


def test_the_examples_of_the_page_are_read_as_it_says():
    """docs/data.md: the table of forms; rows with `...` show only a beginning."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = page[page.index("| form | an example | becomes |") : page.index("**Names of columns**")]
    kinds = {"a dialogue": Dialogue, "a preference": Preference, "plain text": Text}
    found = 0
    for line in filter(None, table.splitlines()[2:]):
        name, example, becomes = (cell.strip() for cell in line.strip("| \n").split(" | "))
        if "..." in example:
            continue
        found += 1
        row = json.loads(example.strip("`"))
        if becomes.startswith("nothing"):
            with pytest.raises(BadRow, match="label is false"):
                parse_row(row)
        else:
            kind = next(kind for start, kind in kinds.items() if becomes.startswith(start))
            assert isinstance(parse_row(row), kind), name
    assert found >= 12
