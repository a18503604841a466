"""Long work, seen from outside: a bar or plain lines that tell how far it is, and the wish to end it (`STOP`)."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from tunesmith.errors import Interrupted

if TYPE_CHECKING:
    from rich.console import Console

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ECHO = 0.5
"""Seconds in which several signals are one wish: `timeout` sends its signal twice, a wrapper passes Ctrl-C on that the terminal has
already sent to the whole group, and a service manager sends SIGHUP right behind SIGTERM."""
QUIET = 0.3  # seconds that work which breaks off at once is given before a signal is answered in words
GONE = (errno.EPIPE, errno.EIO)  # what writing gives when the pipe's reader, or the terminal, is gone


@dataclass(frozen=True)
class _Block:
    """One `StopToken.catching`."""

    answers: tuple[str, ...]
    last_words: Callable[[str], str]
    exits: bool


class StopToken:
    """The wish that this process ends what it does: from SIGINT, SIGTERM or SIGHUP, or because nobody reads what it says.

    A process has one, `STOP`. Python hands a signal to the main thread only between two of its own instructions, and one
    kernel of torch may take minutes; so a small thread hears of it too, answers in words at once, and at a second signal
    ends the process where it stands.
    """

    def __init__(self) -> None:
        self.reason = ""  # of the wish, in words
        self.count = 0  # signals, without their echoes
        self.unread = False  # whether it is the output that is gone
        self._number = int(signal.SIGINT)
        self._blocks: list[_Block] = []
        self._at_once = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the work is to end."""
        return bool(self.reason)

    def check(self) -> None:
        """For work that can be broken off and done again: asked between two of its parts. Raises: Interrupted."""
        if self.reason:
            raise Interrupted(self._number)

    @contextlib.contextmanager
    def catching(
        self, *answers: str, last_words: Callable[[str], str] = lambda name: "", exits: bool = False
    ) -> Iterator[StopToken]:
        """Inside, signals are the token's; blocks may be nested, and after the outermost all handlers are what they were.

        Only the main thread can hear signals: in another one this changes nothing.

        Args:
            answers: what is said to the first signal, the second and so on. Each of these is only a wish, to be looked at
                with `requested` and `count`. Without answers the first raises Interrupted in the main thread.
            last_words: the signal's name -> what to say when the process ends at once; may store what whoever goes on needs.
            exits: whether one signal more ends the process (exit code 128 + signal); else it raises Interrupted in the main
                thread, for a process that is not ours to end. The outermost block decides.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._blocks.append(_Block(answers, last_words, exits))
        try:
            if len(self._blocks) > 1:
                yield self
            else:
                with self._listening():
                    yield self
        finally:
            self._blocks.pop()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        self.reason, self.count, self.unread, self._at_once = "", 0, False, False
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        over = threading.Event()
        thread = threading.Thread(target=self._listen, args=(ear, over), name="tunesmith-signals", daemon=True)
        thread.start()
        # under nohup SIGHUP is ignored, and stays so
        mine = [n for n in SIGNALS if n != SIGNALS[-1] or signal.getsignal(n) is not signal.SIG_IGN]
        wakeup = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._receive) for number in mine}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
            signal.set_wakeup_fd(wakeup)
            over.set()
            os.close(mouth)
            thread.join(1)
            self.reason = ""

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        """In the main thread, between two instructions."""
        first = not self.reason
        if first:
            self.reason, self._number = f"{signal.Signals(number).name} received", number
        for stream in filter(None, (sys.stdout, sys.stderr)):
            _silence(stream, only_dead=True)
        if self._at_once or (first and not self._blocks[-1].answers):
            raise Interrupted(number)

    def _listen(self, ear: int, over: threading.Event) -> None:
        """In a thread of its own: every signal as the operating system delivers it."""
        last = -ECHO
        while heard := os.read(ear, 1):
            number, now = heard[0], time.monotonic()
            if number not in SIGNALS or signal.getsignal(number) != self._receive or not self._blocks:
                continue  # another's
            if now - last < ECHO:
                continue
            last, block = now, self._blocks[-1]
            self.count += 1
            name = signal.Signals(number).name
            if self.count > max(1, len(block.answers)):
                self._end(number, name, block)
            elif block.answers:
                _say(f"{name} received: {block.answers[self.count - 1]}", sys.stdout)
            elif not over.wait(QUIET):
                _say(f"tunesmith: {name} received, stopping; a second one ends at once", sys.stderr)
        os.close(ear)

    def _end(self, number: int, name: str, block: _Block) -> None:
        if self._blocks[0].exits:
            words = ""
            with contextlib.suppress(Exception):
                words = block.last_words(name)
            _say(f"tunesmith: ended at once by another {name}{words}", sys.stderr)
            os._exit(128 + number)
        import _thread

        self._at_once = True
        _thread.interrupt_main(signal.Signals(number))

    def output_lost(self, error: OSError) -> None:
        """The reader of what we say is gone: a wish to end, where wishes are looked at. Raises: `error` elsewhere."""
        if error.errno not in GONE or not self._blocks or not self._blocks[-1].answers:
            raise error
        for stream in filter(None, (sys.stdout, sys.stderr)):
            _silence(stream, only_dead=True)
        if sys.stdout is not None:
            _silence(sys.stdout)
        self.unread = True
        if not self.reason:
            self.reason, self._number = "nobody reads its output any more", 13  # SIGPIPE


STOP = StopToken()


def _say(line: str, stream: TextIO | None) -> None:
    """Print without waiting for whoever reads: a terminal may be held (Ctrl-S), a pipe full, both may be gone."""

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=stream, flush=True)

    if stream is not None:
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(QUIET)


def _silence(stream: TextIO, *, only_dead: bool = False) -> None:
    """Send what is still written there nowhere; with `only_dead` only if its terminal has hung up or its reader is gone."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, or poll is not there (Windows)
        descriptor = stream.fileno()
        if only_dead:
            look = select.poll()
            look.register(descriptor, 0)
            if not any(event & (select.POLLHUP | select.POLLERR) for _, event in look.poll(0)):
                return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def span(seconds: float) -> str:
    """A time in words: `34 s`, `7.5 min`, `3.2 h`, `4.0 days`."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if unit == 1 else 1}f} {name}"
    return f"{seconds / 86_400:,.1f} days"


class Progress:
    """Shows what is done of `total`, loss, tokens a second and time left. Without a terminal: one line every ten seconds."""

    def __init__(self, total: int, done: int = 0, unit: str = "step") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.unit = unit
        self.total, self.first = total, done
        self.began = self.told = time.monotonic()
        self.tokens = 0
        self.smooth: float | None = None
        self.console = _console()
        self.bar: RichProgress | None = None
        if self.console.is_terminal:
            text = (
                TextColumn(f"[bold]{unit}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self.bar = RichProgress(*text, console=self.console)
            self.task = self.bar.add_task("train", total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int, loss: float | None, tokens: int) -> None:
        """`step` of them are done now, the last with this many tokens."""
        self.tokens += tokens
        if loss is not None:
            self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss
        now = time.monotonic()
        rate = self.tokens / max(1e-9, now - self.began)
        speed = f"{rate:,.0f} tokens/s" if self.tokens else ""
        note = f"{'' if self.smooth is None else f'loss {self.smooth:.3f}  '}{speed}"
        if self.bar:
            self.bar.update(self.task, completed=step, note=note)
        elif now - self.told >= 10:
            self.told = now
            left = (now - self.began) / max(1, step - self.first) * (self.total - step)
            self.say(f"{self.unit} {step:,}/{self.total:,}  {note}  {span(left)} left")

    def say(self, line: str) -> None:
        """A line that stays. Where nobody reads it any more, that is a wish to stop (`StopToken.output_lost`)."""
        try:
            (self.bar.console if self.bar else self.console).print(line, markup=False)
        except OSError as error:
            STOP.output_lost(error)


def _console() -> Console:
    """rich's, with the error of a broken pipe as it is: rich ends the program there."""
    from rich.console import Console

    class OurConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return OurConsole(file=sys.stdout, soft_wrap=True, highlight=False)
