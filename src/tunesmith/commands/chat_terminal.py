"""A `ChatSession` at a terminal: prompt_toolkit edits the lines, Ctrl-C stops an answer and nothing else.

Where standard input is no terminal, each of its lines is a message or a command and prompt_toolkit is not loaded.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console

from tunesmith.generation.chat import ChatSession, Note
from tunesmith.terminal import latin1_where_undecodable, visible

try:
    import termios
except ImportError:  # Windows, whose console has neither such modes nor such a limit
    termios = None  # type: ignore[assignment]

KEYS = """
Alt-Enter    a new line; pasted lines stay one message
Up, Down     earlier messages
Ctrl-C       stop an answer, or clear the line
Ctrl-D       quit"""


def converse(session: ChatSession, greeting: str) -> None:
    """Take turns until /quit or the end of the input."""
    display = Display()
    if sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty()):
        display.greet(f"{greeting} /help lists the commands, Ctrl-D quits.")
        session.help_text += KEYS
        _by_prompts(session, display)
    else:
        display.greet(f"{greeting} /help lists the commands.")
        _by_lines(session, display)


class Display:
    """Shows what a session gives. What a model wrote cannot act on the terminal (see `visible`)."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a model says what no encoding but Unicode has
            sys.stdout.reconfigure(errors="backslashreplace")
        self.console = Console(highlight=False, emoji=False, soft_wrap=True)
        self.answering = False  # the cursor stands behind an answer, or the beginning of one

    def greet(self, text: str) -> None:
        """The first line, wrapped between words on a terminal."""
        self.console.print(visible(text), markup=False, soft_wrap=not self.console.is_terminal)

    def note(self, note: Note) -> None:
        """A line of its own."""
        self._end_answer()
        self.console.print(visible(note.text), style="red" if note.failed else "dim", markup=False)

    def show(self, events: Iterator[str | Note]) -> None:
        """Pieces of an answer as they come, notes as lines."""
        for event in events:
            if isinstance(event, Note):
                self.note(event)
                continue
            if not self.answering:
                self.console.print("[bold green]model[/bold green] ", end="")
                self.answering = True
            print(visible(event), end="", flush=True)
        self._end_answer()

    def interrupted(self) -> None:
        """An answer was stopped."""
        self.console.print("[dim] (interrupted)[/dim]")
        self.answering = False

    def _end_answer(self) -> None:
        if self.answering:
            self.console.print()
        self.answering = False


def _by_lines(session: ChatSession, display: Display) -> None:
    """Every line of standard input is a message or a command. Ctrl-C stops an answer; while waiting for a line it leaves."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is no text must not end the conversation
    while not session.over:
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            display.console.print()
            return
        try:
            display.show(session.send(_as_text(line, display)))
        except KeyboardInterrupt:
            display.interrupted()


def _by_prompts(session: ChatSession, display: Display) -> None:
    """Every input at the prompt, of one line or several, is a message or a command."""
    ask = _prompt()
    with _Keys() as keys:
        while not session.over:
            try:
                line = ask()
            except EOFError:
                return
            except KeyboardInterrupt:
                display.note(Note("Ctrl-D or /quit quits"))
                continue
            try:
                display.show(keys.stopping(session.send(_as_text(line, display))))
            except KeyboardInterrupt:
                display.interrupted()


def _as_text(line: str, display: Display) -> str:
    """The line with bytes that could not be decoded read as Latin-1, and a note where there are any."""
    text = latin1_where_undecodable(line)
    if text != line:
        display.note(Note(f"not {sys.stdin.encoding.upper()}: read as Latin-1"))
    return text


def _prompt() -> Callable[[], str]:
    """What asks for an input at the terminal. Raises: EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C.

    The history is the session's own: what people type to a model is theirs, and no file of it is kept.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.output.plain_text import PlainTextOutput
    from prompt_toolkit.utils import is_dumb_terminal

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    # With the answers in a pipe (`| tee FILE`) the prompt goes to standard error. A dumb terminal gets no sequence, not even
    # those by which a session begins.
    output = PlainTextOutput(sys.stdout) if is_dumb_terminal() else create_output(always_prefer_tty=True)
    with create_app_session(output=output):
        prompts: PromptSession[str] = PromptSession(
            [("bold ansicyan", "you ")], key_bindings=keys, prompt_continuation="    ", enable_suspend=True
        )
    return prompts.prompt


class _Keys:
    """The keyboard between prompts. Inside, Ctrl-C stops what is `stopping`; a later one is a key at the next prompt, and a
    SIGINT from elsewhere does nothing then: neither ends the program.

    What is typed during an answer is not shown in it but waits for the prompt. A terminal left to collect lines by itself
    cuts them at 4,095 characters.
    """

    def __enter__(self) -> _Keys:
        self.pressed = self.waiting = False
        self.handler = signal.signal(signal.SIGINT, self._interrupt)
        self.settings = termios.tcgetattr(sys.stdin) if termios else []
        self._send_signals(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if termios:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self.settings)
        signal.signal(signal.SIGINT, self.handler)

    def stopping(self, events: Iterator[str | Note]) -> Iterator[str | Note]:
        """The events until Ctrl-C. Raises: KeyboardInterrupt, but only while the next event is made: what is shown is whole."""
        self.pressed = False
        self._send_signals(True)
        try:
            while True:
                self.waiting = True
                if self.pressed:
                    raise KeyboardInterrupt
                event = next(events, None)
                self.waiting = False
                if event is None:
                    return
                yield event
        finally:
            self.waiting = False
            self._send_signals(False)

    def _interrupt(self, *_: object) -> None:
        self.pressed = True
        if self.waiting:
            self.waiting = False  # one is enough: a second must not meet the handling of the first
            raise KeyboardInterrupt

    def _send_signals(self, on: bool) -> None:
        """Whether Ctrl-C is a signal at once, or a key that waits for the prompt."""
        if termios:
            settings = [*self.settings]
            settings[3] &= ~(termios.ICANON | termios.ECHO | (0 if on else termios.ISIG))
            termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)
