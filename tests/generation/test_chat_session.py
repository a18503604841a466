"""A chat's session without terminal or model: commands, notes, and what an answer that breaks off leaves behind."""

import json

import pytest

from tunesmith.data.dialogue import Message
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.names import SAMPLE
from tunesmith.generation.chat import HELP, ChatSession, Note
from tunesmith.generation.context import fit

HI = [Message("user", "Hi"), Message("assistant", "Hello 0.")]


def greet(messages, number):
    yield "Hello "
    yield f"{number}."
    return "stop"


def broken(error):
    def source(messages, number):
        yield "Hel"
        raise error

    return source


def said(session, *lines):
    return [list(session.send(line)) for line in lines]


def note(session, line):
    """The one line that a command leads to."""
    (found,) = session.send(line)
    assert isinstance(found, Note)
    assert "\n" not in found.text
    return found


def test_an_answer_comes_in_pieces_and_joins_the_conversation():
    session = ChatSession(greet)
    assert said(session, " Hi \n", "", "  \n") == [["Hello ", "0."], [], []]
    assert session.messages == HI


def test_the_source_gets_the_whole_conversation_with_the_system_prompt():
    read = []

    def source(messages, number):
        read.append(list(messages))
        yield "Yes."
        return "stop"

    said(ChatSession(source, "Be brief."), "a", "b\n\nc")
    system, a, yes = Message("system", "Be brief."), Message("user", "a"), Message("assistant", "Yes.")
    assert read == [[system, a], [system, a, yes, Message("user", "b\n\nc")]]


def test_retry_draws_another_answer_and_a_new_question_begins_with_the_first():
    session = ChatSession(greet)
    said(session, "Hi", "/retry", "/retry")
    assert session.messages == [HI[0], Message("assistant", "Hello 2.")]
    assert said(session, "And?") == [["Hello ", "0."]]


@pytest.mark.parametrize("line", ["/retry", "/reset now", "/retry but shorter", "/sace x", "/QUIT", "/"])
def test_what_cannot_be_done_is_one_line_and_changes_nothing(line):
    session = ChatSession(greet, "Be brief.")
    assert note(session, line).failed
    assert session.messages == [Message("system", "Be brief.")]
    assert not session.over


def test_an_unknown_command_names_the_near_one_and_help():
    text = note(ChatSession(greet), "/sace file").text
    assert all(part in text for part in ("/sace", "/save", "/help"))


def test_two_slashes_send_a_message_that_begins_with_one():
    session = ChatSession(greet)
    said(session, "//usr/bin: what is it?")
    assert session.messages[0] == Message("user", "/usr/bin: what is it?")


def test_the_system_prompt_is_shown_set_and_removed_and_only_setting_begins_anew():
    session = ChatSession(greet)
    said(session, "Hi")
    assert "no system prompt" in note(session, "/system").text
    assert session.messages == HI
    note(session, "/system\nBe brief.\nBe kind.")
    assert session.messages == [Message("system", "Be brief.\nBe kind.")]
    said(session, "Hi")
    assert "Be brief." in "".join(n.text for n in session.send("/system"))
    assert len(session.messages) == 3
    note(session, "/reset")
    assert [m.role for m in session.messages] == ["system"]
    note(session, "/system off")
    assert session.messages == []


def test_help_lists_every_command_in_60_columns():
    (found,) = ChatSession(greet).send("/help")
    assert found == Note(HELP)
    assert max(map(len, HELP.splitlines())) <= 60
    assert all(c in HELP for c in ("/reset", "/system", "/retry", "/save", "/help", "/quit", "//"))


def test_quit_ends_the_session():
    session = ChatSession(greet)
    assert said(session, "/quit") == [[]]
    assert session.over


@pytest.mark.parametrize(("ending", "word"), [("length", "token limit"), ("context", "context is full")])
def test_an_answer_that_was_cut_is_followed_by_a_line_about_it(ending, word):
    def source(messages, number):
        yield "Once upon a"
        return ending

    pieces = list(ChatSession(source).send("Tell"))
    assert pieces[0] == "Once upon a"
    assert word in pieces[1].text
    assert len(pieces) == 2


def test_an_empty_answer_is_named():
    (found,) = ChatSession(lambda messages, number: iter([])).send("Hi")
    assert "without writing anything" in found.text


# Answers that break off


@pytest.mark.parametrize(
    "error", [UserError("no\nroom"), ConnectionError("refused"), RuntimeError("CUDA"), MemoryError()]
)
def test_an_answer_that_fails_leaves_the_conversation_as_it_was(error):
    session = ChatSession(greet)
    said(session, "Hi", "/retry")
    before = list(session.messages)
    session.source = broken(error)
    for line in ("And?", "/retry"):
        *pieces, last = session.send(line)
        assert pieces == ["Hel"]
        assert last.failed
        assert (" ".join(str(error).split()) or "MemoryError") in last.text
        assert session.messages == before
    session.source = greet
    assert said(session, "/retry") == [["Hello ", "2."]]


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        said(ChatSession(broken(ZeroDivisionError())), "Hi")


@pytest.mark.parametrize("where", ["in the source", "between pieces"])
def test_an_interrupted_answer_stays_as_far_as_it_came_and_can_be_tried_again(where):
    session = ChatSession(broken(KeyboardInterrupt()))
    pieces = session.send("Hi")
    assert next(pieces) == "Hel"
    if where == "in the source":
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
    else:
        pieces.close()
    assert session.messages == [HI[0], Message("assistant", "Hel")]
    session.source = greet
    assert said(session, "/retry") == [["Hello ", "1."]]


def test_interrupted_before_its_first_word_nothing_has_changed():
    def source(messages, number):
        yield ""
        raise KeyboardInterrupt

    session = ChatSession(greet)
    said(session, "Hi")
    session.source = source
    for line in ("And?", "/retry"):
        with pytest.raises(KeyboardInterrupt):
            said(session, line)
        assert session.messages == HI


# Saving


def saved(path):
    return [Message(m["role"], m["content"]) for m in json.loads(path.read_text())["messages"]]


def test_save_says_where_and_without_a_name_replaces_only_its_own_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conversation.json").write_text("yesterday's")
    session = ChatSession(greet)
    said(session, "Hi")
    assert note(session, "/save").text == f"saved to {tmp_path / 'conversation-2.json'}"
    said(session, "And?")
    assert note(session, "/save").text == f"saved to {tmp_path / 'conversation-2.json'}"
    assert saved(tmp_path / "conversation-2.json") == session.messages
    assert note(session, "/save other name.json").text == f"saved to {tmp_path / 'other name.json'}"
    assert (tmp_path / "conversation.json").read_text() == "yesterday's"


def test_save_knows_the_home_directory_and_says_why_it_could_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    session = ChatSession(greet)
    assert note(session, "/save ~/a.json").text == f"saved to {tmp_path / 'a.json'}"
    for name, why in ((str(tmp_path), "directory"), ("~nobody-of-this-name/a.json", "No such file"), ("a\0b", "null")):
        found = note(session, f"/save {name}")
        assert found.failed
        assert why in found.text


# What of a long conversation a model reads


@pytest.fixture(scope="module")
def sample_tokenizer():
    return Tokenizer.load(SAMPLE)


def talk(exchanges, question="Why?"):
    turns = [(Message("user", f"Question {i}?"), Message("assistant", f"Answer {i}.")) for i in range(exchanges)]
    return [m for pair in turns for m in pair] + [Message("user", question)]


def tokens_by(tokenizer):
    return lambda turns: len(encode_prompt(tokenizer, turns))


@pytest.mark.parametrize("scene", [[], [Message("system", "Be brief.")]], ids=["plain", "system"])
def test_whole_exchanges_are_left_out_from_the_beginning_and_no_more_than_must(sample_tokenizer, scene):
    messages = [*scene, *talk(12)]
    whole = len(encode_prompt(sample_tokenizer, messages))
    for room in range(60, whole + 2):
        reading = fit(messages, tokens_by(sample_tokenizer), room)
        kept = reading.messages
        n = len(kept) - len(scene)
        assert kept == [*scene, *messages[len(messages) - n :]]
        assert kept[len(scene)].role == "user"
        assert len(encode_prompt(sample_tokenizer, kept)) <= room
        more = [*scene, *messages[len(messages) - n - 2 :]]
        assert kept == messages or len(encode_prompt(sample_tokenizer, more)) > room
        assert (reading.turns, bool(reading.left_out)) == (len(messages) - len(kept), kept != messages)


def test_a_question_that_is_too_long_keeps_its_end_and_the_system_prompt_stays(sample_tokenizer):
    scene, long = Message("system", "Be brief."), Message("user", "word " * 300 + "and the seventh?")
    reading = fit([scene, *talk(3, long.content)], tokens_by(sample_tokenizer), 60)
    system, cut = reading.messages
    assert system == scene
    assert long.content.endswith(cut.content)
    assert cut.content.endswith("word and the seventh?")
    assert 56 <= len(encode_prompt(sample_tokenizer, reading.messages)) <= 60
    assert (reading.turns, reading.characters) == (6, len(long.content) - len(cut.content))
    assert "its beginning (1," in reading.left_out
    assert "6 earlier turns are left out" in reading.left_out


def test_a_system_prompt_that_leaves_no_question_is_refused_and_the_talk_goes_on(sample_tokenizer):
    scene, question = Message("system", "Be brief. " * 40), Message("user", "What is the seventh number?")
    with pytest.raises(UserError, match=r"system prompt has \d+ tokens.*at most 100.*shorten it"):
        fit([scene, question], tokens_by(sample_tokenizer), 100)
    assert fit([scene, question], tokens_by(sample_tokenizer), 1000).messages == [scene, question]


@pytest.mark.parametrize(
    "messages",
    [
        [Message("assistant", "Welcome!"), *talk(6)],
        [*talk(5), Message("user", "And?")],
        [Message("user", "Hi"), Message("system", "Be brief."), *talk(5), Message("system", "Now answer.")],
    ],
    ids=["an answer first", "two questions", "a system turn last"],
)
def test_odd_conversations_are_cut_by_the_same_rule(sample_tokenizer, messages):
    tokens = tokens_by(sample_tokenizer)
    kept = fit(messages, tokens, 70).messages
    assert tokens(kept) <= 70
    assert kept[-1] == messages[-1]
    assert [m for m in kept if m.role == "system"] == [m for m in messages if m.role == "system"]
    assert kept != messages
