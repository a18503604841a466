"""A chat as a person has it: keys at a pseudo-terminal. Most with a source that counts what it read, one with a model."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from at_terminal import Terminal
from tunesmith.commands import chat_terminal

COUNTS = '''
import itertools, time
from tunesmith.commands.chat_terminal import converse
from tunesmith.generation.chat import ChatSession

def source(messages, number):
    """Says what it read; counts until it is stopped where that was "count"."""
    text = messages[-1].content
    yield f"[{text[:9]!a} {len(text)} characters, turn {len(messages)}, try {number}]"
    if text == "count":
        for i in itertools.count():
            yield f" {i}"
            time.sleep(0.01)
    if text == "wild":
        yield "\\x1b[2Jred\\x9b31m\\a\\rend"
    return "stop"

converse(ChatSession(source), "counter.")
'''
UP, CTRL_C, CTRL_D, ALT_ENTER = "\x1b[A", "\x03", "\x04", "\x1b\r"


@pytest.fixture
def terminal(request):
    """At the prompt of a chat with the counting source."""
    with Terminal([sys.executable, "-c", COUNTS], **getattr(request, "param", {})) as at:
        at.expect("counter. /help lists the commands, Ctrl-D quits.")
        at.expect("you ")
        yield at


def answered(terminal, what):
    terminal.expect(f"[{what}]")
    terminal.expect("you ")


def leave(terminal):
    terminal.type(CTRL_D)
    assert terminal.ended() == 0


def test_typing_editing_and_history(terminal):
    terminal.type("helo\x1b[Dl\r")  # a letter put in before the last
    answered(terminal, "'hello' 5 characters, turn 1, try 0")
    terminal.type("second\r")
    answered(terminal, "'second' 6 characters, turn 3, try 0")
    terminal.type(UP + UP + "!\r")
    answered(terminal, "'hello!' 6 characters, turn 5, try 0")
    leave(terminal)


def test_pasted_lines_are_one_message(terminal):
    terminal.paste("one\n  two\nthree")
    terminal.expect("three")
    assert "characters" not in terminal.raw
    terminal.type("\r")
    answered(terminal, r"'one\n  two' 15 characters, turn 1, try 0")
    terminal.type(UP + "\r")
    answered(terminal, r"'one\n  two' 15 characters, turn 3, try 0")
    leave(terminal)


def test_alt_enter_begins_a_new_line(terminal):
    terminal.type(f"one{ALT_ENTER}two\r")
    answered(terminal, r"'one\ntwo' 7 characters, turn 1, try 0")
    leave(terminal)


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep fewer keys for later")


@pytest.mark.parametrize("how", ["pasted", "typed", pytest.param("typed during an answer", marks=ON_LINUX)])
def test_five_thousand_characters_arrive(terminal, how):
    text = "abcdefghi " * 500
    text = text[:-1] + "!"
    if how == "pasted":
        terminal.paste(text)
    else:
        if how == "typed during an answer":
            terminal.type("count\r")
            terminal.expect(" 10")
        terminal.type(text)
    if how == "typed during an answer":
        os.kill(terminal.process.pid, signal.SIGINT)  # the key would throw away what was typed before it
        terminal.expect("(interrupted)")
    terminal.expect("!")
    terminal.type("\r")
    terminal.expect("'abcdefghi' 5000 characters")
    terminal.expect("you ")
    leave(terminal)


def test_ctrl_c_in_an_answer_stops_it_and_keeps_what_was_said(terminal, tmp_path):
    terminal.type("count\r")
    terminal.expect(" 10")
    terminal.type(CTRL_C)
    terminal.expect("(interrupted)")
    terminal.expect("you ")
    terminal.type(f"/save {tmp_path}/c.json\r")
    terminal.expect("saved to")
    terminal.type("/retry\r")
    terminal.expect("turn 1, try 1]")
    terminal.type(CTRL_C)
    terminal.expect("(interrupted)")
    terminal.expect("you ")
    terminal.type("hello\r")
    answered(terminal, "'hello' 5 characters, turn 3, try 0")
    leave(terminal)
    question, answer = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert question == {"role": "user", "content": "count"}
    assert re.search(r"try 0\] 0 1 .* 10", answer["content"])


def test_ctrl_c_at_the_prompt_clears_the_line_and_never_ends_the_conversation(terminal):
    terminal.type("hello\r")
    answered(terminal, "'hello' 5 characters, turn 1, try 0")
    for _ in range(5):
        terminal.type("not this" + CTRL_C + CTRL_C)
        terminal.expect("Ctrl-D or /quit quits")
        terminal.expect("Ctrl-D or /quit quits")
    terminal.type("again\r")
    answered(terminal, "'again' 5 characters, turn 3, try 0")
    leave(terminal)


def test_a_late_ctrl_c_between_an_answer_and_the_prompt_does_not_end_the_program():
    """A signal whenever the loop asks whether the chat is over, which is outside both."""
    late = """
import os, signal
class Late(ChatSession):
    over = property(lambda self: os.kill(os.getpid(), signal.SIGINT), lambda self, value: None)
"""
    with Terminal([sys.executable, "-c", COUNTS.replace("converse(ChatSession", late + "converse(Late")]) as at:
        at.expect("you ")
        for turn in (1, 3):
            at.type("hello\r")
            answered(at, f"'hello' 5 characters, turn {turn}, try 0")
        leave(at)


@pytest.fixture
def keys(monkeypatch):
    """Without a terminal: signals only."""
    monkeypatch.setattr(chat_terminal, "termios", None)
    before = signal.getsignal(signal.SIGINT)
    with chat_terminal._Keys() as keys:
        yield keys
    assert signal.getsignal(signal.SIGINT) is before


def ctrl_c(times=1):
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_a_piece_is_shown_lets_it_be_shown_whole(keys):
    events = keys.stopping(iter("abc"))
    assert next(events) == "a"
    ctrl_c(2)
    with pytest.raises(KeyboardInterrupt):
        next(events)


def test_ctrl_c_while_a_piece_is_made_raises_at_once_and_once(keys):
    cleared = []

    def pieces():
        yield "a"
        try:
            ctrl_c()
            cleared.append("never")
        finally:
            ctrl_c(3)
            cleared.append("up")

    events = keys.stopping(pieces())
    assert next(events) == "a"
    with pytest.raises(KeyboardInterrupt):
        next(events)
    ctrl_c()
    assert cleared == ["up"]


def test_ctrl_c_outside_an_answer_neither_raises_nor_stops_the_next(keys):
    ctrl_c()
    for piece in keys.stopping(iter("a")):
        assert piece == "a"
    ctrl_c()
    assert list(keys.stopping(iter("bc"))) == ["b", "c"]


def test_help_tells_the_keys_and_an_unknown_command_of_help(terminal):
    terminal.type("/help\r")
    for word in ("/reset", "/quit", "Alt-Enter", "Ctrl-C", "Ctrl-D"):
        terminal.expect(word)
    terminal.type("/hepl\r")
    terminal.expect("unknown command /hepl; did you mean /help?")
    leave(terminal)


def test_what_a_model_writes_cannot_act_on_the_terminal(terminal):
    terminal.type("wild\r")
    terminal.expect(r"\x1b[2Jred\x9b31m\x07\rend")
    terminal.expect("you ")
    leave(terminal)


@pytest.mark.parametrize("terminal", [{"PYTHONIOENCODING": "utf-8"}], indirect=True)
def test_latin_1_bytes_at_the_prompt_are_read(terminal):
    os.write(terminal.master, b"caf\xe9\r")
    terminal.expect("read as Latin-1")
    answered(terminal, r"'caf\xe9' 4 characters, turn 1, try 0")
    leave(terminal)


@pytest.mark.parametrize("terminal", [{"TERM": "dumb", "columns": 60}], indirect=True)
def test_a_dumb_terminal_gets_no_sequences(terminal):
    terminal.type("hello\r")
    answered(terminal, "'hello' 5 characters, turn 1, try 0")
    terminal.type("not this" + CTRL_C)
    terminal.expect("Ctrl-D or /quit quits")
    leave(terminal)
    assert "\x1b" not in terminal.raw


@pytest.mark.parametrize("terminal", [{"columns": 60}], indirect=True)
def test_sixty_columns(terminal):
    terminal.type("word " * 30 + "\r")
    terminal.expect("149 characters, turn 1")
    terminal.type("/help\r")
    terminal.expect("Ctrl-D       quit")
    leave(terminal)
    assert all(len(line) <= 60 for line in terminal.raw.split("Ctrl-D")[0].split("\r\n"))


def test_the_terminal_is_as_it_was_after_leaving():
    script = 'before=$(stty -g); "$0" -c "$1"; test "$before" = "$(stty -g)" && echo the same'
    with Terminal(["sh", "-c", script, sys.executable, COUNTS]) as at:
        at.expect("you ")
        at.type("hello\r")
        answered(at, "'hello' 5 characters, turn 1, try 0")
        at.type(CTRL_D)
        at.expect("the same")
        assert at.ended() == 0


def test_a_model_in_a_terminal_from_the_command_line(tmp_path):
    argv = [sys.executable, "-m", "tunesmith", "chat", "sample", "--device", "cpu", "--generate.max_new_tokens", "3"]
    with Terminal(argv, columns=60) as at:
        at.expect("/help lists the")
        at.expect("you ")
        at.type("What is love?\r")
        at.expect("model ")
        at.expect("token limit")
        at.expect("you ")
        at.type(f"/save {tmp_path}/c.json\r")
        at.expect("saved to")
        leave(at)
    assert [m["role"] for m in json.loads((tmp_path / "c.json").read_text())["messages"]] == ["user", "assistant"]


def test_with_the_answers_in_a_pipe_the_prompt_stays_on_the_terminal(tmp_path):
    with Terminal(["sh", "-c", '"$0" -c "$1" | cat > "$2"', sys.executable, COUNTS, str(tmp_path / "log")]) as at:
        at.expect("you ")
        at.type("helo\x1b[Dl\r")
        at.expect("you ")
        leave(at)
        assert "characters" not in at.raw
    log = (tmp_path / "log").read_text()
    assert log.splitlines()[-1] == "model ['hello' 5 characters, turn 1, try 0]"
    assert "\x1b" not in log


def test_without_a_terminal_prompt_toolkit_is_not_loaded():
    code = COUNTS + "\nimport sys; sys.exit('prompt_toolkit' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=b"hi\n", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines()[1] == "model ['hi' 2 characters, turn 1, try 0]"
