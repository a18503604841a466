"""Running a study: every run that is missing, in the order of their needs, each in a process of its own.

    tunesmith study paper --scale smoke

Finished runs are skipped by the hash of their configuration, cut ones go on from their last checkpoint, a failed one stops
only those that need it. What this leaves out: retries of what failed by itself (start the study again), and priorities.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import UserError
from tunesmith.files.run import Run, write_atomically, write_status
from tunesmith.progress import STOP
from tunesmith.study.executors import Ended, Executor, Job
from tunesmith.study.ledger import DONE, STAMP, Ledger, moved_aside, stamped
from tunesmith.study.matrix import Plan, PlannedRun, directory_of, run_config
from tunesmith.study.view import View

STOPPING = ("stopping: the runs save and end; a second signal ends them at once", "ending them")
TICK = 0.03  # seconds between two looks at the processes
LOG_END = 4000  # bytes of a log that are searched for what went wrong


# ---- the directory of a run ------------------------------------------------------------------------------------------


def prepare(plan: Plan, out: Path, run: PlannedRun) -> tuple[Job, bool]:
    """Make a run's directory ready; the job, and whether it goes on with what is there.

    What lies there of another configuration moves to `superseded/`, and comes back when its configuration does.
    """
    directory, config = out / directory_of(run.name), out / "configs" / f"{run.name}.yaml"
    _make_room(out, run)
    if run.continues and not (directory / "status.json").exists():
        copy_to_continue(out / directory_of(run.continues), directory)
    resume = (directory / "status.json").exists()
    directory.mkdir(parents=True, exist_ok=True)
    _stamp(plan, directory, run)
    config.parent.mkdir(exist_ok=True)
    write_atomically(config, yaml.safe_dump(run_config(run, out), sort_keys=False))
    argv = [run.command, "--config", str(config), "--out", str(directory), *(["--resume"] if resume else [])]
    return Job(run.name, argv, str(out / "logs" / f"{run.name}.log"), directory=os.getcwd()), resume


def _make_room(out: Path, run: PlannedRun) -> None:
    directory, there = out / directory_of(run.name), stamped(out, run.name)
    if there == run.hash:
        return
    if (directory / "status.json").exists():
        target = free = moved_aside(out, run.name, there or "unknown")
        for number in itertools.count(2):
            if not free.exists():
                break
            free = target.with_name(f"{target.name}-{number}")
        free.parent.mkdir(exist_ok=True)
        directory.rename(free)
    elif directory.exists():  # nothing was done yet
        shutil.rmtree(directory)
    if (before := moved_aside(out, run.name, run.hash)).exists():
        before.rename(directory)


def _stamp(plan: Plan, directory: Path, run: PlannedRun) -> None:
    stamp = {"study": plan.study.name, "scale": plan.study.scale, "run": run.name, "hash": run.hash}
    write_atomically(directory / STAMP, json.dumps(stamp) + "\n")


def copy_to_continue(source: Path, directory: Path) -> None:
    """A run's directory as the beginning of another that goes on from its last checkpoint. It appears whole or not at all.

    Files of checkpoints are never written to again, so they are linked, not copied, where the file system can.
    """
    aside = directory.with_name(f".copying-{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    parts = ("checkpoints", "base")
    shutil.copytree(source, aside, ignore=shutil.ignore_patterns(*parts, STAMP, ".*"))
    for part in parts:
        if (source / part).is_dir():
            shutil.copytree(source / part, aside / part, copy_function=_link, ignore=shutil.ignore_patterns(".*"))
    status = {**Run(source).status, "state": "stopped", "reason": f"copy of {source.name}, to continue from"}
    write_status(aside, status)
    aside.rename(directory)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def outcome(out: Path, ended: Ended, began_at: int, stopping: bool) -> tuple[str, str]:
    """(state, reason) of a run whose process has ended. began_at: size of its log before."""
    status: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        status = Run(out / directory_of(ended.name)).status
    state, reason = str(status.get("state", "")), str(status.get("reason", ""))
    if state in DONE:
        return state, reason if state == "diverged" else ""
    if ended.code == 0 and state == "stopped":
        return state, f"at step {status['step']:,}, saved"
    if stopping and ended.code in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL, 128 + signal.SIGTERM):
        return "stopped", "before its first checkpoint" if not status else "at once; continues from its last checkpoint"
    log = out / "logs" / f"{ended.name}.log"
    if ended.trouble:
        return "failed", ended.trouble
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        return "failed", f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; its output is in {log}"
    return "failed", f"{last_line(log, began_at) or reason or f'exit code {ended.code}'} (its output is in {log})"


def last_line(log: Path, start: int) -> str:
    """The last line that a process wrote to its log after `start`, without the program's name."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start, end - LOG_END))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("tunesmith: ") if lines else ""


# ---- the loop --------------------------------------------------------------------------------------------------------


def conduct(
    plan: Plan, ledger: Ledger, executor: Executor, view: View, wanted: Sequence[str], on_end: Callable[[], None]
) -> bool:
    """Run what is missing of `wanted`; whether it was interrupted. The ledger tells how each run ended.

    on_end: called after every run that has ended.
    """
    out, sizes, signalled = ledger.out, dict[str, int](), 0
    for name in wanted:
        if moved_aside(out, name, plan.runs[name].hash).exists():
            _make_room(out, plan.runs[name])
    with STOP.catching(*STOPPING):
        try:
            while True:
                if (heard := max(STOP.count, STOP.requested)) > signalled:
                    signalled = heard
                    executor.stop()
                while not signalled and executor.free() and (ready := ledger.ready(wanted)):
                    _start(plan, ledger, executor, view, ready[0], sizes)
                for ended in executor.ended():
                    if ended.again and not signalled:
                        ledger.ended(ended.name, "waiting", ended.trouble)
                        view.say(f"{ended.name}: {ended.trouble}; it will continue elsewhere")
                        continue
                    ledger.ended(ended.name, *outcome(out, ended, sizes.get(ended.name, 0), bool(signalled)))
                    view.ended(ended.name)
                    on_end()
                if not ledger.count(wanted, "running") and (signalled or not ledger.ready(wanted)):
                    break
                view.tick()
                time.sleep(TICK)
        finally:
            executor.close()
            for name in wanted:
                if ledger.state(name) == "running":  # an error in this process
                    ledger.ended(name, "stopped", "the study was interrupted; continues from its last checkpoint")
            ledger.blocked()
            ledger.save()
    return bool(signalled)


def _start(plan: Plan, ledger: Ledger, executor: Executor, view: View, name: str, sizes: dict[str, int]) -> None:
    """Start one run; what is wrong with it becomes its failure."""
    try:
        job, resumed = prepare(plan, ledger.out, plan.runs[name])
        log = Path(job.log)
        sizes[name] = log.stat().st_size if log.exists() else 0
        ledger.started(name)
        view.started(name, executor.start(job), resumed)
    except (UserError, OSError) as error:
        ledger.runs[name]["started"] = time.time()
        ledger.ended(name, "failed", " ".join(str(error).split()))
        view.ended(name)
