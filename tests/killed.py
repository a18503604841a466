"""A tunesmith process that kills itself (SIGKILL, as a lost machine would) at a chosen moment.

    python tests/killed.py MOMENT NUMBER sft --out ...

MOMENT: `seconds` after the first training step; at the NUMBER-th `flush` of a file to disk (most belong to a save); at
the NUMBER-th `removal` of a file of an old checkpoint.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from tunesmith.__main__ import main
from tunesmith.progress import Progress


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            die()
        return function(*args, **kwargs)

    return counted


moment, number = sys.argv[1], float(sys.argv[2])
if moment == "flush":
    os.fsync = die_at_call(os.fsync, int(number))
elif moment == "removal":
    os.unlink = die_at_call(os.unlink, int(number))
else:
    timer = threading.Timer(number, die)
    timer.daemon = True
    advance = Progress.advance

    def first_step(self: Progress, *args: Any) -> None:
        if not timer.is_alive():
            timer.start()
        advance(self, *args)

    Progress.advance = first_step  # type: ignore[method-assign]
sys.exit(main(sys.argv[3:]))
