"""Where runs are executed: each in a process of its own, on this machine. `on_ray` does the same on several."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tunesmith.errors import UserError

PATIENCE = 60.0  # seconds that a run waits for an earlier process of its own to end
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True)
class Job:
    """A run as a process: arguments after `python -m tunesmith`, its log, environment to add, and where it starts."""

    name: str
    argv: Sequence[str]
    log: str
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str = "."


@dataclass(frozen=True)
class Ended:
    """A process that has ended. code: its exit code, negative for a signal. trouble: what the executor itself has to say;
    again: whether the run is to be started once more, because its machine was lost."""

    name: str
    code: int
    trouble: str = ""
    again: bool = False


class Executor(Protocol):
    """Starts jobs and tells which have ended. It never has more than `slots` of them."""

    @property
    def slots(self) -> int: ...
    def free(self) -> bool: ...
    def start(self, job: Job) -> str: ...
    def ended(self) -> list[Ended]: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


def launch(job: Job) -> subprocess.Popen[bytes]:
    """Start the process of a job, its output appended to its log.

    It has a process group of its own, so that Ctrl-C reaches it only through the study, and on Linux it is told to stop
    when the process that started it dies. Its lock on the log lasts as long as it lives: two processes never do one run.
    Raises: UserError if an earlier process of the run does not end.
    """
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        end = time.monotonic() + PATIENCE
        while not _locked(log.fileno()):
            if time.monotonic() > end:
                raise UserError(f"{job.name}: an earlier process of this run is still writing {job.log}; end it first")
            time.sleep(0.1)
        return subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *job.argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=job.directory,
            env={**os.environ, **job.environment},
            process_group=0,
            preexec_fn=_dies_with_parent(),
        )


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _dies_with_parent() -> Callable[[], None] | None:
    """For the child between fork and exec: ask for SIGTERM, at which a training saves and stops, when its parent dies."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    return ask


class Local:
    """Runs on this machine, one a device: a GPU, or the CPU `jobs` times."""

    def __init__(self, jobs: int | None, gpus: Sequence[str]) -> None:
        """gpus: names for CUDA_VISIBLE_DEVICES. jobs: runs at a time; default one a GPU, on a CPU one."""
        self.gpus = list(gpus)
        self.slots = jobs or max(1, len(self.gpus))
        self._running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        self._asked = False

    def free(self) -> bool:
        """Whether one more can be started."""
        return len(self._running) < self.slots

    def start(self, job: Job) -> str:
        """Start a job in a free slot; returns where it runs."""
        slot = next(n for n in range(self.slots) if n not in self._running)
        environment = {**slot_environment(self.slots, self.gpus, slot), **job.environment}
        self._running[slot] = (job.name, launch(Job(job.name, job.argv, job.log, environment, job.directory)))
        return f"GPU {self.gpus[slot % len(self.gpus)]}" if self.gpus else ""

    def ended(self) -> list[Ended]:
        """Those that have ended since the last call."""
        done = [(slot, name, p.returncode) for slot, (name, p) in self._running.items() if p.poll() is not None]
        for slot, _, _ in done:
            del self._running[slot]
        return [Ended(name, code) for _, name, code in done]

    def stop(self) -> None:
        """Ask all to stop with a checkpoint; a second call ends them."""
        number, self._asked = (signal.SIGKILL if self._asked else signal.SIGTERM), True
        for _, process in self._running.values():
            process.send_signal(number)

    def close(self) -> None:
        """End all that still runs."""
        for _, process in self._running.values():
            process.kill()
            process.wait()


def slot_environment(slots: int, gpus: Sequence[str], slot: int) -> dict[str, str]:
    """The environment of a slot's process: its GPU; or its share of the cores where several runs share a CPU."""
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if slots > 1 and "OMP_NUM_THREADS" not in os.environ:
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // slots))}
    return {}


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(n) for n in range(count)]
