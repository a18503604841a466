"""Public models' chat templates: what is said of them in `public_templates`, checked with transformers alone."""

from pathlib import Path

import pytest

from public_templates import PUBLIC, theirs_of
from real_dialogues import SYSTEM, embedded, real

every_public = pytest.mark.parametrize("name", PUBLIC)
TALK = [
    {"role": "user", "content": " Hi, what is 12345? "},
    {"role": "assistant", "content": " A number.\n\n\nYes  two \u00e9 \U0001f600\n"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Words."},
]


def rendered(theirs, messages, follows=False):
    return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=follows)


@every_public
def test_an_answer_is_its_words_between_the_prompt_and_the_end(name):
    public, theirs = PUBLIC[name], theirs_of(PUBLIC[name])
    whole, found = rendered(theirs, TALK), []
    for number in (1, 3):
        words = TALK[number]["content"].strip() if public.strips else TALK[number]["content"]
        prompt = rendered(theirs, TALK[:number], True)
        found.append(whole.startswith(f"{prompt}{public.lead}{words}{public.tail}{public.ends}"))
    assert found == {"all": [True, True], "last": [False, True], "none": [False, False]}[public.learns]


@every_public
def test_what_becomes_of_a_system_turn(name):
    public, theirs = PUBLIC[name], theirs_of(PUBLIC[name])
    scene = [{"role": "system", "content": SYSTEM}]
    if public.system == "refused":
        with pytest.raises(Exception, match=r"System role not supported|must alternate"):
            rendered(theirs, scene + TALK)
    else:
        assert (SYSTEM in rendered(theirs, scene + TALK[:1], True)) == (public.system != "dropped")
        assert (SYSTEM in rendered(theirs, scene + TALK)) == (public.system == "kept")


@every_public
def test_two_questions_in_a_row(name):
    public, theirs = PUBLIC[name], theirs_of(PUBLIC[name])
    if public.alternates:
        with pytest.raises(Exception, match="must alternate"):
            rendered(theirs, [TALK[0], TALK[2]], True)
    else:
        assert "More" in rendered(theirs, [TALK[0], TALK[2]], True)


def test_the_table_in_the_docs_lists_them_with_what_becomes_of_their_turns():
    page = (Path(__file__).parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")][1:]
    listed = {
        model.removesuffix(" (ChatML)"): (learns, system.split(":")[0], twice) for model, learns, system, twice in rows
    }
    kept = {False: "kept", True: "refused"}
    facts = {
        p.model: (p.learns, p.system.replace("moved", "moved to the last question"), kept[p.alternates])
        for p in PUBLIC.values()
    }
    assert listed == facts


def test_there_are_two_hundred_real_dialogues_of_many_turns(shared_data):
    talks = real(shared_data, 200)
    assert len(talks) == 200
    assert sum(len(talk) > 2 for talk in talks) > 100
    assert {talk[-1]["role"] for talk in [*talks, *embedded(24)]} == {"assistant"}
