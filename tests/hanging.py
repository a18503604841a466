"""How the suite waits for other processes: as long as it takes. The only deadline is there against hanging."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

# Seconds after which a program hangs: ten times and more what the slowest takes (twelve runs of a study). Speed is for benchmarks.
HANGS = 1800.0


def wait_for(condition: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    """Until the condition holds; fails where it never does, or where one of the processes ends before."""
    end = time.monotonic() + HANGS
    while not condition():
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < end, "hangs"
        time.sleep(0.02)
