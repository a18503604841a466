"""A program at a real pseudo-terminal: what a person types goes in, what the terminal shows comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence

from hanging import HANGS

WHERE_IS_THE_CURSOR = b"\x1b[6n"
_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>]")


def shown(raw: str) -> str:
    """What the sequences of prompt_toolkit and rich leave on a screen, roughly: text without colours and cursor moves."""
    return _SEQUENCES.sub("", raw).replace("\r", "")


class Terminal:
    """A child process whose standard streams are a pseudo-terminal of `columns` columns.

    It answers what terminals are asked for and reports SIGINT to the child for Ctrl-C as the kernel does.
    """

    def __init__(self, argv: Sequence[str], columns: int = 80, **environment: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # for Ctrl-C: a signal to the terminal's session
        )
        os.close(slave)
        self.raw = ""  # all that was shown
        self.seen = 0  # up to where `expect` has found it

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, keys: str) -> None:
        """Press keys; a terminal hands on what fits, so long texts go in parts."""
        left = keys.encode()
        while left:
            left = left[os.write(self.master, left[:512]) :]
            self._read(0)

    def paste(self, text: str) -> None:
        """As terminals paste where the program asked for brackets: newlines as returns."""
        self.type("\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~")

    def expect(self, text: str) -> str:
        """Wait until the text is shown after what was expected before; what was shown up to it. Fails with all of it."""
        end = time.monotonic() + HANGS
        while (at := shown(self.raw).find(text, self.seen)) < 0:
            alive = self._read(0.05)
            assert alive or text in shown(self.raw)[self.seen :], f"ended without {text!r}: {self.raw!r}"
            assert time.monotonic() < end, f"no {text!r} in {HANGS} s: {self.raw!r}"
        before = shown(self.raw)[self.seen : at]
        self.seen = at + len(text)
        return before

    def ended(self) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + HANGS
        while self._read(0.05):
            assert time.monotonic() < end, f"goes on after {HANGS} s: {self.raw!r}"
        return self.process.wait(HANGS)

    def _read(self, seconds: float) -> bool:
        """Take what is shown next, within `seconds`; False at the end of the output."""
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux's word for the end
            return False
        self.raw += data.decode(errors="replace")
        os.write(self.master, b"\x1b[1;1R" * data.count(WHERE_IS_THE_CURSOR))
        return bool(data)
