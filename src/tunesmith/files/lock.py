"""A directory for the one process that writes there: locked by a file that names the process, and of a run found or made. No torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from tunesmith.errors import UserError, path_meant
from tunesmith.files.run import Run, is_run
from tunesmith.jsontext import parse_json

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"  # hidden: a copy of a run (a study's `continues`) does not take it along
UNREADABLE_FOR = 1.0  # seconds in which a process that has just made the file has written its name into it


@contextlib.contextmanager
def one_writer(directory: Path, what: str = "run") -> Iterator[None]:
    """The directory, which holds a `what`, belongs to this process until the end; then the file is gone.

    Where the file system knows locks (flock), they decide: the kernel releases them when a process dies, on this host or
    another. Where it does not, the file itself is the lock, and one that a dead process of this host left is taken over.
    Raises: UserError naming the process that writes there, its host, and since when.
    """
    path = directory.absolute() / NAME
    descriptor = _locked(path, what) if fcntl else None
    if descriptor is None:
        _claimed(path, what)
    try:
        yield
    finally:
        if descriptor is None or _is_at(
            descriptor, path
        ):  # the directory may have been moved, and another taken its place
            path.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def _locked(path: Path, what: str) -> int | None:
    """The open file with the kernel's lock on it; None where there are no such locks."""
    assert fcntl
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _taken(path, what) from None
        except OSError:  # some network file systems
            if os.fstat(descriptor).st_size == 0:
                path.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        if _is_at(descriptor, path):  # else its holder has removed it between our two calls
            os.truncate(descriptor, 0)
            os.write(descriptor, _this_process())
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _claimed(path: Path, what: str) -> None:
    """Make the file, or take over that of a dead process of this host."""
    while True:
        try:
            with path.open("xb") as file:
                file.write(_this_process())
            return
        except FileExistsError:
            holder = _holder(path)
            if holder.get("host") != socket.gethostname() or _lives(int(holder.get("process", 0))):
                raise _taken(path, what) from None
            path.unlink(missing_ok=True)  # two that find the same dead process within microseconds both go on here


def _this_process() -> bytes:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return (json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}) + "\n").encode()


def _holder(path: Path) -> dict[str, Any]:
    """What the file says; empty where that cannot be read."""
    end = time.monotonic() + UNREADABLE_FOR
    while time.monotonic() < end:
        try:
            holder = parse_json(path.read_bytes())
            return holder if isinstance(holder, dict) else {}
        except FileNotFoundError:
            return {}
        except ValueError:  # being written
            time.sleep(0.02)
    return {}


def _taken(path: Path, what: str) -> UserError:
    holder = _holder(path)
    who = "another process"
    if holder:
        who = f"process {holder.get('process')} on {holder.get('host')} (since {holder.get('since')})"
    return UserError(
        f"{path.parent} is being written by {who}, and a {what} has only one writer: wait for that process or end it, "
        f"or name another directory with --out. If it is gone, remove {path}"
    )


def _lives(process: int) -> bool:
    """Whether a process of this host is there."""
    if process <= 0:
        return False
    if sys.platform == "win32":  # os.kill would end it
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x00100000, False, process)  # SYNCHRONIZE
        return bool(handle and (ctypes.windll.kernel32.CloseHandle(handle) or True))
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ---- which directory -------------------------------------------------------------------------------------------------


def default_directory(command: str, model: str, sets: Sequence[str]) -> str:
    """The default directory of a run: `runs/sft-gpt2-medium-hh`."""
    return f"runs/{command}-{_short(model)}-{'-'.join(map(_short, sets))}"


def _short(name: str) -> str:
    """A name as part of a directory's name."""
    return name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-").partition(".")[0] or "model"


@contextlib.contextmanager
def run_directory(out: str | None, default: str, resume: bool) -> Iterator[Path]:
    """The run's directory, locked for us until the end; one created here whose run never began is removed again.

    A run has begun with its status.json: before that there is nothing that --resume could go on with.

    Raises: UserError if another process writes there, if `out` already holds a run and `resume` is off, or if `resume` is
    on and there is nothing to continue from.
    """
    if resume:
        path, made = Path(out or default), False
        check_resumable_directory(path)
    else:
        path, made = new_run_directory(out, default)
    try:
        with one_writer(path):
            try:
                if resume:
                    check_resumable_directory(path)  # once more, now that nobody changes it
                elif (path / "status.json").exists():
                    status = Run(path).status
                    raise UserError(
                        f"{path} already holds a run ({status['state']} at step {status['step']}). "
                        "Continue it with --resume, or name another directory with --out"
                    )
                yield path
            finally:
                # While it is locked: without the lock, what lies there may be of another process that was faster.
                if made and not (path / "status.json").exists():
                    shutil.rmtree(path, ignore_errors=True)
    finally:
        if made:
            with contextlib.suppress(OSError):  # gone, or not empty: the usual case
                path.rmdir()


def new_run_directory(out: str | None, default: str) -> tuple[Path, bool]:
    """`out`, or the first free of `default`, `default-2`, ..., made here; and whether it was not there before.

    Of two processes that ask at the same moment each gets a default of its own: making a directory succeeds for one.
    """
    for number in itertools.count(1):
        path = Path(out or (default if number == 1 else f"{default}-{number}"))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if out is None:
                continue
            path.mkdir(exist_ok=True)  # raises where a file has that name
            return path, False
        return path, True
    raise AssertionError("unreachable")


def check_resumable_directory(path: Path) -> None:
    """Raises: UserError in one line if there is no run, or none whose options and weights are still there."""
    if not (path / "status.json").exists():
        if (path / "metrics.jsonl").exists():  # killed: a signal that can be caught would have removed it
            raise UserError(
                f"--resume: the run in {path} was ended before it began, so there is nothing to continue; start it again "
                "without --resume"
            )
        near = path_meant(path, is_run)
        raise UserError(f"--resume: {path} holds no run to continue; name a run's directory with --out{near}")
    if not (path / "config.yaml").exists():
        raise UserError(
            f"--resume: {path} has lost its config.yaml, which holds its options; put it back, or start a "
            "new run with another --out"
        )
    run = Run(path)
    if (step := run.status["step"]) and not run.checkpoints():
        raise UserError(
            f"--resume: {path} was at step {step:,} ({run.status['state']}) but holds no checkpoint to continue from; start "
            "a new run with another --out"
        )
